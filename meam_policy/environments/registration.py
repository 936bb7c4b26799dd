"""Environments that come with the package; importing `meam_policy` registers them with Gymnasium."""

from gymnasium.envs.registration import register, registry

__all__ = ["register_environments"]


def register_environments() -> None:
    """Register `meam/Pockets-v0` with Gymnasium. Calling it again changes nothing."""
    if "meam/Pockets-v0" not in registry:
        register(
            id="meam/Pockets-v0",
            entry_point="meam_policy.environments.pockets:PocketsEnv",
            max_episode_steps=20,
        )
