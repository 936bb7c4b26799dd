"""A rendered rollout as an animated image: `python -m meam_export.demo.video POLICY ENV_ID OUTPUT.webp SEED`.

Runs in a separate process: a machine that cannot render off-screen may abort the process instead of raising.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["render_video"]

TIME_LIMIT_S = 25.0
MAX_FRAMES = 60


def render_video(policy: Path, env_id: str, output: Path, seed: int) -> str | None:
    """Render one rollout of a policy.

    Args:
        policy: Policy folder.
        env_id: Environment to act in.
        output: WebP file to write.
        seed: Seed of the rollout.

    Returns:
        None, or the reason why there is no video.
    """
    environment = {"MUJOCO_GL": "egl", **os.environ}
    command = [sys.executable, "-m", "meam_export.demo.video", str(policy), env_id, str(output), str(seed)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=4 * TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"No video: rendering took longer than {4 * TIME_LIMIT_S:g} s on this machine."
    if done.returncode or not output.is_file():
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return (
            f"No video: {reason.rstrip('.')}. If this machine cannot render off-screen, on Debian: "
            "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri."
        )
    return None


def _record(policy_folder: str, env_id: str, output: str, seed: int) -> None:
    from PIL import Image

    from meam_policy import MeamPolicy, make_environment

    policy = MeamPolicy.from_pretrained(policy_folder)
    env = make_environment(env_id, render_mode="rgb_array")
    policy.reset(seed=seed)
    observation, _ = env.reset(seed=seed)
    if env_id.startswith("pointmaze"):
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


def _drop_shadows(env) -> None:
    """Turn off shadows: in software they take most of the rendering time and show nothing."""
    env.unwrapped.model.light_castshadow[:] = 0


if __name__ == "__main__":
    _record(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
