"""Videos of episodes: `python -m meam_policy.environments.video JSON` tries whether an environment can be drawn.

It is tried in a separate process: a machine that cannot render off-screen may abort the process instead of raising.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium

from meam_policy.environments.make import import_packages, make_environment
from meam_policy.errors import ConfigError, OutputError
from meam_policy.extras import needs
from meam_policy.given_files import given_path
from meam_policy.spec import EnvironmentSpec

__all__ = ["make_filmed_environment"]

TIME_LIMIT_S = 60.0
"""For making an environment and drawing it once."""


def make_filmed_environment(
    environment: str | EnvironmentSpec, folder: Path, packages: Sequence[str] = (), **kwargs: Any
) -> gymnasium.Env[Any, Any]:
    """Make an environment that writes a video of every episode, by Gymnasium's `RecordVideo`.

    Args:
        environment: See `make_environment`.
        folder: New or empty folder of the videos, `rollout-episode-0.mp4` and so on. The last one is complete when the
            environment is closed.
        packages: Packages that register their environments when they are imported; the caller has imported them.
        **kwargs: See `make_environment`.

    Raises:
        MissingExtraError: moviepy, which writes videos, is not installed.
        OutputError: the folder is not empty, or cannot be created.
        ConfigError: the environment cannot be drawn on this machine.
        NotFoundError: there is no such environment.
    """
    folder = given_path("video", folder)
    with needs("Filming", "moviepy", "video"):
        importlib.import_module("moviepy")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"The folder {folder} cannot be made: {error.strerror}.") from error
    if taken:
        raise OutputError(f"The folder {folder} is not empty. Choose another one for the videos.")
    if sys.platform == "linux" and "mujoco" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a display; MuJoCo looks when it is imported
    spec = EnvironmentSpec(environment) if isinstance(environment, str) else environment
    _check_drawing(spec, packages, kwargs)
    env = make_environment(spec, **kwargs, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overwriting existing videos", category=UserWarning)
        return gymnasium.wrappers.RecordVideo(
            env, str(folder), episode_trigger=lambda _: True, name_prefix="rollout", disable_logger=True
        )


def _check_drawing(environment: EnvironmentSpec, packages: Sequence[str], kwargs: dict[str, Any]) -> None:
    make_environment(environment, **kwargs).close()  # for its own errors
    asked = json.dumps([environment.to_json(), list(packages), kwargs])
    command = [sys.executable, "-m", "meam_policy.environments.video", asked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"it took longer than {TIME_LIMIT_S:g} s"
    if reason is not None:
        raise ConfigError(
            f"{environment.id} cannot be drawn on this machine: {reason}. Leave the video out, or install what is "
            "missing (for MuJoCo on Debian: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri; and MUJOCO_GL=egl)."
        )


def _draw(asked: str) -> None:
    recorded, packages, kwargs = json.loads(asked)
    import_packages(packages)
    env = make_environment(EnvironmentSpec.from_json(recorded), **kwargs, render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    if getattr(frame, "ndim", 0) != 3:
        sys.exit(f"render() gives {type(frame).__name__}, expected an image")


if __name__ == "__main__":
    _draw(sys.argv[1])
