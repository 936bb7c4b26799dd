import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from meam_policy import BoxSpec, ConfigError, MissingExtraError, NotFoundError, OutputError
from meam_policy.environments import video
from meam_policy.environments.video import make_filmed_environment

MOVIEPY = importlib.util.find_spec("moviepy") is not None


@pytest.fixture
def with_moviepy(monkeypatch):
    """Whether or not it is installed: what comes before it is used."""
    if not MOVIEPY:
        monkeypatch.setitem(sys.modules, "moviepy", types.ModuleType("moviepy"))
    monkeypatch.setenv("MUJOCO_GL", "egl")


FILM = """
import gymnasium, meam_policy, numpy, pathlib
from moviepy.video.io.VideoFileClip import VideoFileClip
from meam_policy.environments.video import make_filmed_environment

folder = pathlib.Path({videos!r})
policy = meam_policy.MeamPolicy.from_pretrained({policy!r})
env = make_filmed_environment("meam/Pockets-v0", folder)
filmed = meam_policy.rollout(policy, env, 3, 5)
env.close()
plain = meam_policy.rollout(policy, gymnasium.make("meam/Pockets-v0"), 3, 5)
numpy.testing.assert_array_equal(filmed.returns, plain.returns)
for file in sorted(folder.iterdir()):
    with VideoFileClip(str(file)) as clip:
        print(file.name, *clip.size, round(clip.duration * clip.fps))
"""


@pytest.mark.skipif(not MOVIEPY or importlib.util.find_spec("mujoco") is None, reason="needs moviepy and MuJoCo")
def test_every_episode_becomes_a_video_with_a_picture_for_every_observation(run_python, make_policy, tmp_path):
    bounds = (1.0, 1.0, 3.0, 3.0)
    policy = make_policy(observation=[BoxSpec((4,), "float32", tuple(-b for b in bounds), bounds)])
    result = run_python("-c", FILM.format(videos=str(tmp_path / "videos"), policy=str(policy.folder)))
    if "cannot be drawn on this machine" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.stderr == ""
    assert result.stdout.splitlines() == [f"rollout-episode-{i}.mp4 240 240 21" for i in range(3)]


@pytest.mark.skipif(MOVIEPY, reason="moviepy is installed")
def test_without_moviepy_it_is_named(tmp_path):
    with pytest.raises(MissingExtraError, match=r"needs moviepy, .*: pip install 'meam-policy\[video\]'"):
        make_filmed_environment("Pendulum-v1", tmp_path / "videos")
    assert not (tmp_path / "videos").exists()


def test_the_extra_that_is_named_brings_moviepy():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert re.search(r'^video = \["moviepy>=', project, re.MULTILINE)


def test_folder_that_holds_something_is_refused(with_moviepy, tmp_path):
    (tmp_path / "old.mp4").touch()
    with pytest.raises(OutputError, match="is not empty"):
        make_filmed_environment("Pendulum-v1", tmp_path)


def test_folder_that_cannot_be_made_is_refused(with_moviepy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        make_filmed_environment("Pendulum-v1", tmp_path / "file" / "videos")


def test_unknown_environment_is_told_as_such(with_moviepy, tmp_path):
    with pytest.raises(NotFoundError, match="Did you mean"):
        make_filmed_environment("Pendulum-v", tmp_path)


def test_machine_that_cannot_draw_is_told_with_the_reason(with_moviepy, tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", "no-such-library")
    with pytest.raises(ConfigError, match="meam/Pockets-v0 cannot be drawn on this machine: .*no-such-library"):
        make_filmed_environment("meam/Pockets-v0", tmp_path)


def test_drawing_that_takes_too_long_is_given_up(with_moviepy, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "TIME_LIMIT_S", 0.01)
    with pytest.raises(ConfigError, match="longer than 0.01 s"):
        make_filmed_environment("Pendulum-v1", tmp_path)


def test_process_that_aborts_is_told_with_its_exit_code(with_moviepy, tmp_path, monkeypatch):
    monkeypatch.setattr(video.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -6, "", ""))
    with pytest.raises(ConfigError, match="exit code -6"):
        make_filmed_environment("Pendulum-v1", tmp_path)
