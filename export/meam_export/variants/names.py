"""Names of variants: how each one is integrated, and in which precision."""

from __future__ import annotations

import re
from typing import get_args

from meam_policy.errors import ConfigError, FormatError
from meam_policy.spec import EVALUATIONS, Integration, PolicySpec, Solver, VariantSpec
from meam_training.config import TrainConfig
from meam_training.flow.solvers import PREFIX_SOLVERS

__all__ = ["check_variant", "parse_variant"]

_PARTS = re.compile(
    r"(?:-k(?P<steps>\d{1,3})(?:-(?P<solver>euler|ab2|midpoint|heun|rk4))?(?P<grid>-grid)?|(?P<head>-one-step))?"
    r"(?:-best-of-(?P<best>\d{1,4}))?(?P<rtc>-rtc)?(?:-(?P<precision>fp32|int8|fp16))?"
)


def parse_variant(name: str, policy: PolicySpec) -> tuple[VariantSpec, tuple[Solver, ...]]:
    """Parse a variant's name.

    - "k5": NFE 5, with the policy's own solver if 5 is a multiple of its evaluations per step, else with Euler's.
    - "k4-midpoint": with another solver: euler, ab2, midpoint, heun or rk4.
    - "k3-grid": solver steps of unequal length, optimised on the policy's own actions; so is the solver unless named.
    - "one-step": the one-step policy distilled from the flow.
    - "best-of-4", "k5-best-of-4": the chunk with the highest value of four samples.
    - "rtc", alone or after other parts: takes a prefix, which its chunk continues, for real-time chunking.
    - "int8" or "fp16", alone or at the end: in that precision.

    Returns:
        The variant, and the solvers among which the best one and its time grid are to be searched; empty if both are
        given.

    Raises:
        ConfigError: the name is not a variant's, or its parts contradict each other.
    """
    match = _PARTS.fullmatch(f"-{name}")
    if match is None:
        raise ConfigError(
            f'There is no variant "{name}"; expected names such as k5, k4-midpoint, k3-grid, one-step, '
            "best-of-4 or rtc, with -int8 or -fp16 at the end."
        )
    trained = policy.integration
    nfe = int(match["steps"] or (1 if match["head"] else trained.nfe))
    own = trained.solver if nfe % EVALUATIONS[trained.solver] == 0 else "euler"
    solver = match["solver"] or ("euler" if match["head"] else own)
    best_of = int(match["best"] or (1 if match["head"] else trained.best_of))
    integration = Integration(
        nfe,
        solver,  # pyright: ignore[reportArgumentType]  # one of those in the pattern
        trained.time_grid if (nfe, solver) == (trained.nfe, trained.solver) else None,
        best_of,
    )
    variant = VariantSpec(
        file=f"policy-{name}.onnx",
        integration=integration,
        precision=match["precision"] or "fp32",  # pyright: ignore[reportArgumentType]
        one_step=match["head"] is not None,
        takes_prefix=match["rtc"] is not None,
    )
    if variant.one_step and best_of > 1:
        raise ConfigError(f'There is no variant "{name}": the one-step policy draws one chunk. Take one-step.')
    if variant.takes_prefix:
        _check_prefix(name, variant, searched=bool(match["grid"]) and match["solver"] is None)
    try:
        variant.check(name)
    except FormatError as error:
        raise ConfigError(f'There is no variant "{name}": {str(error).removeprefix("config.json: ")}') from error
    if not match["grid"]:
        return variant, ()
    known = PREFIX_SOLVERS if variant.takes_prefix else get_args(Solver)
    return variant, tuple(s for s in known if nfe % EVALUATIONS[s] == 0 and match["solver"] in (None, s))


def _check_prefix(name: str, variant: VariantSpec, searched: bool) -> None:
    """Refuse early, by the variant's name, what `PolicyModule` would refuse later.

    Raises:
        ConfigError: the variant cannot take a prefix.
    """
    if variant.one_step or variant.integration.best_of > 1:
        raise ConfigError(
            f'There is no variant "{name}": only a flow that draws one chunk can take a prefix. Take best-of-1-rtc.'
        )
    if variant.integration.solver not in PREFIX_SOLVERS and not searched:
        raise ConfigError(
            f'There is no variant "{name}": its solver is {variant.integration.solver}; expected one of '
            f"{', '.join(PREFIX_SOLVERS)}, to take a prefix. Take k{variant.integration.nfe}-midpoint-rtc."
        )


def check_variant(name: str, policy: PolicySpec, config: TrainConfig) -> None:
    """Check that a variant can be exported from a run, before anything is built.

    Raises:
        ConfigError: there is no such variant, or the run did not train what it needs.
    """
    variant, _ = parse_variant(name, policy)
    if variant.integration.best_of > 1 and not config.trains_policy:
        raise ConfigError(f'There is no variant "{name}" of a {policy.method} policy: it has no critics to choose by.')
    if variant.one_step and not config.distill_coef:
        raise ConfigError(
            f'There is no variant "{name}": the run has no one-step policy. Train with --distill-coef above 0.'
        )
    if variant.takes_prefix and config.edit_scale:
        raise ConfigError(
            f'There is no variant "{name}" of a {policy.method} policy: its edits would change the prefix. '
            "Export it without rtc."
        )
