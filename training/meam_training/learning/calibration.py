"""Calibration of the critics: their values beside the discounted returns of the data, and beside what rewards allow.

A return is the discounted sum of the rewards from a row on. Where the recording was cut off after k steps, the rest is
unknown; the critics' own value of the policy at the last observation, times gamma^k, stands in for it. Rows for which
this tail weighs little are preferred, and its mean weight is logged: the larger it is, the less the returns know.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meam_policy.spec import PolicySpec
from meam_training.algorithm.critic_loss import td_target
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.data.discounted_returns import DiscountedReturns, discounted_returns
from meam_training.data.reward_offset import constant_returns
from meam_training.learning.chunk_source import HostChunks
from meam_training.networks.meam_networks import MeamNetworks

__all__ = ["CALIBRATION_METRICS", "Calibration", "value_limits"]

CALIBRATION_METRICS = (
    "calibration_correlation",
    "calibration_slope",
    "calibration_bias",
    "calibration_tail",
    "calibration_value",
    "policy_value",
    "value_gain",
    "value_spread",
    "td_bias",
    "td_reward",
    "calibration_return",
    "calibration_return_std",
    "return_floor",
    "return_ceiling",
    "return_largest",
    "return_smallest",
    "value_limit",
    "value_floor",
)
"""Names of the metrics; see `Calibration`."""

KNOWN_TAIL = 0.1
"""Largest weight of the unknown tail with which a return counts as known: rewards of one sign are then nine tenths
summed, and a row of an endless task is two time constants 1 / (1 - gamma) away from the cut."""

_SEED = 2_000_000
_MOST_ROWS, _BLOCKS = 4_000_000, 16
_DRAWN, _ROWS = 8192, 1024
_SPREAD_ROWS, _SPREAD_CHUNKS = 128, 8


def value_limits(dataset: OfflineDataset, discount: float) -> tuple[float, float]:
    """Least and largest value that any policy can have, if rewards stay within those of the data.

    An episode collects rewards of steps that do not end the task, and at most one of a step that does. Its return is
    thus a weighted mean of c / (1 - gamma) and e, for some rewards c and e of the two kinds, whenever it ends.

    Args:
        dataset: The data.
        discount: Discount per environment step, in (0, 1].

    Returns:
        The two limits; infinite without discount, if rewards have the sign for it.
    """
    ends = dataset.terminations
    limits = []
    for extreme, beyond in ((np.min, math.inf), (np.max, -math.inf)):
        # Without copies, as the data may exceed the memory; one of the two kinds may be missing.
        going, ending = (float(extreme(dataset.rewards, where=kind, initial=beyond)) for kind in (~ends, ends))
        if math.isfinite(going):
            going = going / (1 - discount) if discount < 1 else going * math.inf if going else 0.0
        limits.append(float(extreme([going, ending])) + 0.0)  # -0.0 is 0.0
    return limits[0], limits[1]


def _returns(dataset: OfflineDataset, discount: float) -> tuple[NDArray[np.int64], DiscountedReturns]:
    """Rows and their returns: all rows, or of large data sets those of some blocks, at whose ends returns are cut."""
    size = len(dataset)
    if size > _MOST_ROWS:
        size = _MOST_ROWS // _BLOCKS
    blocks = []
    for start in np.linspace(0, len(dataset) - size, 1 if size == len(dataset) else _BLOCKS).astype(int).tolist():
        part = slice(start, start + size)
        columns = (dataset.rewards[part], dataset.terminations[part], dataset.episode_ends[part])
        found = discounted_returns(*columns, discount)
        blocks.append((np.arange(start, start + size), *found[:2], found.last_rows + start))
    rows, *columns = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return rows, DiscountedReturns(*columns)


class Calibration:
    """Compares the critics with the returns of a fixed sample of the data, and with the policy's values.

    Q is the mean of the target critics, G the return of a row, gamma^k the weight of its tail (0 where the task ended).
    All chunks lie within one episode. Where G matters, rows of small tails are taken, else any rows.

    - calibration_correlation, calibration_slope: correlation of G with Q, and slope of the regression of G on Q; 1 for
      the values of the behaviour. Above 1, values differ less than the returns that they predict.
    - calibration_bias: mean of Q - G over the mean of 1 - gamma^k: the constant error of Q that explains the
      difference. Positive for a policy better than the data.
    - calibration_tail: mean of gamma^k, from 0 (all returns are known) to 1 (none is).
    - calibration_value: mean of Q at the data's chunks.
    - policy_value, value_gain: mean of Q at the policy's chunks, and minus that at the data's.
    - value_spread: standard deviation of Q over chunks of the prior for the same observation, mean over observations.
      Times the inverse temperature tau, it says how many nats tau Q moves.
    - td_bias, td_reward: mean of y - Q for the TD target y, and mean absolute reward of a chunk. Critics that have
      found their level have a td_bias near 0; critics that begin at 0 begin with one of the size of the rewards.
    - calibration_return, calibration_return_std: mean and standard deviation of G.
    - return_floor, return_ceiling: mean of the least and largest return that G's known rewards allow, with the tail at
      the limits of the values.
    - return_smallest, return_largest: over the data's rows with a tail of at most `KNOWN_TAIL`, if there are any.
    - value_limit, value_floor: largest and least value that rewards like those of the data allow; see `value_limits`.

    Args:
        dataset: The data.
        config: Settings of the run.
        spec: How actions are normalised.
        device: Device of the networks.

    Attributes:
        limits: The last two, which hold from the start.

    References:
        Cox, Two further applications of a model for binary regression, Biometrika 1958 (the calibration slope).
    """

    def __init__(self, dataset: OfflineDataset, config: TrainConfig, spec: PolicySpec, device: torch.device) -> None:
        self._config = config
        rows, found = _returns(dataset, config.discount)
        chunks = HostChunks(config, dataset, spec, device, with_returns=False)
        self._offset = chunks.offset
        drawn = np.random.default_rng(_SEED).choice(len(rows), min(_DRAWN, len(rows)), replace=False)
        # Chunks that end with their episode, or before; after a termination there is nothing to compare.
        drawn = drawn[found.last_rows[drawn] - rows[drawn] + 1 >= config.chunk_size]
        known = drawn[np.argsort(np.maximum(found.tails[drawn], KNOWN_TAIL), kind="stable")][:_ROWS]
        self._batch, self._known = chunks.at(rows[drawn[:_ROWS]]), chunks.at(rows[known])

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)

        # By how much a value is raised too little, or too much, by the mean of what was taken off the rewards.
        self._rest, self._rest_known = (tensor(self._raise(dataset, part)) for part in (drawn[:_ROWS], known))
        self._rest_last = 0.0
        if self._offset.constant and config.discount < 1:
            self._rest_last = self._offset.constant / (1 - config.discount) - self._offset.level
        self._returns, self._tails = tensor(found.returns[known]), tensor(found.tails[known])
        self._last_observations = tensor(dataset.next_observations[found.last_rows[known]])
        generator = torch.Generator(device).manual_seed(_SEED)
        act = self._batch.actions.shape[1]
        size = (len(known), config.best_of * act)
        self._noise, self._next_noise, self._last_noise = torch.randn((3, *size), generator=generator, device=device)
        spread = (_SPREAD_CHUNKS, min(_SPREAD_ROWS, len(known)), act)
        self._prior_noise = torch.randn(spread, generator=generator, device=device)
        low, high = value_limits(dataset, config.discount)
        tail = float(self._tails.mean())
        limits = {"value_limit": high, "value_floor": low}
        self.limits = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
        self._constants = {
            "calibration_tail": tail,
            "td_reward": float(self._batch.rewards.abs().mean()),
            "return_floor": float(self._returns.mean()) + (tail * low if tail else 0.0),
            "return_ceiling": float(self._returns.mean()) + (tail * high if tail else 0.0),
            **self.limits,
        }
        whole = found.returns[found.tails <= KNOWN_TAIL]
        if whole.size:
            self._constants |= {"return_smallest": float(whole.min()), "return_largest": float(whole.max())}

    def _raise(self, dataset: OfflineDataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        if not self._offset.constant:
            return np.zeros(len(rows))
        return self._offset.constant * constant_returns(dataset, self._config.discount)[rows] - self._offset.level

    @torch.no_grad()
    def __call__(self, networks: MeamNetworks) -> dict[str, Tensor]:
        """Compare the networks' values; draws no random numbers and changes nothing.

        Returns:
            Those of `CALIBRATION_METRICS` that are finite, scalars.
        """
        n, batch = networks, self._batch
        if not len(batch.actions):
            return {}
        known, last = n.encoder(self._known.observations), n.encoder(self._last_observations)
        value = n.values(known, self._known.actions).mean(dim=0) + self._rest_known
        features = n.encoder(batch.observations)
        at_data = n.values(features, batch.actions).mean(dim=0) + self._rest
        at_policy = n.values(features, n.act(features, self._noise)).mean(dim=0) + self._rest
        at_last = n.values(last, n.act(last, self._last_noise)).mean(dim=0) + self._rest_last
        returns = self._returns + self._tails * at_last
        some = features[: self._prior_noise.shape[1]].expand(len(self._prior_noise), -1, -1)
        chunks = n.flow(n.tilted_prior, some, self._prior_noise).clamp(-1, 1)
        spread = n.values(some.flatten(0, 1), chunks.flatten(0, 1)).mean(dim=0).view(some.shape[:2])
        target = td_target(n, batch, self._config, self._next_noise) + self._rest
        q, g = value - value.mean(), returns - returns.mean()
        found = {
            "calibration_correlation": (q * g).mean() / (q.square().mean() * g.square().mean()).sqrt(),
            "calibration_slope": (q * g).mean() / q.square().mean(),
            "calibration_bias": (value - returns).mean() / (1 - self._tails).mean(),
            "calibration_value": value.mean(),
            "policy_value": at_policy.mean(),
            "value_gain": (at_policy - at_data).mean(),
            "value_spread": spread.std(dim=0, correction=0).mean(),
            "td_bias": (target - at_data).mean(),
            "calibration_return": returns.mean(),
            "calibration_return_std": returns.std(correction=0),
            **{name: torch.tensor(value) for name, value in self._constants.items()},
        }
        return {name: value.cpu() for name, value in found.items() if value.isfinite()}
