"""The policy's spec: the contract that training, export and runtime share."""

from meam_policy.spec.acting import ActingMeasurement, ActingRule, checked_noise_scale, parse_acting, rule_name
from meam_policy.spec.box import BoxSpec
from meam_policy.spec.environment_spec import EnvironmentSpec, EnvironmentWrapper
from meam_policy.spec.integration import EVALUATIONS, MAX_STEPS, Integration, Solver
from meam_policy.spec.policy_spec import FORMAT_VERSION, GRAPH_FILE, RATE_TOLERANCE, PolicySpec
from meam_policy.spec.variant import Precision, VariantSpec

__all__ = [
    "EVALUATIONS",
    "FORMAT_VERSION",
    "GRAPH_FILE",
    "MAX_STEPS",
    "RATE_TOLERANCE",
    "ActingMeasurement",
    "ActingRule",
    "BoxSpec",
    "EnvironmentSpec",
    "EnvironmentWrapper",
    "Integration",
    "PolicySpec",
    "Precision",
    "Solver",
    "VariantSpec",
    "checked_noise_scale",
    "parse_acting",
    "rule_name",
]
