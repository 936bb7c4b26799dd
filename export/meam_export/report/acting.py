"""Policies that act, whether they were exported or are still in a run."""

from __future__ import annotations

from pathlib import Path

from meam_policy.folder.policy_folder import GRAPH_FILE
from meam_policy.policy import MeamPolicy
from meam_training.learning.network_session import NetworkSession
from meam_training.runs.trained_policy import TrainedPolicy

__all__ = ["acting_policy"]


def acting_policy(policy_or_run: Path) -> MeamPolicy:
    """The exported graph of a policy folder; or the networks of a run or a checkpoint, in PyTorch.

    Args:
        policy_or_run: Folder of either.

    Raises:
        MeamError: it cannot be loaded.
    """
    if (policy_or_run / GRAPH_FILE).is_file():
        return MeamPolicy.from_pretrained(policy_or_run)
    trained = TrainedPolicy.load(policy_or_run)
    return MeamPolicy(trained.spec, NetworkSession(trained.networks.eval(), trained.spec))
