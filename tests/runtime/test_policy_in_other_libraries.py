"""A policy in the hands of the libraries that people act and evaluate with."""

import re
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meam_policy import BoxSpec, ObservationError, SpaceError, rollout

PENDULUM = BoxSpec.from_space(spaces.Box(np.array([-1, -1, -8], np.float32), np.array([1, 1, 8], np.float32)))
TORQUE = BoxSpec((1,), "float32", (-2.0,), (2.0,))


class Corridor(gymnasium.Env):
    """Ends after `length` steps; starts somewhere new each time, and rewards the action by where it is taken."""

    def __init__(self, length=5):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.length, self.episode = length, 0
        self.seen, self.taken = [], []

    def observe(self):
        return np.array([self.steps, self.episode % 7, 1], np.float32) / 4

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.seen.append(self.observe())
        self.taken.append(np.array(action))
        self.steps += 1
        reward = float(action[0] * self.steps - action[1])
        return self.observe(), reward, self.steps == self.length, False, {}


def executed(linear, corridor):
    """The actions that 3 steps of every chunk make in the corridor's episodes."""
    step = np.arange(len(corridor.seen)) % corridor.length
    chunks = linear.chunks(corridor.seen)
    return [chunks[number - k % 3, k % 3] for number, k in enumerate(step)]


@pytest.fixture
def linear(make_policy):
    """Executes 3 of 4 actions a chunk, so that episodes of 5 steps end in the middle of one."""
    return make_policy(execute_steps=3)


@pytest.fixture
def swinger(make_policy):
    return make_policy(observation=[PENDULUM], action=TORQUE, execute_steps=3)


@pytest.fixture(scope="module")
def sb3():
    return pytest.importorskip("stable_baselines3.common.evaluation")


@pytest.fixture(scope="module")
def vec_env():
    return pytest.importorskip("stable_baselines3.common.vec_env").DummyVecEnv


@pytest.fixture(scope="module")
def monitor():
    return pytest.importorskip("stable_baselines3.common.monitor").Monitor


def test_evaluate_policy_returns_what_rollout_returns(sb3, monitor, swinger):
    env = monitor(gymnasium.make("Pendulum-v1"))
    env.reset(seed=3)
    returns, lengths = sb3.evaluate_policy(
        swinger.load(noise_scale=0), env, n_eval_episodes=1, deterministic=True, return_episode_rewards=True
    )
    policy = swinger.load(noise_scale=0)
    # evaluate_policy resets without a seed, so its episode is the second one after reset(seed=3).
    plain = gymnasium.make("Pendulum-v1")
    plain.reset(seed=3)
    ours = rollout(policy, Reseeded(plain), 1, 0)
    assert lengths == [200]
    assert ours.returns[0] == pytest.approx(returns[0], abs=1e-4)  # Monitor rounds to 6 digits


class Reseeded(gymnasium.Wrapper):
    """Ignores seeds: the episodes go on from the seed of the first reset."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(options=options)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_evaluate_policy_starts_every_episode_with_a_new_chunk(sb3, monitor, linear, length):
    env = Corridor(length)
    returns, lengths = sb3.evaluate_policy(
        linear.load(noise_scale=0), monitor(env), n_eval_episodes=4, deterministic=True, return_episode_rewards=True
    )
    assert lengths == [length] * 4
    np.testing.assert_array_equal(env.taken, executed(linear, env))
    step = np.arange(4 * length) % length + 1
    taken = np.array(env.taken[: 4 * length])
    sums = (taken[:, 0] * step - taken[:, 1]).reshape(4, length).sum(axis=1)
    np.testing.assert_allclose(returns, sums, atol=1e-5)
    if length == 5:
        policy = linear.load(noise_scale=0)
        np.testing.assert_allclose(rollout(policy, Corridor(length), 4, 0).returns, returns, atol=1e-5)


def test_evaluate_policy_drops_only_the_chunk_of_the_slot_whose_episode_ends(sb3, vec_env, monitor, linear):
    corridors = [Corridor(4), Corridor(7)]
    env = vec_env([lambda corridor=corridor: monitor(corridor) for corridor in corridors])
    policy = linear.load(seed=0, noise_scale=0)
    sb3.evaluate_policy(policy, env, n_eval_episodes=4, deterministic=True)
    short, long = corridors
    np.testing.assert_array_equal(long.taken, executed(linear, long))
    # After its episodes evaluate_policy no longer says where the next ones of a slot start.
    np.testing.assert_array_equal(short.taken[:8], executed(linear, short)[:8])


def test_evaluate_policy_is_reproducible_by_seeds(sb3, vec_env, monitor, swinger):
    runs = []
    for _ in range(2):
        env = vec_env([lambda: monitor(gymnasium.make("Pendulum-v1"))] * 3)
        env.seed(5)
        policy = swinger.load(seed=5)
        runs.append(
            sb3.evaluate_policy(policy, env, n_eval_episodes=6, deterministic=False, return_episode_rewards=True)
        )
    assert runs[0] == runs[1]
    assert len(set(runs[0][0])) == 6


@pytest.mark.parametrize("call", ["act", "predict", "sample", "select_action", "predict_action_chunk"])
def test_pair_of_observation_and_info_is_refused_with_the_fix(linear, call):
    with pytest.raises(ObservationError, match=re.escape("`observation, info = env.reset()`")):
        getattr(linear.load(), call)(Corridor().reset())


def test_a_policy_for_dict_observations_acts_in_a_vector_environment(make_policy):
    boxes = [BoxSpec((1,), "float32", (-np.inf,), (np.inf,), "arm"), BoxSpec((), "float64", (0.0,), (9.0,), "clock")]
    linear = make_policy(observation=boxes, execute_steps=2)

    class Robot(gymnasium.Env):
        observation_space = spaces.Dict({"arm": spaces.Box(-np.inf, np.inf, (1,)), "clock": spaces.Box(0, 9, ())})
        action_space = spaces.Box(-1.0, 1.0, (2,))

        def reset(self, *, seed=None, options=None):
            return {"arm": np.array([0.5], np.float32), "clock": np.array(0, np.float32)}, {}

        def step(self, action):
            return {"arm": action[:1], "clock": np.array(1, np.float32)}, 0.0, False, False, {}

    env = gymnasium.vector.SyncVectorEnv([Robot] * 3)
    policy = linear.load()
    observation, _ = env.reset()
    actions = policy.act(observation, deterministic=True)
    np.testing.assert_array_equal(actions, linear.chunks([[0.5, 0]] * 3)[:, 0])
    assert env.action_space.contains(actions)
    observation = env.step(actions)[0]
    np.testing.assert_array_equal(policy.act(observation), linear.chunks([[0.5, 0]] * 3)[:, 1])


SPAWNED = """
import multiprocessing, sys
import gymnasium, numpy as np
from meam_policy import ForkError, MeamError, MeamPolicy

class Answers(gymnasium.Wrapper):
    "Puts the policy's own action into info, computed in the environment's process."

    def __init__(self, env, policy):
        super().__init__(env)
        self.policy = policy

    def reset(self, **keywords):
        observation, info = self.env.reset(**keywords)
        return observation, {**info, "action": self.policy.act(observation)}

def act(policy, answers):
    policy.reset(seed=1)
    answers.put(policy.act([0.5, 0, 0]).tolist())

if __name__ == "__main__":
    how, folder = sys.argv[1:]
    policy = MeamPolicy.from_pretrained(folder, seed=0)
    make = lambda: Answers(gymnasium.make("Pendulum-v1"), policy)
    if how == "process":
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        child = context.Process(target=act, args=(policy, answers))
        child.start()
        print(answers.get(timeout=30) == (policy.reset(seed=1), policy.act([0.5, 0, 0]).tolist())[1])
        child.join()
    else:
        env = gymnasium.vector.AsyncVectorEnv([make, make], context=how)
        try:
            observation, info = env.reset(seed=[4, 4])
        except MeamError as error:
            print(type(error).__name__)
        else:
            expected = policy.act(observation[0]).tolist()
            print([action.tolist() == expected for action in info["action"]])
        env.close(terminate=True)
    print(policy.act([0.5, 0, 0]).shape)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "answer"), [("process", "True"), ("spawn", "[True, True]"), ("forkserver", "[True, True]")]
)
def test_policy_is_loaded_again_in_the_processes_of_others(swinger, run_python, tmp_path, how, answer):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    result = run_python(str(script), how, str(swinger.folder), timeout=60)
    assert (result.returncode, result.stdout) == (0, f"{answer}\n(1,)\n"), result.stderr


def test_forked_environment_that_uses_the_policy_is_refused_and_hangs_nothing(swinger, run_python, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    result = run_python("-W", "ignore", str(script), "fork", str(swinger.folder), timeout=60)
    assert (result.returncode, result.stdout) == (0, "ForkError\n(1,)\n"), result.stderr


def test_environment_that_does_not_fit_is_refused_before_acting(linear, swinger):
    env = gymnasium.make("Pendulum-v1")
    swinger.load().check_env(env)
    with pytest.raises(SpaceError):
        linear.load().check_env(env)


def test_a_vec_env_is_refused_with_what_takes_it(vec_env, linear):
    with pytest.raises(SpaceError, match=r"DummyVecEnv, as stable-baselines3's VecEnv; .*SyncVectorEnv .*evaluate_pol"):
        rollout(linear.load(), vec_env([Corridor]), 1, 0)


def test_an_environment_of_another_library_is_refused_by_its_kind(linear):
    with pytest.raises(SpaceError, match=r"types.SimpleNamespace; expected a gymnasium.Env .* derives from gymn"):
        linear.load().check_env(SimpleNamespace())


def calls(policy, observation):
    """The actions of every way of acting, at zero noise."""
    noise = np.zeros((len(observation), policy.spec.noise_dim), np.float32)
    found = [policy.sample(observation, noise)]
    for act in (policy.act, policy.select_action, policy.predict_action_chunk, lambda o: policy.predict(o)[0]):
        policy.reset()
        found.append(act(observation))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int64"])
def test_tensors_of_pytorch_are_observations(linear, dtype):
    torch = pytest.importorskip("torch")
    rows = torch.tensor([[1.0, -2, 3], [0, 5, -1]]).to(getattr(torch, dtype))
    policy = linear.load(noise_scale=0)
    expected = calls(policy, rows.to(torch.float64).numpy())
    for given in (rows, rows.float().requires_grad_() * 1):
        for seen, right in zip(calls(policy, given), expected, strict=True):
            np.testing.assert_array_equal(seen, right)
            assert isinstance(seen, np.ndarray)


def test_tensors_in_a_dict_are_observations(make_policy):
    torch = pytest.importorskip("torch")
    boxes = [
        BoxSpec((size,), "float32", (-np.inf,) * size, (np.inf,) * size, key) for key, size in (("b", 2), ("a", 1))
    ]
    policy = make_policy(observation=boxes).load(noise_scale=0)
    given = {"a": np.ones((2, 1)), "b": np.zeros((2, 2))}
    expected = policy.act(given)
    policy.reset()
    np.testing.assert_array_equal(policy.act({key: torch.tensor(part) for key, part in given.items()}), expected)


class Unreadable:
    """An array of another library, whose numbers NumPy cannot read."""

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")


class OnGpu(Unreadable):
    """What is seen of a tensor of PyTorch that is not in this machine's memory."""

    device, dtype = "cuda:0", "torch.float32"

    def detach(self):
        return self


def test_a_tensor_on_a_gpu_is_refused_with_the_fix(linear):
    policy = linear.load()
    for act in (policy.act, policy.sample, policy.predict, policy.select_action, policy.predict_action_chunk):
        with pytest.raises(
            ObservationError, match=r"tensor on cuda:0; expected an array of shape \(3,\) on the CPU.*cpu"
        ):
            act(OnGpu())
    with pytest.raises(ObservationError, match="Noise is a tensor on cuda:0"):
        policy.sample(np.zeros(3), noise=OnGpu())


def test_what_numpy_cannot_read_is_refused_by_its_kind(linear):
    with pytest.raises(ObservationError, match=r"Unreadable, which NumPy cannot read \(Implicit conversion"):
        linear.load().act(Unreadable())
