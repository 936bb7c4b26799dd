import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from meam_policy import ConfigError, NotFoundError
from meam_policy.environments.vector_environment import open_vector_environment


@pytest.mark.parametrize("asynchronous", [False, True])
def test_environments_are_those_of_the_name_and_closed_at_the_end(asynchronous):
    with open_vector_environment("Pendulum-v1", 2, asynchronous=asynchronous) as env:
        assert isinstance(env, AsyncVectorEnv if asynchronous else SyncVectorEnv)
        assert env.metadata["autoreset_mode"] == AutoresetMode.DISABLED
        observation, _ = env.reset(seed=3)
        with gymnasium.make("Pendulum-v1") as single:
            for slot in range(2):
                np.testing.assert_array_equal(observation[slot], single.reset(seed=3 + slot)[0])
    assert env.closed


@pytest.mark.slow
def test_name_that_gymnasium_does_not_have_registered_in_a_new_process_is_made_there():
    pytest.importorskip("mujoco")
    with open_vector_environment("meam/Pockets-v0", 2, asynchronous=True) as env:
        assert env.reset(seed=0)[0].shape == (2, 4)


def nothing_under_way(env):
    del env


def step_under_way(env):
    env.step_async(env.action_space.sample())


def step_half_answered(env):
    env.step_async(env.action_space.sample())
    env.parent_pipes[0].recv()


@pytest.mark.slow
@pytest.mark.parametrize("begin", [nothing_under_way, step_under_way, step_half_answered])
def test_interrupt_ends_the_processes_quietly_whatever_is_under_way(capfd, begin):
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        open_vector_environment("Pendulum-v1", 2, asynchronous=True) as env,
    ):
        env.reset(seed=0)
        begin(env)
        raise KeyboardInterrupt
    assert isinstance(env, AsyncVectorEnv)
    assert env.closed
    assert not any(process.is_alive() for process in env.processes)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_mistakes_are_told_before_a_process_starts(asynchronous):
    with (
        pytest.raises(NotFoundError, match="Did you mean"),
        open_vector_environment("Pendulum-v", 2, asynchronous=asynchronous),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="num_envs is 0"),
        open_vector_environment("Pendulum-v1", 0, asynchronous=asynchronous),
    ):
        pass
