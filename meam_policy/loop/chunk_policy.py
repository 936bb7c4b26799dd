"""The interface that a control loop needs of a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ConfigError
from meam_policy.robot import RobotContract
from meam_policy.spec import PolicySpec

__all__ = ["ChunkPolicy", "PolicyChecks", "UncheckedPolicy", "checks_of"]


class UncheckedPolicy(Protocol):
    """A policy that neither judges observations nor limits actions: a control loop takes it with `unchecked=True`."""

    @property
    def spec(self) -> PolicySpec:
        """What the policy is."""
        ...

    def predict_action_chunk(
        self,
        observation: Any,
        *,
        prefix: NDArray[np.float32] | None = None,
        prefix_weight: NDArray[np.float32] | None = None,
    ) -> NDArray[Any]:
        """Sample one chunk [chunk_size, action_dim], in environment units and within the action bounds.

        Args:
            observation: One observation.
            prefix: Actions [chunk_size, action_dim] that the chunk must continue, in environment units.
            prefix_weight: How strongly it must equal each of them [chunk_size], 0 (not at all) to 1.
        """
        ...

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode."""
        ...


class ChunkPolicy(UncheckedPolicy, Protocol):
    """A policy whose safety settings hold in a control loop too, such as `MeamPolicy`.

    A wrapper passes `takes_prefix`, `accepts` and `limit_action` on to the policy inside it, and `robot`, without which
    there is no robot's contract, and `preview_actions`, without which `ControlLoop.plan` is not limited; and
    `last_noise`, without which a recording cannot be replayed. None of the methods may wait for an inference.
    """

    @property
    def takes_prefix(self) -> bool:
        """Whether `predict_action_chunk` takes a prefix, as `chunking="realtime"` needs it."""
        ...

    def accepts(self, observation: Any) -> bool:
        """Judge the observation of a tick; false if no action may come of it.

        Raises:
            ObservationError: it does not fit, or is to end the episode.
        """
        ...

    def limit_action(self, action: NDArray[Any]) -> NDArray[Any]:
        """The action to execute in place of one that the loop has chosen, shaped and typed like it."""
        ...


class PolicyChecks(NamedTuple):
    """What of a policy belongs to a control loop rather than to an inference; see `ChunkPolicy`."""

    takes_prefix: bool
    accepts: Callable[[Any], bool]
    limit_action: Callable[[NDArray[Any]], NDArray[Any]]
    preview_actions: Callable[[NDArray[Any]], NDArray[Any]]
    robot: RobotContract | None


def checks_of(policy: ChunkPolicy | UncheckedPolicy, unchecked: bool) -> PolicyChecks:
    """Take from a policy what `ChunkPolicy` has beyond `UncheckedPolicy`.

    Args:
        policy: The policy that is to act.
        unchecked: Do without what it lacks: then it takes no prefix, every observation is accepted, and no action is
            limited.

    Raises:
        ConfigError: it lacks something.
    """
    if not (hasattr(policy, "spec") and hasattr(policy, "predict_action_chunk")):
        raise ConfigError(
            f"The policy is a {type(policy).__name__}; expected a MeamPolicy, or another with spec and "
            "predict_action_chunk."
        )
    needed = [name for name in PolicyChecks._fields if name not in ("robot", "preview_actions")]
    missing = [name for name in needed if not hasattr(policy, name)]
    if missing and not unchecked:
        name = type(policy).__name__
        raise ConfigError(
            f"{name} has no {', '.join(missing)}; expected all of ChunkPolicy, without which neither observations are "
            f"checked nor actions limited. If it wraps a policy, pass them on to that one; or pass unchecked=True."
        )
    return PolicyChecks(
        takes_prefix=bool(getattr(policy, "takes_prefix", False)),
        accepts=getattr(policy, "accepts", lambda _observation: True),
        limit_action=getattr(policy, "limit_action", np.asarray),
        preview_actions=getattr(policy, "preview_actions", np.asarray),
        robot=getattr(policy, "robot", None),
    )
