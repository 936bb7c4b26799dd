"""Checks of a policy's observations and chunks, and limits on its actions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from meam_policy.acting.health import Health
from meam_policy.acting.observation import require_finite
from meam_policy.errors import ActionError, ConfigError, ObservationError
from meam_policy.robot.contract import RobotContract
from meam_policy.robot.limits import ActionLimits
from meam_policy.robot.vocabulary import ON_FAILURE
from meam_policy.spec import PolicySpec
from meam_policy.typed import shown, typed_fields

__all__ = ["Reaction", "SafetySettings", "SafetyShell", "require_finite_chunks"]

Reaction = Literal["raise", "hold", "neutral", "home"]
"""What to do instead of acting: raise an error; repeat the slot's last action; the neutral action, zero clipped into
the bounds; or the home pose of the robot's contract. The last two are approached no faster than the rate limit. Before
a slot's first action, "hold" takes the neutral one."""

_FEW = 48
"""Numbers of an observation up to which a loop in Python is faster than NumPy, in which every call takes time."""

Agreed = Literal["raise", "hold", "neutral", "home", "contract"]
"""A reaction, or the one that the robot's contract says."""


@dataclass(frozen=True)
class SafetySettings:
    """Settings of the safety shell, which is on by default.

    "contract" is what the robot's contract says, `timing.on_failure`. Where it does not, or there is none: an error for
    what is not finite; for what is unfamiliar "hold", or "neutral" where a repeated action is known to move on.

    Attributes:
        on_bad_observation: Reaction to NaN or infinity in an observation.
        on_bad_action: Reaction to NaN or infinity in the network's actions.
        on_unfamiliar: Reaction to an observation whose `unfamiliarity` is above the limit; None only counts it.
        unfamiliarity_limit: Largest distance of any observation number from its mean in the training data, in its
            standard deviations.
        rate_limit: Largest change of an action number from one step to the next, environment units: one number, or one
            for each; infinity for no limit. None takes what the robot's contract allows, or no limit without one. The
            first action of an episode is free.
    """

    on_bad_observation: Agreed = "contract"
    on_bad_action: Agreed = "contract"
    on_unfamiliar: Agreed | None = "contract"
    unfamiliarity_limit: float = 10.0
    rate_limit: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field is out of range.
        """
        typed_fields(self)
        for name in ("on_bad_observation", "on_bad_action", "on_unfamiliar"):
            value = getattr(self, name)
            choices = get_args(Agreed)
            if value not in choices and not (name == "on_unfamiliar" and value is None):
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
        limit = self.unfamiliarity_limit
        if not (isinstance(limit, (int, float)) and limit > 0):
            raise ConfigError(f"unfamiliarity_limit is {limit!r}; expected a number above 0, or inf for no limit.")
        rates = self.rate_limit if isinstance(self.rate_limit, Sequence) else [self.rate_limit]
        if self.rate_limit is not None and not (rates and all(rate is not None and rate > 0 for rate in rates)):
            raise ConfigError(
                f"rate_limit is {shown(self.rate_limit)}; expected a number above 0, one for each number of an action, "
                "or None for no limit."
            )


class SafetyShell:
    """Checks and limits of one policy's environment slots.

    Args:
        spec: Normalisation and bounds.
        settings: What to do.
        health: Counters to raise.
        robot: The robot's contract, of which limits, rates and reactions hold; None if there is none.

    Attributes:
        bounds_chunks: Whether `bound` leaves all that `bound_chunks` has bounded as it is.

    Raises:
        ConfigError: the rate limit does not fit the action, or a reaction is "home" where there is no home pose.
    """

    def __init__(
        self, spec: PolicySpec, settings: SafetySettings, health: Health, robot: RobotContract | None = None
    ) -> None:
        robot = robot or RobotContract()
        self._spec, self._settings, self._health = spec, settings, health
        self._reactions = _Reactions.of(settings, robot)
        self._mean = np.array(spec.observation_mean, dtype=np.float64)
        self._std = np.array(spec.observation_std, dtype=np.float64)
        self._statistics = self._mean.tolist(), self._std.tolist()
        self._familiar = min(settings.unfamiliarity_limit, sys.float_info.max)
        space = spec.action_space
        self._dtype = np.dtype(space.dtype)
        self._whole = self._dtype.kind != "f"
        # Without infinity, to which a large action of a float16 box would be rounded.
        self._low, self._high, *_ = ActionLimits.of(RobotContract(), spec)
        with np.errstate(over="ignore"):
            sides = [np.array(bounds).astype(np.float32) for bounds in (spec.action.low, spec.action.high)]
        # Finite, so that NaN and infinity are not within them; shaped like one chunk, which is twice as fast.
        self._chunk_bounds = [np.tile(np.nan_to_num(side), (1, spec.chunk_size, 1)) for side in sides]
        limits = ActionLimits.of(robot, spec)
        self._limits = (limits.low, limits.high) if robot.action else None
        low, high = (side[0, 0] for side in self._chunk_bounds)
        same = np.array_equal(low, self._low) and np.array_equal(high, self._high)
        self.bounds_chunks = same and self._limits is None
        self._neutral, self._home = np.clip(np.zeros(spec.action_dim), limits.low, limits.high), limits.home
        self._require_home()
        rate = limits.max_change if settings.rate_limit is None else _rate_limit(settings.rate_limit, spec.action_dim)
        self._rate = rate if np.isfinite(rate).any() else None
        self.reset()

    def _require_home(self) -> None:
        for name in ("on_bad_observation", "on_bad_action", "on_unfamiliar"):
            if getattr(self._reactions, name) == "home" and self._home is None:
                raise ConfigError(
                    f'{name} is "home"; expected another reaction, since no robot.json says where home is: a default '
                    "of every action."
                )

    def reset(self, mask: NDArray[np.bool_] | None = None) -> None:
        """Forget the last actions: of all slots, or of those with a true mask [slots]."""
        if mask is None:
            self._last = np.empty((0, self._neutral.size))
        elif len(self._last):
            self._last[mask] = np.nan

    def judge(self, rows: NDArray[np.float32], given: Any = None) -> dict[int, Reaction]:
        """Judge observations [slots, observation_dim].

        Args:
            rows: The observations.
            given: As they were given, for messages.

        Returns:
            What the slots do that must not act on theirs.

        Raises:
            ObservationError: a reaction is to raise.
        """
        largest = self._distance_of_one(rows) if rows.size <= _FEW and len(rows) == 1 else self._distance_of_all(rows)
        if largest <= self._familiar:  # false for NaN
            self._note(largest)
            return {}
        return self._judge_unusual(rows, given)

    def _distances(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """The unfamiliarity of observations [slots, observation_dim]: of each [slots]; NaN where one of them is NaN."""
        with np.errstate(all="ignore"):
            return np.abs((rows - self._mean) / self._std).max(axis=1)

    def _distance_of_all(self, rows: NDArray[np.float32]) -> float:
        distances = self._distances(rows)
        return distances.item(distances.argmax())  # a NaN counts as the largest

    def _distance_of_one(self, rows: NDArray[np.float32]) -> float:
        """The same of a single observation of few numbers, for which Python is faster than NumPy."""
        largest = 0.0
        for value, mean, std in zip(*rows.tolist(), *self._statistics, strict=True):
            distance = abs((value - mean) / std)
            if distance > largest:
                largest = distance
            elif distance != distance:
                return distance
        return largest

    def _note(self, unfamiliarity: float) -> None:
        health = self._health
        health.unfamiliarity = unfamiliarity
        if health.max_unfamiliarity is None or unfamiliarity > health.max_unfamiliarity:
            health.max_unfamiliarity = unfamiliarity

    def _judge_unusual(self, rows: NDArray[np.float32], given: Any) -> dict[int, Reaction]:
        reactions, health, distance = self._reactions, self._health, self._distances(rows)
        finite = np.isfinite(rows).all(axis=1)
        strange = finite & (distance > self._settings.unfamiliarity_limit)
        health.bad_observations += int((~finite).sum())
        health.unfamiliar += int(strange.sum())
        if finite.any():
            self._note(min(float(distance[finite].max()), sys.float_info.max))
        if reactions.on_bad_observation == "raise":
            require_finite(self._spec, rows, given)
        if reactions.on_unfamiliar == "raise" and strange.any():
            raise ObservationError(
                f"The observation is {health.unfamiliarity:.3g} standard deviations from the training data; expected "
                f"at most {self._settings.unfamiliarity_limit:g}. Check units and order of its numbers."
            )
        stopped: dict[int, Reaction] = dict.fromkeys((~finite).nonzero()[0].tolist(), reactions.on_bad_observation)
        if reactions.on_unfamiliar is not None:
            stopped |= dict.fromkeys(strange.nonzero()[0].tolist(), reactions.on_unfamiliar)
        return stopped

    def bound_chunks(self, chunks: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
        """Bring the finite numbers of chunks [k, chunk_size, action_dim] within the bounds, and count the chunks.

        Returns:
            The chunks, and whether all numbers are finite. What is not stays: it is no action that was merely too
            large.
        """
        low, high = self._chunk_bounds
        within = (chunks >= low) & (chunks <= high)
        if np.count_nonzero(within) == within.size:
            return chunks, True
        finite = np.isfinite(chunks)
        outside = finite & ~within
        self._health.out_of_bounds += int(outside.any(axis=(1, 2)).sum())
        return np.where(outside, np.clip(chunks, low, high), chunks), bool(finite.all())

    def check_chunks(self, slots: NDArray[np.intp], chunks: NDArray[np.float32]) -> dict[int, Reaction]:
        """Judge chunks [k, chunk_size, action_dim] of slots [k] that are not all finite.

        Returns:
            What the slots do whose chunk holds NaN or infinity.

        Raises:
            ActionError: the reaction is to raise.
        """
        bad = ~np.isfinite(chunks).all(axis=(1, 2))
        self._health.bad_actions += int(bad.sum())
        if self._reactions.on_bad_action == "raise":
            require_finite_chunks(chunks)
        return dict.fromkeys(slots[bad].tolist(), self._reactions.on_bad_action)

    def instead(self, stopped: Mapping[int, Reaction]) -> NDArray[np.float64]:
        """Actions [slots, action_dim] in place of the policy's, in the order of `stopped`."""
        self._health.replaced += len(stopped)
        return np.stack([self._action_of(how, slot) for slot, how in stopped.items()])

    def _action_of(self, reaction: Reaction, slot: int) -> NDArray[np.float64]:
        if reaction == "home":
            assert self._home is not None
            return self._home
        return self._held(slot) if reaction == "hold" else self._neutral

    def _held(self, slot: int) -> NDArray[np.float64]:
        acted = slot < len(self._last) and not np.isnan(self._last[slot, 0])
        return self._last[slot] if acted else self._neutral

    def limit(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Bring actions [slots, action_dim] within the bounds, the rate and the action box's type, and remember them.

        Returns:
            A fresh array [slots, action_dim].
        """
        bounded, held = self.bound(actions)
        limited = self.give(bounded)
        if held is not None:
            self._health.limited += int(held.sum())
        return limited

    def bound(self, actions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
        """Bring finite actions [..., action_dim] within the bounds, and within the limits of the contract.

        Returns:
            The actions, and which of them [...] the contract's limits changed; None without a contract. Bounded again,
            none changes.
        """
        if actions.dtype.itemsize <= 8:  # all but long doubles, which are limited as they are
            actions = actions.astype(np.float64, copy=False)
        # Clipped again: a float64 bound rounds outwards in the graph's float32.
        within = _clip(actions, self._low, self._high)
        if self._limits is None:
            return within, None
        limited = _clip(within, *self._limits)
        return limited, (limited != within).any(axis=-1)

    def begin(self, chunks: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """`bound` for finite chunks [k, chunk_size, action_dim] that `bound_chunks` has given."""
        return (chunks, None) if self.bounds_chunks else self.bound(chunks)

    def give(self, bounded: NDArray[np.float64]) -> NDArray[Any]:
        """Bring actions [slots, action_dim] that `bound` gave within the rate and the type, and remember them.

        Returns:
            Actions [slots, action_dim]; the given array itself where they are that already.
        """
        health, last = self._health, self._last
        if self._rate is None:
            limited = self._typed(bounded)
        else:
            limited, slowed = self._within_rate(bounded, last)
            health.rate_limited += slowed
        health.steps += len(limited)
        # As they are returned, so that the roundings of many steps do not add up to more than the rate.
        if len(last) == len(limited):
            last[...] = limited
        else:
            self._last = limited.astype(np.float64)
        return limited

    def preview(self, actions: NDArray[Any]) -> NDArray[Any]:
        """What `limit` would make of actions [ticks, action_dim] of one slot, tick by tick; nothing is remembered."""
        last, found = self._last, []
        for action in self.bound(actions)[0]:
            limited, _ = self._within_rate(action[None], last)
            last = limited.astype(np.float64)
            found.append(limited[0])
        return np.stack(found) if found else actions.astype(self._dtype)

    def _within_rate(self, bounded: NDArray[np.float64], last: NDArray[np.float64]) -> tuple[NDArray[Any], int]:
        """Bounded actions limited after these last ones, in the type, and how many were slowed."""
        limited, slowed = bounded, 0
        if self._rate is not None and len(last) == len(bounded):  # else another number of slots: a new beginning
            before = np.where(np.isnan(last), bounded, last)
            limited = _clip(bounded, before - self._rate, before + self._rate)
            slowed = int((limited != bounded).any(axis=1).sum())
        return self._typed(limited), slowed

    def _typed(self, limited: NDArray[Any]) -> NDArray[Any]:
        """Limited actions in the type of the action box."""
        return (np.rint(limited) if self._whole else limited).astype(self._dtype, copy=False)


def _clip(numbers: NDArray[Any], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same as np.clip, which takes three times as long."""
    return np.minimum(np.maximum(numbers, low), high)


def require_finite_chunks(chunks: NDArray[np.float32]) -> None:
    """Check that action chunks hold no NaN and no infinity.

    Raises:
        ActionError: one does.
    """
    if not np.isfinite(chunks).all():
        raise ActionError(
            "The policy produced NaN or infinity; no action is returned. "
            "The observation may be far outside the training data."
        )


class _Reactions(NamedTuple):
    """The reactions of `SafetySettings`, with the contract's, or the usual ones, in place of "contract"."""

    on_bad_observation: Reaction
    on_bad_action: Reaction
    on_unfamiliar: Reaction | None

    @classmethod
    def of(cls, settings: SafetySettings, robot: RobotContract) -> _Reactions:
        agreed = None if robot.timing.on_failure is None else ON_FAILURE[robot.timing.on_failure].reaction
        bad = agreed or "raise"
        unfamiliar = agreed or ("hold" if robot.stands_still else "neutral")
        return cls(
            bad if settings.on_bad_observation == "contract" else settings.on_bad_observation,
            bad if settings.on_bad_action == "contract" else settings.on_bad_action,
            unfamiliar if settings.on_unfamiliar == "contract" else settings.on_unfamiliar,
        )


def _rate_limit(limit: float | Sequence[float], action_dim: int) -> NDArray[np.float64]:
    rates = np.array(limit, dtype=np.float64)
    if rates.shape not in ((), (action_dim,)):
        raise ConfigError(f"rate_limit is {limit!r}; expected one number above 0, or {action_dim} of them.")
    return np.broadcast_to(rates, (action_dim,))
