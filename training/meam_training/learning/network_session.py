"""Networks in training, with the interface of an exported graph's session."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from meam_policy.spec import PolicySpec
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.policy_module import PolicyModule

__all__ = ["NetworkSession"]


class NetworkSession:
    """Computes in PyTorch what the exported graph will compute, so that `MeamPolicy` can act with it.

    Args:
        networks: Networks in training; each call reads their current weights.
        spec: Specification of the policy.
    """

    def __init__(self, networks: MeamNetworks, spec: PolicySpec) -> None:
        self.takes_prefix = False
        self._device = next(networks.parameters()).device
        self._policy = PolicyModule(networks, spec).to(self._device)

    @property
    def provider(self) -> str:
        """Framework and device, such as "torch, cpu"."""
        return f"torch, {self._device}"

    @torch.no_grad()
    def run_all(
        self,
        observation: NDArray[np.float32],
        noise: NDArray[np.float32],
        prefix: NDArray[np.float32] | None = None,
        prefix_weight: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Compute all outputs of the exported graph; see `PolicySession.run_all`. Takes no prefix."""
        rows, draws = (torch.from_numpy(array).to(self._device) for array in (observation, noise))
        with self._policy.networks.in_float32():
            outputs = self._policy.decide(rows, draws)
        names = ("actions", "value", "disagreement")
        return {name: tensor.cpu().numpy() for name, tensor in zip(names, outputs, strict=False)}
