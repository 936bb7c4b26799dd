"""Networks in training behind the interface of an exported graph."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from meam_policy.spec import PolicySpec
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["NetworkSession"]


class NetworkSession:
    """Computes in PyTorch what the exported graph will: `MeamPolicy` acts with it as with a policy folder.

    Args:
        networks: Networks in training; they are read at every run.
        spec: What the policy is.
    """

    def __init__(self, networks: MeamNetworks, spec: PolicySpec) -> None:
        self._networks, self.takes_prefix = networks, False
        self._device = next(networks.parameters()).device
        self._shape = (spec.chunk_size, spec.action_dim)
        numbers = (spec.action_offset, spec.action_scale, spec.action.low, spec.action.high)
        self._offset, self._scale, self._low, self._high = (
            torch.tensor(values, dtype=torch.float32, device=self._device) for values in numbers
        )

    @property
    def provider(self) -> str:
        """Where the networks are."""
        return f"torch, {self._device}"

    @torch.no_grad()
    def run_all(
        self,
        observation: NDArray[np.float32],
        noise: NDArray[np.float32],
        prefix: NDArray[np.float32] | None = None,
        prefix_weight: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Compute what the exported graph will: see `PolicySession.run_all`."""
        rows, draws = (torch.from_numpy(array).to(self._device) for array in (observation, noise))
        with self._networks.in_float32():
            x_1, values = self._networks.choose(self._networks.encoder(rows), draws)
        actions = self._offset + self._scale * x_1.reshape(-1, *self._shape)
        found = {"actions": torch.minimum(torch.maximum(actions, self._low), self._high)}
        if values is not None:
            found |= {"value": values.mean(dim=0), "disagreement": values.std(dim=0, correction=0)}
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}
