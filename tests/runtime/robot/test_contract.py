import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_policy import BoxSpec, FormatError, NotFoundError, PolicySpec
from meam_policy.errors import ConfigError
from meam_policy.robot import ActionNumber, ObservationNumber, RobotContract, Timing
from meam_policy.robot.contract_file import (
    contract_text,
    given_contract,
    parse_contract,
    read_contract_toml,
    skeleton,
)
from meam_policy.robot.limits import ActionLimits
from meam_policy.robot.vocabulary import ACTION_KINDS, OBSERVATION_KINDS, UNITS
from meam_policy.spec import Integration

ELBOW: dict[str, Any] = {"kind": "target/joint/position", "unit": "rad", "joint": "elbow"}
WRIST: dict[str, Any] = {"kind": "target/joint/position", "unit": "rad", "joint": "wrist"}
MEASURED = {"name": "angle", "kind": "state/joint/position", "unit": "rad", "joint": "elbow"}
SPEED = {"name": "speed", "kind": "state/joint/velocity", "unit": "rad/s", "joint": "elbow"}


def spec_of(observation: int | tuple[BoxSpec, ...] = 2, action=2, bound=1.0, dtype="float32", **changes):
    boxes = observation if isinstance(observation, tuple) else (BoxSpec((observation,), "float32", *free(observation)),)
    numbers = sum(box.size for box in boxes)
    fields = {
        "observation": boxes,
        "action": BoxSpec((action,), dtype, (-bound,) * action, (bound,) * action),
        "chunk_size": 2,
        "execute_steps": 1,
        "observation_mean": (0.0,) * numbers,
        "observation_std": (1.0,) * numbers,
        "action_offset": (0.0,) * action,
        "action_scale": (1.0,) * action,
        "integration": Integration(1),
        "method": "by hand",
        "control_rate_hz": 50.0,
        **changes,
    }
    return PolicySpec(**fields)


def free(size):
    return (-np.inf,) * size, (np.inf,) * size


def data(elbow=None, wrist=None, observation=(MEASURED, SPEED), **timing):
    return {
        "observation": [dict(number) for number in observation],
        "action": [{"name": "elbow", **ELBOW, **(elbow or {})}, {"name": "wrist", **WRIST, **(wrist or {})}],
        "timing": timing,
    }


def read(*args, **kwargs):
    return RobotContract.from_object(data(*args, **kwargs))


def test_a_contract_fits_a_policy_and_survives_its_file():
    contract = read({"lower": -0.5, "max_rate": 2, "stiffness": 40}, {"default": 0.1}, rate_hz=50, blend_in_s=0.0)
    contract.check(spec_of())
    assert parse_contract(contract_text(contract).encode(), spec_of()) == contract
    assert contract.action[0] == ActionNumber("elbow", **ELBOW, lower=-0.5, max_rate=2, stiffness=40)
    assert contract.joints == ("elbow", "wrist")
    assert contract.measured_by(contract.action[0]) == 0
    assert contract.measured_by(contract.action[1]) is None


def test_what_is_not_given_is_not_written():
    text = contract_text(RobotContract(action=(ActionNumber("elbow", **ELBOW),)))
    assert json.loads(text) == {
        "format_version": 1,
        "observation": [],
        "action": [{"name": "elbow", **ELBOW}],
        "timing": {},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elbow": {"unit": "quaternion"}}, r"\.unit is .quaternion.; .* Did you mean \"quaternion_"),
        ({"elbow": {"unit": "m/s"}}, r"action\[0\]\.unit is 'm/s'; expected one that fits target/joint/position"),
        ({"elbow": {"kind": "target/joint/postion"}}, r'\.kind is .* Did you mean "target/joint/position"\?'),
        ({"elbow": {"kind": "state/joint/position"}}, r"action\[0\]\.kind is 'state/joint/position'; expected one of"),
        ({"elbow": {"joint": None}}, r"action\[0\]\.joint is missing; expected the joint that elbow is of"),
        ({"wrist": {"joint": "elbow"}}, r"action\[1\]\.joint is 'elbow'; expected each joint once; action\[0\]"),
        ({"wrist": {"name": "elbow"}}, r"action\[1\]\.name is 'elbow'; expected each name once"),
        ({"elbow": {"name": "a,b"}}, r"action\[0\]\.name is 'a,b'; expected a name"),
        ({"elbow": {"joint": " "}}, r"action\[0\]\.joint is ' '; expected a name that is not empty"),
        ({"elbow": {"joint": "a,b"}}, r"action\[0\]\.joint is 'a,b'; expected a name .* no comma"),
        ({"elbow": {"frame": ""}}, r"action\[0\]\.frame is ''; expected a name that is not empty"),
        ({"elbow": {"kind": "extra/ "}}, r"action\[0\]\.kind is 'extra/ '; expected one of"),
        ({"elbow": {"max_rate": 0}}, r"action\[0\]\.max_rate is 0; expected a finite number above 0"),
        ({"elbow": {"max_rate": True}}, r"action\[0\]\.max_rate is True .*expected a number"),
        ({"elbow": {"max_rate": "2"}}, r"action\[0\]\.max_rate is '2' .*expected a number"),
        ({"elbow": {"lower": float("nan")}}, r"action\[0\]\.lower is nan; expected a finite number"),
        ({"elbow": {"lower": 0.5, "upper": 0.5}}, r"action\[0\]\.lower is 0\.5; expected less than upper, 0\.5"),
        ({"elbow": {"upper": 0.5, "default": 0.6}}, r"action\[0\]\.default is 0\.6; expected .* between"),
        ({"elbow": {"stiffness": -1.0}}, r"action\[0\]\.stiffness is -1\.0; expected a finite number of 0 or more"),
        ({"elbow": {"representation": "delta"}}, r"action\[0\]\.representation is 'delta'; expected one of absolute"),
        ({"elbow": {"representation": "delta_to_last", "default": 0.0}}, r"default is 0\.0; expected none: delta_"),
        ({"elbow": {"max_rates": 1}}, r"max_rates is not a field; .* Did you mean action\[0\]\.max_rate\?"),
        ({"rate_hz": 0}, r"timing\.rate_hz is 0; expected a finite number above 0"),
        ({"rate": 50}, r"timing\.rate is not a field; expected rate_hz"),
        ({"blend_in_s": -1}, r"timing\.blend_in_s is -1; expected a finite number of seconds"),
        ({"blend_in_s": 3601}, r"timing\.blend_in_s is 3601; expected a finite number of seconds, 0 to 3600"),
        ({"blend_in_s": 1}, r"timing\.blend_in_s is 1; .* every action has a default, .*wrist has none"),
        ({"on_failure": "stop"}, r"timing\.on_failure is 'stop'; expected one of hold"),
        ({"on_failure": "home"}, r"timing\.on_failure is 'home'; .* a default; elbow has none"),
        (
            {"on_failure": "hold", "wrist": {"representation": "delta_to_state"}},
            r"timing\.on_failure is 'hold'; expected \"neutral\" or \"disable\": wrist would go on moving",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(changes, message):
    with pytest.raises(FormatError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "robot.json holds a list"),
        ({"action": {}}, "action is a dict; expected a list"),
        ({"action": [3]}, r"action\[0\] is a int; expected an object"),
        ({"action": [{"name": "elbow"}]}, r"action\[0\]\.kind is missing"),
        ({"timing": []}, "timing is a list; expected an object"),
        ({"joints": []}, "joints is not a field; expected observation, action, timing"),
    ],
)
def test_another_shape_of_file_is_refused(broken, message):
    text = json.dumps(broken if isinstance(broken, list) else {"format_version": 1, **broken}).encode()
    with pytest.raises(FormatError, match=message):
        parse_contract(text, spec_of())


@pytest.mark.parametrize("version", [None, 2, "1", True, 1.0])
def test_another_version_of_the_file_is_refused(version):
    text = json.dumps({"format_version": version}).encode()
    with pytest.raises(FormatError, match=r"robot\.json: format_version is .* reads version 1\. Upgrade"):
        parse_contract(text, spec_of())


def test_a_quaternion_has_four_numbers_in_a_row():
    numbers = [ObservationNumber(f"q{i}", "state/body/rotation", "quaternion_xyzw", body="torso") for i in range(4)]
    RobotContract(observation=tuple(numbers))
    for some in (numbers[:3], [*numbers[:2], ObservationNumber("x", "extra/x", "1"), *numbers[2:]]):
        with pytest.raises(
            FormatError, match=r"observation\[0\]\.unit is 'quaternion_xyzw'; expected 4 numbers in a row"
        ):
            RobotContract(observation=tuple(some))


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({}, spec_of(observation=3), "observation is '2 numbers'; expected 3 numbers"),
        ({}, spec_of(action=3), "action is '2 numbers'; expected 3 numbers"),
        ({"elbow": {"upper": 1.5}}, spec_of(), r"action\[0\]\.upper is 1\.5; expected .* within .* -1 to 1"),
        ({"elbow": {"default": -1.1}}, spec_of(), r"action\[0\]\.default is -1\.1; expected a limit"),
        ({"rate_hz": 40}, spec_of(), r"timing\.rate_hz is 40; expected 50, the rate"),
        ({"elbow": {"max_rate": 1}}, spec_of(control_rate_hz=None), r"timing\.rate_hz is missing; expected a rate"),
        ({}, spec_of(action_names=("elbow", "hand")), r"action\[1\]\.name is 'wrist'; expected \"hand\", as config"),
        ({}, spec_of(action_names=("elbow[deg]", "wrist")), r"action\[0\]\.unit is 'rad'; expected \"deg\", as config"),
        (
            {},
            spec_of(observation=(BoxSpec((2,), "float32", *free(2), key="arm"),)),
            r"observation\[0\]\.key is missing; expected 'arm'",
        ),
    ],
)  # fmt: skip
def test_what_is_not_of_the_policy_is_refused(changes, spec, message):
    with pytest.raises(FormatError, match=message):
        read(**changes).check(spec)


def test_names_and_units_become_those_of_numbers_without_names():
    named = read().named(spec_of())
    assert named.action_names == ("elbow[rad]", "wrist[rad]")
    assert [number.unit for number in named.observation_numbers] == ["rad", "rad/s"]
    assert [number.name for number in named.observation_numbers] == ["angle", "speed"]
    kept = spec_of(action_names=("elbow", "wrist"))
    assert read(observation=()).named(kept) == kept


@given(
    named=st.booleans(),
    keys=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), max_size=3, unique=True),
)
def test_a_skeleton_is_a_contract_of_its_policy(named, keys, tmp_path_factory):
    boxes = tuple(BoxSpec((2,), "float32", *free(2), key=key) for key in keys) or (BoxSpec((2,), "float32", *free(2)),)
    names = tuple(f'{index} "x"\\ \t[m]' for index in range(2 * len(boxes))) if named else None
    spec = spec_of(observation=boxes, observation_names=names)
    file = tmp_path_factory.mktemp("skeleton") / "robot.toml"
    file.write_text(skeleton(spec), encoding="utf-8")
    contract = read_contract_toml(file, spec)
    assert [number.key for number in contract.observation] == [box.key for box in boxes for _ in range(2)]
    assert len(contract.action) == 2
    assert contract.timing == Timing(rate_hz=50.0)


def test_the_words_are_consistent():
    for kinds in (OBSERVATION_KINDS, ACTION_KINDS):
        assert all(units and set(units) <= set(UNITS) for units in kinds.values())


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(
        NotFoundError, match=r"There is no robot contract .*robot\.toml: `meam robot init` writes one\."
    ):
        given_contract(tmp_path / "robot.toml", spec_of())
    (tmp_path / "robot.toml").write_bytes(b"action = [")
    with pytest.raises(ConfigError, match=r"robot\.toml is not TOML"):
        given_contract(tmp_path / "robot.toml", spec_of())
    (tmp_path / "robot.toml").write_text("[[action]]\nname = 'x'\n")
    with pytest.raises(FormatError, match=re.escape(f"{tmp_path / 'robot.toml'}: action[0].kind is missing")):
        given_contract(tmp_path / "robot.toml", spec_of())
    with pytest.raises(ConfigError, match=r"robot is 3; expected the path of a robot\.toml"):
        given_contract(3, spec_of())  # pyright: ignore[reportArgumentType]


def test_limits_are_the_narrower_ones_per_tick():
    contract = read(
        {"lower": -0.5, "max_rate": 5.0}, {"representation": "delta_to_last", "max_rate": 10.0, "upper": 0.1}
    )
    limits = ActionLimits.of(contract, spec_of())
    np.testing.assert_allclose(limits.low, [-0.5, -0.2], rtol=1e-6)
    np.testing.assert_allclose(limits.high, [1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(limits.max_change, [0.1, np.inf])
    assert limits.home is None


@given(
    bound=st.floats(0.01, 0.99), side=st.sampled_from([-1, 1]), dtype=st.sampled_from(["float16", "float32", "float64"])
)
def test_limits_are_rounded_inwards_to_the_type_of_the_action(bound, side, dtype):
    number = {"upper": bound} if side > 0 else {"lower": -bound}
    limits = ActionLimits.of(read(number), spec_of(dtype=dtype))
    found = side * (limits.high if side > 0 else limits.low)[0]
    assert found <= bound
    assert found == float(np.dtype(dtype).type(found))
    assert bound - found <= float(np.spacing(np.dtype(dtype).type(bound)))


def test_limits_of_whole_numbers_are_whole():
    box = BoxSpec((2,), "int32", (-3, -3), (3, 3))
    limits = ActionLimits.of(read({"lower": -1.5, "upper": 2.5}), replace(spec_of(), action=box))
    assert (limits.low[0], limits.high[0]) == (-1, 2)


def test_limits_that_leave_nothing_are_refused():
    def refused(message, elbow, **changes):
        with pytest.raises(FormatError, match=message):
            ActionLimits.of(read(elbow), spec_of(**changes))

    delta = {"representation": "delta_to_last", "lower": 0.5}
    refused(
        r"action\[0\]\.max_rate is 5\.0, 0\.1 a tick at 50 Hz; expected more than 25, .*elbow",
        {**delta, "max_rate": 5.0},
    )
    assert ActionLimits.of(read({**delta, "max_rate": 25.0}), spec_of()).high[0] == 0.5
    narrow = {"lower": 0.1, "upper": 0.1 + 1e-12}
    refused(
        r"^action\[0\], elbow, is limited to 0\.1 or more and 0\.1\d* or less; expected .* which float32 has", narrow
    )
    ActionLimits.of(read(narrow), spec_of(dtype="float64"))
    refused("0.25 or more and 0.75 or less; expected .* int8", {"lower": 0.25, "upper": 0.75}, dtype="int8")


@given(
    share=st.floats(1e-9, 4),
    dtype=st.sampled_from(["float16", "float32", "float64", "int16"]),
    delta=st.booleans(),
)
def test_a_rate_that_could_never_move_a_number_is_refused(share, dtype, delta):
    spec = spec_of(dtype=dtype, bound=3.0)
    spacing = 1.0 if dtype == "int16" else float(np.spacing(np.dtype(dtype).type(3.0)))
    step = share * spacing
    way = {"representation": "delta_to_last"} if delta else {}
    contract = read({"max_rate": step * 50, **way})
    if step * 50 / 50 > spacing / 2:
        limits = ActionLimits.of(contract, spec)
        reach = limits.high[0] if delta else limits.max_change[0]
        assert delta or np.dtype(dtype).type(np.rint(2 + reach) if dtype == "int16" else 2 + reach) > 2
    else:
        with pytest.raises(FormatError, match=r"action\[0\]\.max_rate is .* a tick at 50 Hz; expected more than"):
            ActionLimits.of(contract, spec)
