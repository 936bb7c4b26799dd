"""A film of one rollout as an animated image: `python -m meam_export.report.film POLICY_OR_RUN OUTPUT.webp SEED`.

Runs in a separate process: a machine that cannot render off-screen may abort the process instead of raising.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["render_film"]

TIME_LIMIT_S = 25.0
MAX_FRAMES = 60


def render_film(policy_or_run: Path, output: Path, seed: int, packages: Sequence[str] = ()) -> str | None:
    """Render one rollout in the environment that the policy was made for.

    Args:
        policy_or_run: Policy folder; or a run or a checkpoint, whose networks then act in PyTorch.
        output: WebP file to write.
        seed: Seed of the rollout.
        packages: Packages to import first, for their environments.

    Returns:
        None, or the reason why there is no film.
    """
    environment = {"MUJOCO_GL": "egl", **os.environ}
    named = [str(policy_or_run), str(output), str(seed), *packages]
    command = [sys.executable, "-m", "meam_export.report.film", *named]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=4 * TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"No film: rendering took longer than {4 * TIME_LIMIT_S:g} s on this machine."
    if done.returncode or not output.is_file():
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return (
            f"No film: {reason.rstrip('.')}. If this machine cannot render off-screen, on Debian: "
            "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri."
        )
    return None


def _record(policy_or_run: str, output: str, seed: int, packages: Sequence[str]) -> None:
    from PIL import Image

    from meam_export.report.acting import acting_policy
    from meam_policy.environments.make import import_packages, make_environment
    from meam_policy.errors import ConfigError

    import_packages(packages)
    policy = acting_policy(Path(policy_or_run))
    recorded = policy.spec.recorded_environment
    if recorded is None:
        raise ConfigError("The policy does not say which environment it is for.")
    env = make_environment(recorded.for_evaluation, render_mode="rgb_array")
    policy.reset(seed=seed)
    observation, _ = env.reset(seed=seed)
    if recorded.id.startswith("pointmaze"):
        _drop_shadows(env)
    frames, done, step = [], False, 0
    stride = 1 if ((env.spec and env.spec.max_episode_steps) or 1000) <= MAX_FRAMES else 4
    start = time.monotonic()
    while not done and len(frames) < MAX_FRAMES and time.monotonic() - start < TIME_LIMIT_S:
        if step % stride == 0:
            frames.append(Image.fromarray(env.render()))  # pyright: ignore[reportArgumentType]
        observation, _, terminated, truncated, _ = env.step(policy.act(observation))
        done, step = terminated or truncated, step + 1
    env.close()
    frames[0].save(output, save_all=True, append_images=frames[1:], duration=100, loop=0, quality=70)


def _drop_shadows(env: Any) -> None:
    """Turn off shadows: in software they take most of the rendering time and show nothing."""
    env.unwrapped.model.light_castshadow[:] = 0


if __name__ == "__main__":
    _record(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
