"""Writes the graph of a variant and checks it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meam_export.graph.parity import ParityReport, Rows, check_parity
from meam_export.graph.policy_graph import build_graph
from meam_export.variants.names import parse_variant
from meam_export.variants.time_grid import search_integration
from meam_policy.spec import PolicySpec, VariantSpec
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.policy_module import PolicyModule

__all__ = ["BuiltVariant", "build_variant"]


@dataclass(frozen=True)
class BuiltVariant:
    """A variant that passed its checks.

    Attributes:
        name: Its name.
        spec: Its entry in `config.json`, without measured figures.
        graph: Contents of its ONNX file.
        policy_spec: The policy's spec with the variant's integration.
        module: The variant in PyTorch.
        parity: Errors of the graph against the checkpoint.
        joints: Joint of every action, where the robot's contract says so; empty otherwise.
    """

    name: str
    spec: VariantSpec
    graph: bytes
    policy_spec: PolicySpec
    module: PolicyModule
    parity: ParityReport
    joints: tuple[str, ...] = ()


def build_variant(
    name: str,
    networks: MeamNetworks,
    policy: BuiltVariant,
    observations: Rows | None,
    tolerance: float | None = None,
) -> BuiltVariant:
    """Write a variant's graph, and check it.

    Args:
        name: Name of the variant; see `parse_variant`.
        networks: Trained networks.
        policy: The policy itself.
        observations: Raw observations [n, obs] from the data or the policy; None uses only random ones.
        tolerance: Accepted error in int8 or fp16; None takes `parity.TOLERANCES`.

    Raises:
        ConfigError: there is no such variant of this policy.
        ParityError: the graph's error is above the tolerance.
    """
    variant, solvers = parse_variant(name, policy.policy_spec)
    if replace(variant, file=policy.spec.file) == policy.spec and not solvers:
        return replace(policy, name=name)  # the policy itself, which is in the folder already
    if solvers:
        found = search_integration(networks, policy.policy_spec, variant.integration.nfe, solvers, observations)
        variant = replace(variant, integration=replace(found, best_of=variant.integration.best_of))
    spec = policy.policy_spec.acting_as(variant)
    module = PolicyModule(networks, spec, variant.one_step, variant.takes_prefix)
    graph = build_graph(module, spec, variant.precision, policy.joints)
    own = tolerance if variant.precision != "fp32" else None
    report = check_parity(
        graph, module, spec, observations, precision=variant.precision, tolerance=own, name=variant.file
    )
    return BuiltVariant(name, variant, graph, spec, module, report, policy.joints)
