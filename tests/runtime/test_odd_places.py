"""Paths, links, variables and files in odd places, each refused or taken in one sentence."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meam_policy import BoxSpec, ConfigError, FormatError, HubError, MeamPolicy, PolicySpec
from meam_policy.environments.vector_environment import open_vector_environment
from meam_policy.folder.hub_token import token_to_send
from meam_policy.given_files import given_path
from meam_policy.spec.sound_numbers import require_sound_numbers


@pytest.mark.parametrize("place", [".", "sub/..", "sub/../new"])
def test_a_policy_is_saved_into_the_working_directory_however_it_is_named(make_policy, tmp_path, monkeypatch, place):
    policy = make_policy().load()
    monkeypatch.chdir(tmp_path)
    if place == "sub/../new":
        (tmp_path / "sub").mkdir()
    if place == "sub/..":  # a folder that holds only the one it is named by is not empty
        (tmp_path / "other" / "sub").mkdir(parents=True)
        place = "other/sub/../../saved"
    policy.save_pretrained(place)
    assert MeamPolicy.from_pretrained(place).spec == policy.spec


def test_a_link_to_itself_is_refused_as_a_link(make_policy, tmp_path):
    linear = make_policy()
    policy = linear.load()
    (linear.folder / "README.md").symlink_to("README.md")
    with pytest.raises(FormatError, match=r"README\.md is a symbolic link to README\.md; expected a file"):
        policy.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("dtype", "low", "high", "moves"),
    [
        ("int8", 0.2, 0.9, False),
        ("uint8", -5, -1, False),
        ("int8", -200, 100, False),
        ("float16", 1e5, 1e6, False),
        ("int8", 0.2, 2.9, True),
        ("float16", -1e4, 1e4, True),
    ],
)
def test_bounds_between_which_the_type_of_the_action_has_no_number_are_refused(make_spec, dtype, low, high, moves):
    spec = replace(make_spec(), action=BoxSpec((2,), dtype, (float(low),) * 2, (float(high),) * 2))
    if moves:
        require_sound_numbers(spec)
        return
    with pytest.raises(FormatError, match=rf"action\.low\[0\] to high is .*; expected bounds between .* of {dtype}"):
        require_sound_numbers(spec)


@pytest.mark.parametrize("offset", [1e30, -1e300])
def test_a_huge_offset_is_refused(make_spec, offset):
    with pytest.raises(FormatError, match=r"observation_offset\[1\] is .*; expected a number from -1e\+18 to 1e\+18"):
        require_sound_numbers(replace(make_spec(), observation_offset=(0.0, offset, 0.0)))


@pytest.mark.parametrize("count", [0, 65_537, 10**9])
def test_a_number_of_environments_is_bounded(count):
    with (
        pytest.raises(ConfigError, match=rf"num_envs is {count}; expected 1 to 65536"),
        open_vector_environment("meam/Pockets-v0", count),
    ):
        pass


@pytest.mark.parametrize(
    "text", [json.dumps({"format_version": [1] * 10**6}), json.dumps({"format_version": 1, "x" * 10**6: 1})]
)
def test_a_message_does_not_repeat_megabytes(text):
    with pytest.raises(FormatError) as caught:
        PolicySpec.from_json(text)
    assert len(str(caught.value)) < 1000


class OddPath(os.PathLike):
    def __init__(self, path):
        self._path = path

    def __fspath__(self):
        return self._path


@pytest.mark.parametrize("path", [b"policy", 3])
def test_a_path_that_is_no_text_is_refused(path):
    with pytest.raises(ConfigError, match=r"folder is .*; expected .*text or a Path"):
        given_path("folder", OddPath(path))
    with pytest.raises(ConfigError):
        MeamPolicy.from_pretrained(OddPath(path))


def test_a_token_file_that_is_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(HubError, match="The stored Hub token cannot be read: it is a named pipe"):
        token_to_send(None)


def test_a_variable_that_the_hub_client_cannot_read_is_said_by_every_command():
    command = [str(Path(sys.executable).with_name("meam")), "--version"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "abc"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    expected = "The variable HF_HUB_DOWNLOAD_TIMEOUT is 'abc'; expected whole seconds, such as 60. Set it, or unset it."
    assert done.stderr == f"meam: {expected}\n"


def test_whole_numbers_stay_within_fractional_bounds(make_policy):
    box = BoxSpec((2,), "int8", (0.2, -2.9), (2.9, 3.0))
    policy = make_policy(action=box).load(seed=0)
    actions = np.stack([policy.act(row) for row in np.random.default_rng(0).normal(size=(50, 3)) * 4])
    assert (actions >= [0.2, -2.9]).all()
    assert (actions <= [2.9, 3.0]).all()
    assert np.ptp(actions[:, 1]) > 0
