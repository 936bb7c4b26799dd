"""The noise of a policy: one random stream for every environment slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NoiseStreams"]


class NoiseStreams:
    """Standard normal draws, with a separate random stream for every slot.

    What happens in one environment never changes the noise of another. The streams begin unseeded: call `reseed` for
    noise that can be repeated.

    Args:
        size: Numbers in the noise of one decision.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._seeds = np.random.SeedSequence()
        self._generators: list[np.random.Generator] = []

    def reseed(self, seeds: int | Sequence[int] | None, mask: NDArray[np.bool_] | None = None) -> None:
        """Begin streams anew.

        Args:
            seeds: Seed from which every slot gets its stream, 0 or more; a sequence has one for each slot, which then
                draws what a single slot with that seed would draw. None leaves all streams as they are.
            mask: Slots [slots] to reseed; None for all.
        """
        if seeds is None:
            return
        if isinstance(seeds, Sequence):
            streams = [np.random.SeedSequence(seed).spawn(1)[0] for seed in seeds]
        elif mask is not None:
            streams = np.random.SeedSequence(seeds).spawn(len(mask))
        else:
            self._seeds, self._generators = np.random.SeedSequence(seeds), []
            return
        for slot, stream in enumerate(streams):
            self._generator(slot)
            if mask is None or mask[slot]:
                self._generators[slot] = np.random.default_rng(stream)

    def draw(self, slots: NDArray[np.intp], scale: float = 1.0) -> NDArray[np.float32]:
        """Draw noise for slots [k], each from its stream: [k, size].

        Args:
            slots: The slots.
            scale: What the draws are multiplied by, 0 to 1. For 0 nothing is drawn.
        """
        if scale == 0:
            return np.zeros((len(slots), self._size), dtype=np.float32)
        if len(slots) == 1:
            return self._drawn(int(slots[0]), 1, scale)
        draws = np.empty((len(slots), self._size), dtype=np.float32)
        for row, slot in zip(draws, slots.tolist(), strict=True):
            self._generator(slot).standard_normal(dtype=np.float32, out=row)
        return _scaled(draws, scale)

    def draw_rows(self, rows: int, scale: float = 1.0) -> NDArray[np.float32]:
        """Draw noise [rows, size], all of it from the stream of the first slot; `scale` as in `draw`."""
        if scale == 0:
            return np.zeros((rows, self._size), dtype=np.float32)
        return self._drawn(0, rows, scale)

    def _drawn(self, slot: int, rows: int, scale: float) -> NDArray[np.float32]:
        return _scaled(self._generator(slot).standard_normal((rows, self._size), np.float32), scale)

    def _generator(self, slot: int) -> np.random.Generator:
        while len(self._generators) <= slot:
            self._generators.append(np.random.default_rng(self._seeds.spawn(1)[0]))
        return self._generators[slot]


def _scaled(draws: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    return draws if scale == 1 else draws * np.float32(scale)
