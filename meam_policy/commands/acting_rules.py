"""The acting rules that `meam eval` compares: which graph of a policy folder acts by each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meam_policy.errors import ConfigError
from meam_policy.spec import GRAPH_FILE, PolicySpec, VariantSpec, parse_acting

__all__ = ["loading_of"]


def loading_of(rule: str, spec: PolicySpec, variant: str | None) -> dict[str, Any]:
    """Arguments of `MeamPolicy.from_pretrained` with which a policy acts by a rule.

    That is with the graph that is asked for where it draws as many samples per decision as the rule, one or several;
    otherwise with the one that is the same but for that. Zero noise needs no other graph.

    Args:
        rule: Name of the rule; see `parse_acting`.
        spec: The policy as it was recorded.
        variant: The graph that is asked for; None for the policy as trained.

    Raises:
        ConfigError: there is no such rule or variant, or no such graph in the folder.
    """
    noise_scale, samples = parse_acting(rule)
    asked, several = spec.select(variant)[0].integration.best_of > 1, samples > 1
    if noise_scale and several != asked:
        variant = _twin(rule, spec, variant, samples)
    return {"variant": variant, "noise_scale": noise_scale} | ({"best_of": samples} if several else {})


def _twin(rule: str, spec: PolicySpec, variant: str | None, samples: int) -> str | None:
    """The graph that differs from another only in whether it chooses among several samples."""
    graphs: dict[str | None, VariantSpec] = {None: VariantSpec(GRAPH_FILE, spec.integration), **spec.variants}
    for name, graph in graphs.items():
        if (graph.integration.best_of > 1) == (samples > 1) and _flow(graph) == _flow(graphs[variant]):
            return name
    what = "chooses by value" if samples > 1 else "draws one sample per decision"
    wanted = "-".join([*([variant] if variant else []), f"best-of-{samples}"])
    raise ConfigError(
        f'The acting rule "{rule}" needs a graph that {what}, and the policy has none that is otherwise like '
        f"{graphs[variant].file}. Leave the rule out, or export with --variants {wanted}"
        + (", for which the run must have trained critics." if samples > 1 else ".")
    )


def _flow(graph: VariantSpec) -> VariantSpec:
    """What a graph computes, but for its number of samples."""
    return VariantSpec(
        file="",
        integration=replace(graph.integration, best_of=1),
        precision=graph.precision,
        one_step=graph.one_step,
        takes_prefix=graph.takes_prefix,
    )
