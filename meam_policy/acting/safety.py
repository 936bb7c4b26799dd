"""Checks of a policy's observations and chunks, and limits on its actions."""

from __future__ import annotations

import math
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

    Raises:
        ConfigError: the rate limit does not fit the action, or a reaction is "home" where there is no home pose.
    """

    def __init__(
        self, spec: PolicySpec, settings: SafetySettings, health: Health, robot: RobotContract | None = None
    ) -> None:
        robot = robot or RobotContract()
        self._spec, self._settings, self._health = spec, settings, health
        self._reactions = _Reactions.of(settings, robot)
        self._mean = np.array(spec.observation_mean)
        self._std = np.array(spec.observation_std)
        self._familiar = min(settings.unfamiliarity_limit, sys.float_info.max)
        space = spec.action_space
        self._dtype = np.dtype(space.dtype)
        # Without infinity, to which a large action of a float16 box would be rounded.
        self._low, self._high, *_ = ActionLimits.of(RobotContract(), spec)
        with np.errstate(over="ignore"):
            self._chunk_bounds = [np.array(bounds).astype(np.float32) for bounds in (spec.action.low, spec.action.high)]
        limits = ActionLimits.of(robot, spec)
        self._limits = (limits.low, limits.high) if robot.action else None
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
        with np.errstate(all="ignore"):
            distance = np.abs((rows - self._mean) / self._std)
        largest = distance.item(distance.argmax())  # a NaN counts as the largest
        if largest > self._familiar or math.isnan(largest):
            return self._judge_unusual(rows, distance.max(axis=1), given)
        self._note(largest)
        return {}

    def _note(self, unfamiliarity: float) -> None:
        health = self._health
        health.unfamiliarity = min(unfamiliarity, sys.float_info.max)
        if health.max_unfamiliarity is None or health.unfamiliarity > health.max_unfamiliarity:
            health.max_unfamiliarity = health.unfamiliarity

    def _judge_unusual(
        self, rows: NDArray[np.float32], distance: NDArray[np.float64], given: Any
    ) -> dict[int, Reaction]:
        reactions, health = self._reactions, self._health
        finite = np.isfinite(rows).all(axis=1)
        strange = finite & (distance > self._settings.unfamiliarity_limit)
        health.bad_observations += int((~finite).sum())
        health.unfamiliar += int(strange.sum())
        if finite.any():
            self._note(float(distance[finite].max()))
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

    def bound_chunks(self, chunks: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bring the finite numbers of chunks [k, chunk_size, action_dim] within the bounds, and count the chunks.

        What is not finite stays: it is no action that was merely too large.
        """
        low, high = self._chunk_bounds
        outside = ((chunks < low) | (chunks > high)) & np.isfinite(chunks)
        if not outside.any():
            return chunks
        self._health.out_of_bounds += int(outside.any(axis=(1, 2)).sum())
        return np.where(outside, np.clip(chunks, low, high), chunks)

    def check_chunks(self, slots: NDArray[np.intp], chunks: NDArray[np.float32]) -> dict[int, Reaction]:
        """Judge the chunks [k, chunk_size, action_dim] of slots [k].

        Returns:
            What the slots do whose chunk holds NaN or infinity.

        Raises:
            ActionError: the reaction is to raise.
        """
        finite = np.isfinite(chunks)
        if finite.all():
            return {}
        bad = ~finite.all(axis=(1, 2))
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
        limited, held, slowed = self._within(actions, self._last)
        self._health.limited += held
        self._health.rate_limited += slowed
        # As they are returned, so that the roundings of many steps do not add up to more than the rate.
        self._last = limited.astype(np.float64)
        self._health.steps += len(limited)
        return limited

    def preview(self, actions: NDArray[Any]) -> NDArray[Any]:
        """What `limit` would make of actions [ticks, action_dim] of one slot, tick by tick; nothing is remembered."""
        last, found = self._last, []
        for action in actions:
            limited, *_ = self._within(action[None], last)
            last = limited.astype(np.float64)
            found.append(limited[0])
        return np.stack(found) if found else actions.astype(self._dtype)

    def _within(self, actions: NDArray[Any], last: NDArray[np.float64]) -> tuple[NDArray[Any], int, int]:
        """Actions limited after these last ones, and how many were held by the contract's limits, and slowed."""
        # Clipped again: a float64 bound rounds outwards in the graph's float32.
        limited, held, slowed = np.minimum(np.maximum(actions, self._low), self._high), 0, 0
        if self._limits is not None:
            within, limited = limited, np.clip(limited, *self._limits)
            held = int((limited != within).any(axis=1).sum())
        if self._rate is not None and len(last) == len(actions):  # else another number of slots: a new beginning
            fast, before = limited, np.where(np.isnan(last), limited, last)
            limited = np.clip(fast, before - self._rate, before + self._rate)
            slowed = int((limited != fast).any(axis=1).sum())
        if self._dtype.kind != "f":
            limited = np.rint(limited)
        return limited.astype(self._dtype, copy=False), held, slowed


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
