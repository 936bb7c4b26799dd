"""Videos of episodes: `python -m meam_policy.environments.video ENV_ID` tries whether an environment can be drawn.

It is tried in a separate process: a machine that cannot render off-screen may abort the process instead of raising.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium

from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError, MissingExtraError, OutputError

__all__ = ["make_filmed_environment"]

TIME_LIMIT_S = 60.0
"""For making an environment and drawing it once."""


def make_filmed_environment(environment_id: str, folder: Path) -> gymnasium.Env[Any, Any]:
    """Make an environment that writes a video of every episode, by Gymnasium's `RecordVideo`.

    Args:
        environment_id: See `make_environment`.
        folder: New or empty folder of the videos, `rollout-episode-0.mp4` and so on. The last one is complete when the
            environment is closed.

    Raises:
        MissingExtraError: moviepy, which writes videos, is not installed.
        OutputError: the folder is not empty, or cannot be created.
        ConfigError: the environment cannot be drawn on this machine.
        NotFoundError: there is no such environment.
    """
    if importlib.util.find_spec("moviepy") is None:
        raise MissingExtraError("Videos need moviepy, which is not installed: pip install 'meam-policy[video]'.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"The folder {folder} cannot be made: {error.strerror}.") from error
    if taken:
        raise OutputError(f"The folder {folder} is not empty. Choose another one for the videos.")
    if sys.platform == "linux" and "mujoco" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a display; MuJoCo looks when it is imported
    _check_drawing(environment_id)
    env = make_environment(environment_id, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overwriting existing videos", category=UserWarning)
        return gymnasium.wrappers.RecordVideo(
            env, str(folder), episode_trigger=lambda _: True, name_prefix="rollout", disable_logger=True
        )


def _check_drawing(environment_id: str) -> None:
    make_environment(environment_id).close()  # for its own errors
    command = [sys.executable, "-m", "meam_policy.environments.video", environment_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"it took longer than {TIME_LIMIT_S:g} s"
    if reason is not None:
        raise ConfigError(
            f"{environment_id} cannot be drawn on this machine: {reason}. Leave the video out, or install what is "
            "missing (for MuJoCo on Debian: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri; and MUJOCO_GL=egl)."
        )


def _draw(environment_id: str) -> None:
    env = make_environment(environment_id, render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    if getattr(frame, "ndim", 0) != 3:
        sys.exit(f"render() gives {type(frame).__name__}, expected an image")


if __name__ == "__main__":
    _draw(sys.argv[1])
