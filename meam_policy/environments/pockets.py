"""Pockets: a ball among four pockets of unequal value, on which imitation is not enough.

The ball slides in a square arena, pushed by two motors. A pocket pays its value at every control step that ends
with the ball inside it, but does not hold the ball: the policy has to brake, and to keep it there.

                      north 1.0
                   post       post
            west 0.4    start    east 0.4
                   post       post
                      south 0.2

Demonstrations that go west or east and seldom north are a hard case twice over: their average rolls nowhere, for
nothing lies between west and east, and only a critic can tell that the rare ones were the better ones.

Only `PocketsEnv` needs MuJoCo; the constants are importable without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from meam_policy.errors import ActionError, ConfigError
from meam_policy.extras import needs

__all__ = ["ARENA_HALF_WIDTH", "BALL_RADIUS", "POCKETS", "POCKET_RADIUS", "POSTS", "POST_RADIUS", "PocketsEnv"]


class Pocket(NamedTuple):
    """A disc around `centre` (metres) that pays `value` per control step while the ball's centre is inside it."""

    centre: tuple[float, float]
    value: float


POCKETS: Final[Mapping[str, Pocket]] = {
    "west": Pocket((-0.65, 0.0), 0.4),
    "east": Pocket((0.65, 0.0), 0.4),
    "north": Pocket((0.0, 0.65), 1.0),
    "south": Pocket((0.0, -0.65), 0.2),
}
"""The four pockets by name. They keep clear of the walls, so that leaning on a wall does not earn."""

POSTS: Final = ((-0.45, -0.45), (-0.45, 0.45), (0.45, -0.45), (0.45, 0.45))
"""Centres of the cylinders that the ball has to go around; metres."""

POCKET_RADIUS: Final = 0.17  # metres, as all lengths here
POST_RADIUS: Final = 0.1
BALL_RADIUS: Final = 0.06
ARENA_HALF_WIDTH: Final = 1.0

_MOST_VALUABLE = max(POCKETS, key=lambda name: POCKETS[name].value)
_START_HALF_WIDTH = 0.05
# Metres and metres per second; a motor alone reaches _FORCE / _DAMPING = 2.7 m/s.
_STATE_BOUNDS = np.array([ARENA_HALF_WIDTH, ARENA_HALF_WIDTH, 3.0, 3.0], np.float32)
_TIMESTEP = 0.005  # seconds
_FRAME_SKIP = 20  # makes a control step of 0.1 s
_MASS = 1.0  # kilograms
_DAMPING = 1.5  # newtons per metre per second
_FORCE = 4.0  # newtons at a command of 1

# One hue that deepens with the value, so that the picture shows the rewards.
_CREAM, _AMBER, _VERMILION = "0.98 0.9 0.68 1", "0.98 0.76 0.38 1", "0.93 0.33 0.13 1"
_POCKET_COLOURS = {"west": _AMBER, "east": _AMBER, "north": _VERMILION, "south": _CREAM}


def _model_xml() -> str:
    """Describe the arena in MuJoCo's XML, from the constants above."""
    edge = ARENA_HALF_WIDTH + 0.03
    sides = ((-edge, 0, 90), (edge, 0, 90), (0, -edge, 0), (0, edge, 0))
    walls = "".join(f'<geom class="wall" pos="{x} {y} 0.04" euler="0 0 {angle}"/>' for x, y, angle in sides)
    posts = "".join(f'<geom class="post" pos="{x} {y} 0.05"/>' for x, y in POSTS)
    pockets = "".join(
        f'<site class="pocket" pos="{pocket.centre[0]} {pocket.centre[1]} 0.001" rgba="{_POCKET_COLOURS[name]}"/>'
        for name, pocket in POCKETS.items()
    )
    return f"""
<mujoco model="pockets">
  <option timestep="{_TIMESTEP}" gravity="0 0 0"/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <headlight ambient="0.5 0.5 0.5" diffuse="0.2 0.2 0.2" specular="0 0 0"/>
  </visual>
  <default>
    <geom friction="0 0 0" solref="0.01 1"/>
    <motor gear="{_FORCE}" ctrllimited="true" ctrlrange="-1 1"/>
    <default class="wall"><geom type="box" size="{edge + 0.03} 0.03 0.04" rgba="0.62 0.65 0.7 1"/></default>
    <default class="post"><geom type="cylinder" size="{POST_RADIUS} 0.05" rgba="0.2 0.23 0.29 1"/></default>
    <default class="pocket"><site type="cylinder" size="{POCKET_RADIUS} 0.001"/></default>
  </default>
  <worldbody>
    <camera name="top" pos="0 0 6.3" fovy="20"/>
    <light pos="-1 1 4" dir="1 -1 -4" directional="true" castshadow="false" diffuse="0.3 0.3 0.3" specular="0 0 0"/>
    <geom type="plane" size="4 4 1" rgba="0.97 0.97 0.95 1" contype="0" conaffinity="0"/>
    {walls}{posts}{pockets}
    <body pos="0 0 {BALL_RADIUS}">
      <joint name="x" type="slide" axis="1 0 0" damping="{_DAMPING}"/>
      <joint name="y" type="slide" axis="0 1 0" damping="{_DAMPING}"/>
      <geom type="sphere" size="{BALL_RADIUS}" mass="{_MASS}" rgba="0.13 0.4 0.75 1"/>
    </body>
  </worldbody>
  <actuator><motor joint="x"/><motor joint="y"/></actuator>
</mujoco>"""


def _load_mujoco() -> ModuleType:
    """Import MuJoCo when an environment first needs it."""
    with needs("meam/Pockets-v0", "mujoco", "mujoco"):
        import mujoco
    return mujoco


class PocketsEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Steer a ball into a pocket and keep it there.

    Observation: x, y (metres) and their velocities (metres per second), float32, clipped to the space's bounds.
    Action: force along x and y as a fraction of the motors' strength, in [-1, 1]; larger commands saturate.
    Reward: the value of the pocket that holds the ball after the control step, else 0.
    Episode: never terminates; the registered `meam/Pockets-v0` truncates it after 20 control steps of 0.1 s.
    Info: `pocket`, a name or "none", and `success`, whether it is the most valuable one.

    `reset(options={"position": (x, y)})` puts the ball at rest at that place instead of near the centre.

    Args:
        render_mode: "rgb_array", or None, which needs no graphics library.
        size: side of the rendered square, pixels; at most 1024.

    Raises:
        MissingExtraError: MuJoCo is not installed.
        ConfigError: unknown render mode, or size out of range.

    Example:
        >>> import gymnasium
        >>> import meam_policy
        >>> env = gymnasium.make("meam/Pockets-v0")
        >>> observation, info = env.reset(options={"position": (0.0, 0.65)})
        >>> info
        {'pocket': 'north', 'success': True}
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        >>> reward
        1.0
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, size: int = 240) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f'render_mode is {render_mode!r}, expected "rgb_array" or None.')
        if not 1 <= size <= 1024:
            raise ConfigError(f"size is {size}, expected 1 to 1024 pixels.")
        mujoco = _load_mujoco()
        self.observation_space = spaces.Box(-_STATE_BOUNDS, _STATE_BOUNDS)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.render_mode = render_mode
        self._size = size
        self._model = mujoco.MjModel.from_xml_string(_model_xml())
        self._data = mujoco.MjData(self._model)
        self._renderer: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Put the ball at rest near the centre, or where the options say.

        Args:
            seed: reseeds the generator that draws the start; None goes on with the present one.
            options: may hold `position`, x and y of the ball's centre; metres. Other keys are ignored.

        Returns:
            The observation [4] and the info.

        Raises:
            ConfigError: the position is not two numbers, or the ball does not fit there.
        """
        super().reset(seed=seed)
        if options and "position" in options:
            position = _free_position(options["position"])
        else:
            position = self.np_random.uniform(-_START_HALF_WIDTH, _START_HALF_WIDTH, 2)
        mujoco = _load_mujoco()
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = position
        mujoco.mj_forward(self._model, self._data)
        return self._observation(), self._info()

    def step(self, action: ArrayLike) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Hold a motor command for one control step, 0.1 s.

        Args:
            action: force fractions [2]; beyond [-1, 1] they saturate.

        Returns:
            The observation [4], the reward, False, False (only a time limit ends an episode) and the info.

        Raises:
            ActionError: the action is not two finite numbers.
        """
        command = np.asarray(action, np.float64)
        if command.shape != (2,) or not np.isfinite(command).all():
            raise ActionError(f"Action is {action}, expected two finite numbers in [-1, 1].")
        self._data.ctrl[:] = command
        _load_mujoco().mj_step(self._model, self._data, nstep=_FRAME_SKIP)
        info = self._info()
        reward = POCKETS[info["pocket"]].value if info["pocket"] in POCKETS else 0.0
        return self._observation(), reward, False, False, info

    def render(self) -> NDArray[np.uint8] | None:
        """Draw the arena from above: an image [size, size, 3], or None without a render mode."""
        if self.render_mode is None:
            gymnasium.logger.warn('render() without a render mode draws nothing; make the env with "rgb_array".')
            return None
        if self._renderer is None:
            self._renderer = _load_mujoco().Renderer(self._model, self._size, self._size)
        self._renderer.update_scene(self._data, camera="top")
        return self._renderer.render()

    def close(self) -> None:
        """Release the renderer. Calling it again changes nothing."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _observation(self) -> NDArray[np.float32]:
        state = np.concatenate([self._data.qpos, self._data.qvel]).astype(np.float32)
        return np.clip(state, -_STATE_BOUNDS, _STATE_BOUNDS)

    def _info(self) -> dict[str, Any]:
        distances = {name: np.hypot(*(self._data.qpos - pocket.centre)) for name, pocket in POCKETS.items()}
        pocket = next((name for name, distance in distances.items() if distance <= POCKET_RADIUS), "none")
        return {"pocket": pocket, "success": pocket == _MOST_VALUABLE}


def _free_position(position: ArrayLike) -> NDArray[np.float64]:
    """Check that the ball fits at a position [2], metres, between the walls and the posts."""
    place = np.asarray(position, np.float64)
    limit, gap = ARENA_HALF_WIDTH - BALL_RADIUS, POST_RADIUS + BALL_RADIUS
    between_walls = place.shape == (2,) and bool((np.abs(place) <= limit).all())
    if not between_walls or any(np.hypot(*(place - post)) < gap for post in POSTS):
        expected = f"x and y in [-{limit}, {limit}] metres and at least {gap} metres from each of the posts {POSTS}"
        raise ConfigError(f"position is {position}, expected {expected}.")
    return place
