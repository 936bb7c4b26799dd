"""Names of numbers cannot be crossed."""

import dataclasses
import json
import re

import numpy as np
import onnx
import pytest

from meam_policy import BoxSpec, ConfigError, FormatError
from meam_policy.cli import run
from meam_policy.spec.names import names_metadata, names_of, read_names


def box(size, key=None, shape=None):
    return BoxSpec(shape or (size,), "float32", (-np.inf,) * size, (np.inf,) * size, key)


ARM = (box(2, "joints"), box(2, "target"), box(1, "a=b"))
FORM = "expected joints=NAME,NAME target=NAME,NAME a=b=NAME."


def read(boxes, *texts):
    return names_of(boxes, read_names(boxes, texts, "--observation-names"), "--observation-names")


def test_names_by_key_come_out_in_the_order_of_flattening_however_they_are_given():
    expected = ("q0", "q1", "x", "y", "c")
    assert read(ARM, "target=x,y", "a=b=c", "joints=q0,q1") == expected
    assert names_of(ARM, {"a=b": ["c"], "target": ("x", "y"), "joints": ["q0", "q1"]}, "names") == expected
    assert read((box(2),), "x", "y") == ("x", "y")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("q0", "q1", "x", "y", "c"), f'has "q0", which begins with no key of the observation; {FORM}'),
        (("joints=q0,q1", "tarjet=x,y"), f'has "tarjet=x,y", which begins with no key of the observation; {FORM}'),
        (("joints=q0,q1", "joints=x,y"), f'has the key "joints" twice; {FORM}'),
        (("joints=q0,q1",), f"has no names for target, a=b; {FORM}"),
        (("joints=q0", "target=x,y,z", "a=b=c"), 'of "joints" is 1 names (q0); expected 2 names'),
        (("joints=q0,", "target=x,y", "a=b=c"), "the name ''; expected names that are not empty"),
    ],
)
def test_texts_that_do_not_fit_are_refused_with_the_right_form(texts, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        read(ARM, *texts)


@pytest.mark.parametrize(
    ("name", "plain", "unit"),
    [
        ("elbow/position[rad]", "elbow/position", "rad"),
        ("elbow velocity [rad/s]", "elbow velocity", "rad/s"),
        ("tilt[°]", "tilt", "°"),
        ("joint[0]", "joint[0]", None),
        ("image[0][1]", "image[0][1]", None),
        ("joint[0][N m]", "joint[0]", "N m"),
        ("[rad]", "[rad]", None),
    ],
)
def test_a_unit_in_brackets_is_no_part_of_the_name_and_an_index_is(make_policy, name, plain, unit):
    spec = dataclasses.replace(make_policy().spec, observation_names=(name, "b", "c"))
    first, *others = spec.observation_numbers
    assert (first.index, first.key, first.name, first.unit) == (0, None, plain, unit)
    assert [number.index for number in others] == [1, 2]


NAMES = ("q0[rad]", "q1[rad]", "x", "y", "c")


@pytest.fixture
def keyed(make_policy):
    """A policy of a Dict observation whose graph says what the exporter makes it say."""
    policy = make_policy(observation=ARM, observation_names=NAMES, action_names=("left", "right"))
    spec = policy.spec
    told = names_metadata(spec.observation, spec.observation_names, spec.action_names)
    return policy, {"spec_sha256": spec.identity, **told}


def tell(policy, told):
    model = onnx.load_from_string(policy.graph)
    onnx.helper.set_model_props(model, told)
    policy.replace_graph(model.SerializeToString())


def test_a_graph_that_says_the_same_is_loaded_and_one_without_a_word_too(keyed):
    policy, told = keyed
    policy.load()
    tell(policy, told)
    policy.load()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"observation_names": "x,y,q0[rad],q1[rad],c"}, "its observation_names are x,y,q0[rad],q1[rad],c, but"),
        ({"observation_keys": "target,joints,a=b"}, "config.json says joints,target,a=b."),
        ({"observation_sizes": "1,3,1"}, "its observation_sizes are 1,3,1, but config.json says 2,2,1."),
        ({"action_names": None}, "its action_names are missing, but config.json says left,right."),
    ],
)
def test_a_graph_that_says_something_else_is_refused(keyed, change, reason):
    policy, told = keyed
    tell(policy, {name: value for name, value in {**told, **change}.items() if value is not None})
    with pytest.raises(FormatError, match=re.escape(reason)):
        policy.load()


def test_names_of_an_earlier_version_are_read_with_a_warning(keyed):
    policy, told = keyed
    del told["observation_sizes"]
    tell(policy, told)
    with pytest.warns(UserWarning, match="given as one list, not by key"):
        assert policy.load().spec.observation_names == NAMES


def test_info_shows_every_number(keyed, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    policy, _ = keyed
    assert run(["info", str(policy.folder)]) == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in capfd.readouterr().out.splitlines()]
    for row in (["0", "joints", "q0", "rad", "[-inf, inf]"], ["2", "target", "x", "", "[-inf, inf]"]):
        assert row in rows
    assert ["1", "right", "", "[-1, 1]"] in rows
    assert run(["info", str(policy.folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["observation_names"] == list(NAMES)


def test_info_shows_where_the_keys_of_a_policy_without_names_are(make_policy, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["info", str(make_policy(observation=ARM).folder)]) == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in capfd.readouterr().out.splitlines()]
    assert ["2 … 3", "target", "", "", ""] in rows
