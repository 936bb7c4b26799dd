"""The observation encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["ObservationEncoder"]


class ObservationEncoder(nn.Module):
    """Normalises raw observations within a bound, and appends their random Fourier features.

    Args:
        mean: Mean of each observation component.
        std: Scale of each observation component.
        fourier_features: Number of features, cosines and sines together; 0 for none.
        fourier_scale: Standard deviation of the frequencies.
        limit: Bound on each number of the normalised observation; None for none.

    References:
        Tancik et al., Fourier Features Let Networks Learn High Frequency Functions, arXiv:2006.10739.
    """

    mean: Tensor
    std: Tensor
    frequencies: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        fourier_features: int = 0,
        fourier_scale: float = 1.0,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        self.limit = limit
        # Not persistent: the statistics are stored in the policy spec alone.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.register_buffer("frequencies", fourier_scale * torch.randn(len(mean), fourier_features // 2))

    @property
    def output_dim(self) -> int:
        """Dimension of an encoded observation."""
        return self.mean.numel() + 2 * self.frequencies.shape[1]

    def decode(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch obs"]:
        """Recover raw observations from encoded ones; those beyond the bound come back at it."""
        return features[..., : self.mean.numel()] * self.std + self.mean

    def forward(self, observation: Float[Tensor, "*batch obs"]) -> Float[Tensor, "*batch features"]:
        """Encode raw observations."""
        normalised = (observation - self.mean) / self.std
        if self.limit is not None:
            normalised = normalised.clamp(-self.limit, self.limit)
        if self.frequencies.shape[1] == 0:
            return normalised
        phase = normalised @ self.frequencies
        return torch.cat([normalised, torch.cos(phase), torch.sin(phase)], dim=-1)
