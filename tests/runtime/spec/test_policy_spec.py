import copy
import dataclasses
import hashlib
import json
import math
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meam_policy import (
    FORMAT_VERSION,
    BoxSpec,
    ConfigError,
    FormatError,
    MeamError,
    PolicySpec,
    SpaceError,
    VersionError,
)
from meam_policy.spec import (
    EVALUATIONS,
    ActingMeasurement,
    ActingRule,
    Integration,
    VariantSpec,
    parse_acting,
    rule_name,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-30, max_value=1e30)
FLOATS, INTEGERS = ("float16", "float32", "float64"), ("int8", "int32", "int64", "uint8", "uint64")
SHA = "0123456789abcdef" * 4


@st.composite
def box_spaces(draw):
    dtype = np.dtype(draw(st.sampled_from((*FLOATS, *INTEGERS, "bool"))))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))
    if dtype.kind == "f":
        elements = hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False)
    elif dtype.kind == "b":
        elements = st.booleans()
    else:
        # Beyond 2**53 a float64 holds only some integers; the extremes are what unbounded spaces have.
        limits = np.iinfo(dtype)
        elements = st.sampled_from([limits.min, limits.max]) | st.integers(
            max(limits.min, -(2**53)), min(limits.max, 2**53)
        )
    first, second = (draw(hnp.arrays(dtype, shape, elements=elements)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium warns of bounds that it considers odd
        low, high = np.asarray(np.minimum(first, second)), np.asarray(np.maximum(first, second))
        if dtype.kind == "f":
            bounded = hnp.arrays(np.bool_, shape)
            low = np.where(draw(bounded), low, dtype.type(-np.inf))
            high = np.where(draw(bounded), high, dtype.type(np.inf))
        return spaces.Box(low, high, shape, dtype.type)


@st.composite
def integrations(draw):
    """How an ODE is integrated."""
    solver = draw(st.sampled_from(sorted(EVALUATIONS)))
    inner = st.floats(0, 1, exclude_min=True, exclude_max=True)
    times = draw(st.none() | st.lists(inner, max_size=5, unique=True))
    steps = draw(st.integers(1, 2500)) if times is None else len(times) + 1
    grid = None if times is None else (0.0, *sorted(times), 1.0)
    return Integration(steps * EVALUATIONS[solver], solver, grid, draw(st.integers(1, 10_000)))


@st.composite
def variants(draw, files):
    figures = {"parity_error": st.floats(0, 1), "success": st.floats(0, 1), "return_mean": FINITE}
    integration = draw(integrations())
    single = integration.best_of == 1
    one_step = single and integration.nfe == 1 and draw(st.booleans())
    return VariantSpec(
        file=draw(st.sampled_from(files)),
        precision=draw(st.sampled_from(["fp32", "int8", "fp16"])),
        one_step=one_step,
        takes_prefix=single and not one_step and draw(st.booleans()),
        measured=draw(st.fixed_dictionaries({}, optional=figures)),
        integration=integration,
    )


@st.composite
def acting_rules(draw, best_of):
    """How a policy acts, measured or not."""
    scale = draw(st.floats(0, 1))
    ends = ("return_low", "return_mean", "return_high")
    numbers = st.tuples(FINITE, FINITE, FINITE).map(lambda three: dict(zip(ends, sorted(three), strict=True)))
    names = st.sampled_from(["sample", "zero", "0.5", "best-of-4", "best-of-4 at 0.25"])
    rules = draw(st.dictionaries(names, numbers, max_size=2))
    own = {rule_name(scale, best_of): draw(numbers)}
    return ActingRule(
        scale,
        draw(
            st.none()
            | st.builds(
                ActingMeasurement,
                st.text(max_size=5),
                st.integers(1, 99),
                st.integers(0, 99),
                st.just({**rules, **own}),
            )
        ),
    )


@st.composite
def specs(draw):
    keys = draw(st.just([None]) | st.lists(st.text(max_size=5), min_size=1, max_size=3, unique=True))
    observation = tuple(BoxSpec.from_space(draw(box_spaces()), key) for key in keys)
    action = BoxSpec.from_space(draw(box_spaces()))
    observation_dim = sum(box.size for box in observation)
    chunk_size = draw(st.integers(1, 100))

    def numbers(elements, size):
        return tuple(draw(st.lists(elements, min_size=size, max_size=size)))

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FINITE | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
        max_leaves=4,
    )
    names = st.text(st.characters(exclude_characters="/\\:\0"), min_size=1, max_size=8)
    file_names = names.filter(lambda name: name not in (".", ".."))
    files = draw(st.dictionaries(file_names, st.just(SHA), max_size=2))
    variant_names = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,63}", fullmatch=True)

    def words(size):
        word = st.text(st.characters(exclude_characters=","), max_size=3)
        return draw(st.none() | st.lists(word, min_size=size, max_size=size).map(tuple))

    integration = draw(integrations())
    return PolicySpec(
        observation=observation,
        action=action,
        chunk_size=chunk_size,
        execute_steps=draw(st.integers(1, chunk_size)),
        observation_mean=numbers(FINITE, observation_dim),
        observation_std=numbers(POSITIVE, observation_dim),
        observation_offset=draw(st.sampled_from([(), numbers(FINITE, observation_dim)])),
        action_offset=numbers(FINITE, action.size),
        action_scale=numbers(POSITIVE, action.size),
        method=draw(st.text(max_size=5)),
        hyperparameters=draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
        training_data=draw(st.none() | st.text(max_size=5)),
        environment_id=draw(st.none() | st.text(max_size=5)),
        control_rate_hz=draw(st.none() | POSITIVE),
        observation_names=words(observation_dim),
        action_names=words(action.size),
        license=draw(st.none() | st.text(max_size=5)),
        variants=draw(st.dictionaries(variant_names, variants(sorted(files)), max_size=2)) if files else {},
        files=files,
        integration=integration,
        acting=draw(acting_rules(integration.best_of)),
    )


def spec_of(*observation, action=None):
    boxes = tuple(observation)
    size = sum(box.size for box in boxes)
    action = action or BoxSpec((1,), "float32", (-1.0,), (1.0,))
    ones = (1.0,) * action.size
    return PolicySpec(
        boxes, action, 4, 2, (0.0,) * size, (1.0,) * size, ones, ones, integration=Integration(10), method="bc"
    )


def figures(mean):
    return {"return_mean": mean, "return_low": mean - 1.0, "return_high": mean + 1.0}


RETURNS = {"sample": figures(-19.2), "zero": {**figures(-6.9), "success": 0.5}}
MEASURED = ActingRule(0.0, ActingMeasurement("meam/Pockets-v0", 50, 7, RETURNS))


def measured(**changes):
    given = {"environment_id": "meam/Pockets-v0", "episodes": 50, "seed": 7, "returns": RETURNS}
    return ActingRule(0.0, ActingMeasurement(**{**given, **changes}))


GOOD = dataclasses.replace(
    spec_of(BoxSpec((2,), "float32", (-1.0, -math.inf), (1.0, math.inf))),
    integration=Integration(2, time_grid=(0.0, 0.25, 1.0)),
    acting=MEASURED,
    hyperparameters={"optimizer": {"rates": [0.1, 0.2]}},
    training_data="meam/pockets-v0",
    environment_id="meam/Pockets-v0",
    control_rate_hz=10.0,
    observation_names=("angle", "speed"),
    action_names=("torque",),
    license="apache-2.0",
    variants={
        "k3": VariantSpec(
            integration=Integration(nfe=4, solver="midpoint", time_grid=(0.0, 0.5, 1.0), best_of=3),
            file="k3.onnx",
            precision="int8",
            one_step=False,
            takes_prefix=False,
            measured={"parity_error": 0.01},
        )
    },
    files={"policy.onnx": SHA, "k3.onnx": SHA},
)


def changed(path, value):
    """The text of config.json with the value at a path, such as ("action", "low", 0), replaced."""
    data = json.loads(GOOD.to_json())
    where = data
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    return json.dumps(data)


def error_of(text):
    with pytest.raises(FormatError) as caught:
        PolicySpec.from_json(text)
    assert isinstance(caught.value, MeamError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outcome_of(text):
    """The spec, or the message of the only kind of error that is allowed."""
    try:
        return PolicySpec.from_json(text)
    except FormatError as error:
        return str(error)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(specs())
def test_json_round_trip_changes_nothing(spec):
    text = spec.to_json()
    assert PolicySpec.from_json(text) == spec
    assert PolicySpec.from_json(text.encode()) == spec
    assert PolicySpec.from_json(text).to_json() == text


def test_config_is_strict_json_without_infinity():
    def refuse(name):
        raise AssertionError(name)

    data = json.loads(GOOD.to_json(), parse_constant=refuse)
    assert data["observation"][0]["low"] == [-1.0, None]
    assert data["observation"][0]["high"] == [1.0, None]


@settings(max_examples=100, deadline=None)
@given(box_spaces())
def test_box_is_the_one_it_was_recorded_from(space):
    rebuilt = BoxSpec.from_space(space).to_space()
    assert rebuilt == space
    assert rebuilt.dtype == space.dtype
    np.testing.assert_array_equal(rebuilt.low, space.low)
    np.testing.assert_array_equal(rebuilt.high, space.high)


def test_dict_observation_space_keeps_the_recorded_key_order():
    boxes = {key: spaces.Box(-1.0, 1.0, (size,)) for key, size in (("wrist", 2), ("arm", 3), ("Base", 1))}
    recorded = spaces.Dict(list(boxes.items()))
    spec = spec_of(*(BoxSpec.from_space(box, key) for key, box in boxes.items()))
    read = PolicySpec.from_json(spec.to_json())
    assert read.observation_space == recorded
    assert isinstance(read.observation_space, spaces.Dict)
    assert list(read.observation_space) == ["wrist", "arm", "Base"]
    assert read.observation_dim == 6


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1", "MountainCarContinuous-v0"])
def test_spaces_of_an_environment_come_back_equal(env_id):
    env = gymnasium.make(env_id)
    space = env.observation_space
    assert isinstance(space, spaces.Box)
    action = BoxSpec.from_space(env.action_space) if isinstance(env.action_space, spaces.Box) else None
    spec = PolicySpec.from_json(spec_of(BoxSpec.from_space(space), action=action).to_json())
    assert spec.observation_space == space
    if action is not None:
        assert spec.action_space == env.action_space


@pytest.mark.parametrize("key", [None, "camera"])
@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict({"a": spaces.Discrete(2)})])
def test_only_boxes_can_be_recorded(space, key):
    with pytest.raises(SpaceError, match=key or "The space is"):
        BoxSpec.from_space(space, key)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "line 1, column 1"),
        (b"", "line 1, column 1"),
        (GOOD.to_json()[:-20], "line"),
        ('{\n  "format_version": 1,,\n}', "line 2, column"),
        ("[]", "list"),
        ("null", "NoneType"),
        ("1" * 5000, "cannot be read"),
        (b'{"method": "\xff"}', "not UTF-8 text (byte 12)"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_config_that_is_not_a_json_object_is_refused(text, fragment):
    message = error_of(text)
    assert message.startswith("config.json")
    assert fragment in message


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(GOOD.to_json()) - 2))
def test_truncated_config_is_refused_at_every_length(length):
    assert "config.json" in error_of(GOOD.to_json()[:length])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GOOD.to_json()) - 1), st.binary(min_size=1, max_size=3))
def test_overwritten_bytes_give_a_spec_or_a_format_error(position, garbage):
    text = GOOD.to_json().encode()
    damaged = text[:position] + garbage + text[position + len(garbage) :]
    outcome = outcome_of(damaged)
    if isinstance(outcome, str):
        assert "config.json" in outcome
    else:
        assert outcome.action_space.shape == outcome.action.shape
        assert outcome.observation_space.shape in (None, outcome.observation[0].shape)


def test_deeply_nested_hyperparameters_are_read_or_refused():
    for depth in (100, 900, 990, 2000):
        text = changed(("hyperparameters",), {"x": "HERE"}).replace('"HERE"', "[" * depth + "1" + "]" * depth)
        outcome = outcome_of(text)
        assert isinstance(outcome, PolicySpec) or "nested too deeply" in outcome


NUMBER_PATHS = [
    ("observation_mean", 0),
    ("observation_std", 1),
    ("action_offset", 0),
    ("action_scale", 0),
    ("control_rate_hz",),
    ("hyperparameters", "optimizer", "rates", 1),
    ("observation", 0, "low", 1),
    ("observation", 0, "high", 0),
    ("action", "low", 0),
    ("action", "high", 0),
    ("time_grid", 1),
    ("variants", "k3", "time_grid", 1),
    ("variants", "k3", "measured", "parity_error"),
]


def name_of(path):
    """How messages call the field at a path: variants["k3"].time_grid[1]."""
    name = ""
    for before, step in zip((None, *path[:-1]), path, strict=True):
        quoted = before in ("variants", "measured", "files")
        name += f"[{step}]" if isinstance(step, int) else f'["{step}"]' if quoted else f".{step}"
    return name.lstrip(".")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
@pytest.mark.parametrize("path", NUMBER_PATHS, ids=name_of)
def test_number_that_is_not_finite_is_refused_by_name(path, literal):
    message = error_of(changed(path, "HERE").replace('"HERE"', literal))
    assert name_of(path) in message
    assert "must be finite" in message


def test_an_offset_is_written_only_where_there_is_one():
    assert "observation_offset" not in GOOD.to_json()
    far = dataclasses.replace(GOOD, observation_offset=(0.0, 4.5e6))
    assert json.loads(far.to_json())["observation_offset"] == [0.0, 4.5e6]
    assert PolicySpec.from_json(far.to_json()) == far


@pytest.mark.parametrize("path", [("observation_std", 0), ("action_scale", 0)], ids=name_of)
@pytest.mark.parametrize("value", [0, -1, 0.0, -1e-9])
def test_scale_that_is_not_positive_is_refused(path, value):
    message = error_of(changed(path, value))
    assert name_of(path) in message
    assert "above 0" in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (GOOD.to_json().replace('"method": "bc"', '"method": "bc", "method": "qam"'), "method"),
        (GOOD.to_json().replace('"dtype": "float32"', '"dtype": "float32", "dtype": "float64"', 1), "dtype"),
        (GOOD.to_json().replace('"rates"', '"rates": 1, "rates"'), "rates"),
    ],
)
def test_duplicate_key_is_refused_by_name(text, key):
    message = error_of(text)
    assert f'"{key}" appears twice' in message


@pytest.mark.parametrize("version", [0, 2, 10**6, -1, "1", True, 1.0, None, [1], {}])
def test_any_other_format_version_is_refused(version):
    with pytest.raises(VersionError) as caught:
        PolicySpec.from_json(changed(("format_version",), version))
    assert f"format_version is {version!r}" in str(caught.value)
    assert f"reads version {FORMAT_VERSION}" in str(caught.value)
    assert "pgrade meam-policy" in str(caught.value)


def test_missing_format_version_is_refused():
    data = json.loads(GOOD.to_json())
    del data["format_version"]
    with pytest.raises(VersionError, match="format_version is None"):
        PolicySpec.from_json(json.dumps(data))


JSON_OF_EVERY_TYPE = {
    "null": None,
    "bool": True,
    "int": 3,
    "float": 0.5,
    "text": "x",
    "list": ["x"],
    "object": {"x": "y"},
}
FIELDS = {
    ("observation",): {"list"},
    ("observation", 0): {"object"},
    ("observation", 0, "key"): {"null", "text"},
    ("observation", 0, "shape"): {"list"},
    ("observation", 0, "shape", 0): {"int"},
    ("observation", 0, "dtype"): {"text"},
    ("observation", 0, "low"): {"list"},
    ("observation", 0, "low", 0): {"null", "int", "float"},
    ("observation", 0, "high"): {"list"},
    ("action",): {"object"},
    ("action", "key"): {"null", "text"},
    ("action", "shape"): {"list"},
    ("action", "shape", 0): {"int"},
    ("action", "dtype"): {"text"},
    ("action", "high", 0): {"null", "int", "float"},
    ("chunk_size",): {"int"},
    ("execute_steps",): {"int"},
    ("observation_mean",): {"list"},
    ("observation_mean", 0): {"int", "float"},
    ("observation_std",): {"list"},
    ("observation_std", 0): {"int", "float"},
    ("action_offset",): {"list"},
    ("action_offset", 0): {"int", "float"},
    ("action_scale",): {"list"},
    ("action_scale", 0): {"int", "float"},
    ("nfe",): {"int"},
    ("method",): {"text"},
    ("solver",): {"text"},
    ("best_of",): {"int"},
    ("acting",): {"object"},
    ("acting", "noise_scale"): {"int", "float"},
    ("acting", "measured"): {"null", "object"},
    ("acting", "measured", "environment_id"): {"text"},
    ("acting", "measured", "episodes"): {"int"},
    ("acting", "measured", "seed"): {"int"},
    ("acting", "measured", "returns"): {"object"},
    ("acting", "measured", "returns", "zero"): {"object"},
    ("acting", "measured", "returns", "zero", "return_mean"): {"int", "float"},
    ("hyperparameters",): {"object"},
    ("training_data",): {"null", "text"},
    ("environment_id",): {"null", "text"},
    ("control_rate_hz",): {"null", "int", "float"},
    ("time_grid",): {"null", "list"},
    ("time_grid", 0): {"int", "float"},
    ("observation_names",): {"null", "list"},
    ("observation_names", 1): {"text"},
    ("action_names",): {"null", "list"},
    ("action_names", 0): {"text"},
    ("license",): {"null", "text"},
    ("variants",): {"object"},
    ("variants", "k3"): {"object"},
    ("variants", "k3", "file"): {"text"},
    ("variants", "k3", "nfe"): {"int"},
    ("variants", "k3", "solver"): {"text"},
    ("variants", "k3", "time_grid"): {"null", "list"},
    ("variants", "k3", "time_grid", 1): {"int", "float"},
    ("variants", "k3", "best_of"): {"int"},
    ("variants", "k3", "precision"): {"text"},
    ("variants", "k3", "one_step"): {"bool"},
    ("variants", "k3", "takes_prefix"): {"bool"},
    ("variants", "k3", "measured"): {"object"},
    ("variants", "k3", "measured", "parity_error"): {"int", "float"},
    ("files",): {"object"},
    ("files", "policy.onnx"): {"text"},
}
WRONG_TYPES = [(path, kind) for path, good in FIELDS.items() for kind in JSON_OF_EVERY_TYPE if kind not in good]


def test_wrong_types_are_tried_on_every_field():
    data = json.loads(GOOD.to_json())
    assert {path[0] for path in FIELDS} | {"format_version"} == set(data)
    assert {path[2] for path in FIELDS if path[0] == "variants" and len(path) > 2} == set(data["variants"]["k3"])


@pytest.mark.parametrize(("path", "kind"), WRONG_TYPES, ids=lambda part: part if isinstance(part, str) else "")
def test_wrong_type_is_refused_with_the_field_and_both_types(path, kind):
    value = JSON_OF_EVERY_TYPE[kind]
    message = error_of(changed(path, value))
    # A wrong size is reported as the shape's, a wrong hash under its quoted file name.
    field = [step for step in path if isinstance(step, str)][-1]
    assert field in message
    if path[0] == "variants":
        assert f"config.json: {name_of(path)} is" in message
    assert "expected" in message
    if value is not None:
        assert type(value).__name__ in message


NEW = {"acting", "best_of", "time_grid", "observation_names", "action_names", "license", "variants"}
"""Fields that the first files of this format version did not have."""


def test_a_file_from_before_the_newer_fields_is_read_as_it_was_meant():
    data = {name: value for name, value in json.loads(GOOD.to_json()).items() if name not in NEW}
    spec = PolicySpec.from_json(json.dumps(data))
    assert (spec.integration.best_of, spec.integration.time_grid, spec.license) == (1, None, None)
    assert spec.acting == ActingRule(noise_scale=1.0, measured=None)
    assert (spec.observation_names, spec.action_names, spec.variants) == (None, None, {})
    assert (spec.observation, spec.hyperparameters, spec.files) == (GOOD.observation, GOOD.hyperparameters, GOOD.files)


@pytest.mark.parametrize("name", sorted(NEW))
def test_each_newer_field_may_be_missing(name):
    data = json.loads(GOOD.to_json())
    del data[name]
    read = json.loads(PolicySpec.from_json(json.dumps(data)).to_json())
    assert {field: value for field, value in read.items() if field != name} == data


@pytest.mark.parametrize("name", sorted(set(json.loads(GOOD.to_json())) - NEW))
def test_missing_field_is_refused_by_name(name):
    data = json.loads(GOOD.to_json())
    del data[name]
    assert name in error_of(json.dumps(data))


@pytest.mark.parametrize("name", ["shape", "dtype", "low", "high", "key"])
def test_missing_field_of_a_box_is_refused_by_name(name):
    data = json.loads(GOOD.to_json())
    del data["action"][name]
    assert f"action.{name} is missing" in error_of(json.dumps(data))


VARIANT_FIELDS = ["file", "nfe", "solver", "best_of", "precision", "one_step", "takes_prefix", "measured"]


@pytest.mark.parametrize("name", VARIANT_FIELDS)
def test_missing_field_of_a_variant_is_refused_by_name(name):
    data = json.loads(GOOD.to_json())
    del data["variants"]["k3"][name]
    assert f'variants["k3"].{name} is missing' in error_of(json.dumps(data))


def test_unknown_field_is_refused_with_the_nearest_name():
    assert 'Did you mean variants["k3"].solver?' in error_of(changed(("variants", "k3", "solvr"), "euler"))
    assert "Did you mean chunk_size?" in error_of(changed(("chunk_sise",), 4))
    assert "Did you mean action.shape?" in error_of(changed(("action", "shapes"), [1]))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../policy.onnx", "a/../../b", "a/b", "C:\\x", "C:x", "\\\\srv\\x", "a\0b"],
)
def test_file_name_that_is_a_path_is_refused(name):
    message = error_of(changed(("files", name), SHA))
    assert "files" in message
    assert "plain file names" in message
    assert repr(name) in message


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "٣" * 64])
def test_text_that_is_not_a_sha256_is_refused(digest):
    assert 'files["policy.onnx"]' in error_of(changed(("files", "policy.onnx"), digest))


@pytest.mark.parametrize("size", [0, -1, 2**40, 2**20 + 1])
@pytest.mark.parametrize(("path", "name"), [(("action", "shape", 0), "shape"), (("chunk_size",), "chunk_size")])
def test_size_out_of_range_is_refused_with_the_allowed_range(path, name, size):
    message = error_of(changed(path, size))
    assert name in message
    assert str(size) in message
    assert "1 to " in message


@pytest.mark.parametrize("name", ["execute_steps", "nfe", "best_of"])
@pytest.mark.parametrize("steps", [0, -1, 10_001, 2**40])
def test_steps_out_of_range_are_refused(name, steps):
    message = error_of(changed((name,), steps))
    assert f"{name} is {steps}" in message


@pytest.mark.parametrize(
    ("field", "value", "shown", "expected"),
    [
        ("file", "other.onnx", "'other.onnx'", "one of files: k3.onnx, policy.onnx"),
        ("file", "../k3.onnx", "'../k3.onnx'", "one of files: k3.onnx, policy.onnx"),
        ("file", "", "''", "one of files: k3.onnx, policy.onnx"),
        ("nfe", 0, "0", "1 to 10000"),
        ("nfe", -1, "-1", "1 to 10000"),
        ("nfe", 2**40, "1099511627776", "1 to 10000"),
        ("nfe", 5, "5", "a multiple of 2, the evaluations per step of midpoint"),
        ("solver", "dopri5", "'dopri5'", "one of euler, ab2, midpoint, heun, rk4"),
        ("solver", "Euler", "'Euler'", "one of euler, ab2, midpoint, heun, rk4"),
        ("time_grid", [0, 1], "2 times", "3, the boundaries of 2 steps"),
        ("time_grid", [0, 0.25, 0.5, 1], "4 times", "3, the boundaries of 2 steps"),
        ("time_grid", [0, 1, 1], "[0.0, 1.0, 1.0]", "increasing times from 0 to 1"),
        ("best_of", 0, "0", "1 to 10000"),
        ("best_of", 10_001, "10001", "1 to 10000"),
        ("precision", "fp8", "'fp8'", "one of fp32, int8, fp16"),
    ],
)
def test_value_of_a_variant_that_is_out_of_range_is_refused_by_name(field, value, shown, expected):
    message = error_of(changed(("variants", "k3", field), value))
    assert message == f'config.json: variants["k3"].{field} is {shown}; expected {expected}.'


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", ".hidden", "-x", "K3", "k_3", "k 3", "k3\n", "a\nb", "é", "٣", "\0", "a" * 65]
)
def test_name_of_a_variant_that_could_not_be_part_of_a_file_name_is_refused(name):
    data = json.loads(GOOD.to_json())
    data["variants"] = {name: data["variants"]["k3"]}
    message = error_of(json.dumps(data))
    assert f"variants is {name!r}; expected names of lower-case letters, digits, dots and dashes" in message


@pytest.mark.parametrize("name", ["k3", "0", "one-step", "k3.int8", "a" * 64])
def test_plain_names_of_variants_are_taken(name):
    data = json.loads(GOOD.to_json())
    data["variants"] = {name: data["variants"]["k3"]}
    assert list(PolicySpec.from_json(json.dumps(data)).variants) == [name]


@pytest.mark.parametrize(
    "grid", [[0, 0.5, 0.9], [0.1, 0.5, 1], [0, 0, 1], [0, 1, 1], [0, 1.5, 1], [0, -0.5, 1], [1, 0.5, 0], [], [0, 1]]
)
def test_times_that_do_not_lead_from_0_to_1_in_as_many_steps_are_refused(grid):
    message = error_of(changed(("time_grid",), grid))
    assert message.startswith("config.json: time_grid is ")
    assert ("expected 3, the boundaries of 2 steps" if len(grid) != 3 else "increasing times from 0 to 1") in message


@pytest.mark.parametrize("solver", sorted(EVALUATIONS))
def test_evaluations_are_a_multiple_of_those_of_one_step(solver):
    together = EVALUATIONS[solver]
    data = {**json.loads(GOOD.to_json()), "solver": solver, "time_grid": None}
    for steps in range(1, 10):
        text = json.dumps({**data, "nfe": steps})
        if steps % together == 0:
            assert PolicySpec.from_json(text).integration.nfe == steps
        else:
            expected = f"nfe is {steps}; expected a multiple of {together}, the evaluations per step of {solver}"
            assert expected in error_of(text)


def test_select_without_a_name_is_the_policy_as_trained():
    assert GOOD.select(None) == (GOOD, "policy.onnx")


def test_select_gives_the_integration_of_the_variant_and_its_file_and_leaves_the_rest():
    spec, file = GOOD.select("k3")
    assert file == "k3.onnx"
    seen = (spec.integration.nfe, spec.integration.solver, spec.integration.time_grid, spec.integration.best_of)
    assert seen == (4, "midpoint", (0.0, 0.5, 1.0), 3)
    assert spec.noise_dim == 3 * GOOD.noise_dim
    assert dataclasses.replace(spec, integration=GOOD.integration, acting=GOOD.acting) == GOOD


def test_variant_that_a_policy_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(ConfigError, match=r'no variant "k9"; it has: k3\.'):
        GOOD.select("k9")
    with pytest.raises(ConfigError, match="it has: none"):
        dataclasses.replace(GOOD, variants={}).select("k3")


IDENTITY_CHANGES = {
    "observation": (dataclasses.replace(GOOD.observation[0], high=(2.0, math.inf)),),
    "action": dataclasses.replace(GOOD.action, low=(-2.0,)),
    "chunk_size": 5,
    "execute_steps": 1,
    "observation_mean": (0.0, 0.5),
    "observation_std": (1.0, 2.0),
    "observation_offset": (0.0, 4.5e6),
    "action_offset": (0.5,),
    "action_scale": (2.0,),
    "nfe": 4,
    "method": "qam",
    "solver": "ab2",
    "time_grid": (0.0, 0.5, 1.0),
    "best_of": 2,
    "hyperparameters": {"optimizer": {"rates": [0.1, 0.3]}},
    "training_data": None,
    "environment_id": None,
    "control_rate_hz": 20.0,
    "observation_names": ("angle", "rate"),
    "action_names": None,
    "license": "mit",
}


def copy_of(spec, **changes):
    """A copy with other fields, those of its integration included."""
    names = {field.name for field in dataclasses.fields(Integration)} & set(changes)
    integration = dataclasses.replace(spec.integration, **{name: changes.pop(name) for name in names})
    return dataclasses.replace(spec, integration=integration, **changes)


def test_identity_changes_with_every_field_of_what_a_policy_is():
    others = {"acting", "files", "variants", "format_version"}
    assert set(IDENTITY_CHANGES) | others == set(json.loads(GOOD.to_json())) | {"observation_offset"}
    seen = {GOOD.identity}
    for name, value in IDENTITY_CHANGES.items():
        more = {"time_grid": None} if name == "nfe" else {}
        seen.add(copy_of(GOOD, **{name: value}, **more).identity)
    assert len(seen) == 1 + len(IDENTITY_CHANGES)


def test_identity_does_not_change_with_files_variants_what_was_measured_of_them_and_how_the_policy_acts():
    measured = dataclasses.replace(GOOD.variants["k3"], measured={"parity_error": 0.02, "latency_p50_ms": 1.0})
    for change in (
        {"variants": {}},
        {"variants": {"k3": measured}},
        {"variants": {}, "files": {}},
        {"files": {**GOOD.files, "policy.onnx": SHA[::-1]}},
        {"acting": ActingRule()},
    ):
        assert dataclasses.replace(GOOD, **change).identity == GOOD.identity


def test_identity_is_the_hash_of_config_json_without_files_variants_and_acting():
    data = {**json.loads(GOOD.to_json()), "files": {}, "variants": {}}
    del data["acting"]  # as in the graphs of older folders
    assert GOOD.identity == hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(specs())
def test_identity_survives_config_json(spec):
    assert PolicySpec.from_json(spec.to_json()).identity == spec.identity


def test_whole_numbers_have_the_identity_that_they_have_when_they_are_read_back():
    spec = dataclasses.replace(
        GOOD,
        integration=dataclasses.replace(GOOD.integration, time_grid=(0, 0.25, 1)),
        control_rate_hz=10,
        observation_mean=(0, 0),
    )
    assert spec == GOOD
    assert spec.identity == GOOD.identity


def test_identity_does_not_depend_on_the_order_of_the_hyperparameters():
    one, other = ({"hyperparameters": {"a": 1, "b": 2}}, {"hyperparameters": {"b": 2, "a": 1}})
    assert dataclasses.replace(GOOD, **one).identity == dataclasses.replace(GOOD, **other).identity


def test_execute_steps_cannot_exceed_the_chunk():
    assert "execute_steps is 5; expected 1 to chunk_size" in error_of(changed(("execute_steps",), 5))


@pytest.mark.parametrize("shape", [[2**20, 2**20], [1] * 100, [1] * 10_000])
def test_shape_too_large_for_numpy_is_refused(shape):
    message = error_of(changed(("action", "shape"), shape))
    assert "shape of the box" in message


@pytest.mark.parametrize(
    "dtype",
    ["", "f4,f4", "f4,,", "{'a'", "object", "complex64", "M8[s]", "V4", "a", "U3", ">f4", "\0", "int0", "\ud800"],
)
def test_element_type_that_no_observation_has_is_refused(dtype):
    message = error_of(changed(("action", "dtype"), dtype))
    assert "dtype of the box" in message
    assert repr(dtype) in message


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=10))
def test_any_other_element_type_name_is_refused(dtype):
    known = {*FLOATS, *INTEGERS, "bool", "int16", "uint16", "uint32"}
    if dtype not in known:
        assert "dtype" in error_of(changed(("action", "dtype"), dtype))


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint64", "bool"])
@pytest.mark.parametrize("bounds", [(None, None), (-1e300, 1e300), (-(2**70), 2**70)])
def test_bounds_beyond_the_element_type_mean_no_bound(dtype, bounds):
    data = json.loads(changed(("action", "dtype"), dtype))
    data["action"]["low"], data["action"]["high"] = [bounds[0]], [bounds[1]]
    space = PolicySpec.from_json(json.dumps(data)).action_space
    if dtype == "float32":
        limits = (bounds[0], bounds[1]) if bounds[1] == 2**70 else (-np.inf, np.inf)
    else:
        limits = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    assert (space.low[0], space.high[0]) == (limits[0] if limits[0] is not None else -np.inf, limits[1])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"observation": ()}, "observation"),
        ({"observation": (dataclasses.replace(GOOD.observation[0], key="a"), GOOD.observation[0])}, "observation"),
        ({"observation": (dataclasses.replace(GOOD.observation[0], key="a"),) * 2}, "observation"),
        ({"action": dataclasses.replace(GOOD.action, key="a")}, "action"),
        ({"observation_mean": (0.0,)}, "observation_mean"),
        ({"observation_std": (1.0,) * 3}, "observation_std"),
        ({"observation_offset": (1.0,)}, "observation_offset is 1 numbers; expected 2 numbers"),
        ({"observation_offset": (1.0, math.nan)}, r"observation_offset\[1\] is nan; expected a finite number"),
        ({"action_offset": ()}, "action_offset"),
        ({"action_scale": (1.0, 1.0)}, "action_scale"),
        ({"solver": "rk5"}, "solver"),
        ({"solver": "rk4"}, "nfe is 2; expected a multiple of 4"),
        ({"nfe": 3}, "time_grid is 3 times; expected 4"),
        ({"time_grid": (0.0, math.nan, 1.0)}, "time_grid"),
        ({"observation_names": ("angle",)}, "observation_names is 1 names; expected 2 names, or null"),
        ({"action_names": ()}, "action_names is 0 names; expected 1 names, or null"),
        ({"files": {"policy.onnx": SHA}}, r'variants\["k3"\].file is .k3.onnx.; expected one of files: policy.onnx'),
        ({"control_rate_hz": 0.0}, "control_rate_hz"),
        ({"control_rate_hz": -10.0}, "control_rate_hz"),
        ({"acting": ActingRule(1.5)}, "acting.noise_scale is 1.5; expected 0 to 1"),
        ({"acting": ActingRule(-0.1)}, "acting.noise_scale is -0.1; expected 0 to 1"),
        ({"acting": ActingRule(math.nan)}, "acting.noise_scale is nan; expected 0 to 1"),
        (
            {"acting": dataclasses.replace(MEASURED, noise_scale=0.5)},
            'acting.measured.returns is of sample, zero; expected the rule "0.5" too',
        ),
        ({"acting": measured(episodes=0)}, "acting.measured.episodes is 0; expected 1 or more"),
        ({"acting": measured(seed=-1)}, "acting.measured.seed is -1; expected 0 or more"),
        ({"acting": measured(returns={"zero": {"return_mean": 1.0}})}, "without return_low; expected a mean return"),
        (
            {"acting": measured(returns={"zero": {**figures(0.0), "success": math.inf}})},
            r'acting.measured.returns\["zero"\]\["success"\] is inf; expected a finite number',
        ),
    ],
)
def test_parts_that_disagree_are_refused_by_name(change, name):
    with pytest.raises(FormatError, match=name):
        copy_of(GOOD, **change)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"low": (1.0,), "high": (-1.0,)}, "bounds"),
        ({"low": (math.nan,)}, "low"),
        ({"low": (math.inf,), "high": (math.inf,)}, "low"),
        ({"low": (-math.inf,), "high": (-math.inf,)}, "high"),
        ({"high": ()}, "high"),
        ({"low": (0.0, 0.0)}, "low"),
        ({"shape": (2,)}, "low"),
    ],
)
def test_box_whose_parts_disagree_is_refused(change, name):
    with pytest.raises(FormatError, match=name):
        dataclasses.replace(GOOD.action, **change)


def test_oversized_config_is_refused_before_parsing():
    assert "bytes" in error_of(b" " * (2**22 + 1))


def test_config_of_four_pictures_with_named_pixels_is_small_enough():
    count = 84 * 84 * 4
    numbers = tuple(np.random.default_rng(0).normal(size=count).tolist())
    positive = tuple(map(abs, numbers))
    box = BoxSpec((count,), "float32", tuple(-number for number in positive), positive)
    names = tuple(f"camera/pixel_{index}_channel" for index in range(count))
    statistics = {"observation_mean": numbers, "observation_std": positive, "observation_names": names}
    spec = dataclasses.replace(spec_of(box), **statistics)
    assert PolicySpec.from_json(spec.to_json()) == spec


def test_dimensions_are_the_products_of_the_shapes():
    spec = spec_of(
        BoxSpec((2, 3), "uint8", (0.0,) * 6, (255.0,) * 6, "image"),
        BoxSpec((), "float32", (0.0,), (1.0,), "gripper"),
        action=BoxSpec((2, 2), "float32", (-1.0,) * 4, (1.0,) * 4),
    )
    assert (spec.observation_dim, spec.action_dim, spec.chunk_dim, spec.noise_dim) == (7, 4, 16, 16)
    several = dataclasses.replace(spec, integration=dataclasses.replace(spec.integration, best_of=3))
    assert (several.action_dim, several.chunk_dim, several.noise_dim) == (4, 16, 48)


def test_reading_does_not_change_the_callers_data():
    spec = copy.deepcopy(GOOD)
    spec.to_json()
    assert spec == GOOD


def test_names_with_commas_are_refused_for_a_graphs_metadata_separates_them_by_commas():
    with pytest.raises(FormatError, match="observation_names is .*; expected names without commas"):
        dataclasses.replace(GOOD, observation_names=("a,b", "c"))


def test_a_printed_spec_is_one_line():
    assert repr(GOOD) == (
        f"PolicySpec(method={GOOD.method!r}, environment_id='meam/Pockets-v0', observation=2 numbers, "
        "action=1 numbers, chunk=4, Integration(nfe=2, solver='euler', time_grid=(0.0, 0.25, 1.0), best_of=1))"
    )


def test_a_measured_rule_comes_back_with_all_its_figures():
    text = GOOD.to_json()
    assert json.loads(text)["acting"] == {
        "noise_scale": 0.0,
        "measured": {
            "environment_id": "meam/Pockets-v0",
            "episodes": 50,
            "seed": 7,
            "returns": {
                "sample": {"return_mean": -19.2, "return_low": -20.2, "return_high": -18.2},
                "zero": {"return_mean": -6.9, "return_low": -7.9, "return_high": -5.9, "success": 0.5},
            },
        },
    }
    assert PolicySpec.from_json(text).acting == MEASURED


@pytest.mark.parametrize("path", [("acting", "noise"), ("acting", "measured", "episode")])
def test_a_field_that_no_rule_has_is_refused_with_the_one_that_is_meant(path):
    message = error_of(changed(path, 1))
    assert f"{'.'.join(path)} is not a field" in message
    assert "Did you mean" in message


@pytest.mark.parametrize(
    ("figure", "value", "expected"),
    [
        *((name, -1e-9, "0 or more") for name in ("parity_error", "latency_p50_ms", "latency_p99_ms")),
        ("success", 7, "0 to 1"),
        ("success", -0.1, "0 to 1"),
    ],
)
def test_a_figure_out_of_its_range_is_refused_by_name(figure, value, expected):
    message = error_of(changed(("variants", "k3", "measured", figure), value))
    assert message == f'config.json: variants["k3"].measured["{figure}"] is {float(value)}; expected {expected}.'


@pytest.mark.parametrize("figure", ["action_error", "ode_error", "sliced_w1"])
def test_a_difference_from_a_policy_that_draws_other_samples_is_refused(figure):
    message = error_of(changed(("variants", "k3", "measured", figure), 0.0))
    assert message == (
        f'config.json: variants["k3"].measured["{figure}"] is 0.0; expected none, since its best_of is 3 and the '
        "policy's is another."
    )
    alike = dataclasses.replace(GOOD.variants["k3"], integration=Integration(2), measured={figure: -1e-9})
    with pytest.raises(FormatError, match=f'"{figure}"\\] is -1e-09; expected 0 or more'):
        dataclasses.replace(GOOD, variants={"k3": alike})


def test_a_figure_that_is_not_known_is_refused_like_any_unknown_field():
    assert error_of(changed(("variants", "k3", "measured", "parity_eror"), 0)) == (
        'config.json: variants["k3"].measured["parity_eror"] is not a figure of this format version. '
        'Did you mean variants["k3"].measured["parity_error"]?'
    )
    assert "is not a figure" in error_of(changed(("acting", "measured", "returns", "zero", "latency_p50_ms"), 1))


@pytest.mark.parametrize(
    ("figures", "first"),
    [
        ({"return_low": 2.0, "return_mean": 1.0}, "return_low"),
        ({"return_mean": 2.0, "return_high": 1.0}, "return_mean"),
        ({"latency_p50_ms": 2.0, "latency_p99_ms": 1.0}, "latency_p50_ms"),
    ],
)
def test_figures_that_contradict_each_other_are_refused(figures, first):
    message = error_of(changed(("variants", "k3", "measured"), figures))
    assert f'variants["k3"].measured["{first}"] is 2.0; expected at most' in message


@pytest.mark.parametrize(
    ("path", "value", "seen"),
    [
        (("returns", "zero", "success"), 7, 'returns["zero"]["success"] is 7.0; expected 0 to 1'),
        (("returns", "zero", "return_low"), 0, 'returns["zero"]["return_low"] is 0.0; expected at most return_mean'),
        (("returns", "zero", "gain_low"), math.inf, "must be finite"),
        (("returns", "fast"), figures(1.0), "returns is 'fast'; expected sample, zero, a noise scale"),
        (("returns", "1"), figures(1.0), "returns is '1'; expected sample, zero, a noise scale"),
        (("returns", "best-of-1"), figures(1.0), "returns is 'best-of-1'; expected sample"),
        (("episodes",), 0, "episodes is 0; expected 1 or more"),
        (("seed",), -1, "seed is -1; expected 0 or more"),
    ],
)
def test_what_cannot_have_been_measured_of_a_rule_is_refused(path, value, seen):
    assert seen in error_of(changed(("acting", "measured", *path), value))


@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.1234567, 0.25, 0.9999999, 1.0])
@pytest.mark.parametrize("best_of", [1, 2, 10_000])
def test_every_name_that_a_rule_has_may_be_measured(scale, best_of):
    rule = ActingRule(scale, ActingMeasurement("id", 1, 0, {rule_name(scale, best_of): figures(1.0)}))
    how = Integration(1, best_of=best_of)
    spec = dataclasses.replace(GOOD, integration=how, acting=rule, variants={})
    assert PolicySpec.from_json(spec.to_json()).acting == rule


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"one_step": True, "nfe": 2}, "nfe is 2; expected 1, of a one-step policy"),
        ({"one_step": True, "best_of": 2}, "best_of is 2; expected 1, of a one-step policy"),
        ({"takes_prefix": True, "best_of": 2}, "best_of is 2; expected 1, of a graph that takes a prefix"),
        ({"one_step": True, "takes_prefix": True}, "takes_prefix is true; expected false, of a one-step policy"),
    ],
)
def test_a_variant_that_no_export_writes_is_refused(changes, seen):
    plain = {"nfe": 1, "solver": "euler", "time_grid": None, "best_of": 1}
    variant = {**json.loads(GOOD.to_json())["variants"]["k3"], **plain, **changes}
    assert error_of(changed(("variants", "k3"), variant)) == f'config.json: variants["k3"].{seen}.'


def test_a_variant_acts_by_the_rule_of_the_policy_unmeasured_unless_it_draws_other_samples():
    plain = VariantSpec(file="k3.onnx", integration=Integration(nfe=4))
    choosing = VariantSpec(file="k3.onnx", integration=Integration(nfe=4, best_of=4))
    assert GOOD.acting_as(plain).acting == ActingRule(0.0)
    assert GOOD.acting_as(choosing).acting == ActingRule(1.0)
    assert [spec.acting_name for spec in (GOOD, GOOD.acting_as(plain), GOOD.acting_as(choosing))] == [
        "zero",
        "zero",
        "best-of-4",
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("sample", (1.0, 1)),
        ("1", (1.0, 1)),
        ("zero", (0.0, 1)),
        ("0", (0.0, 1)),
        ("0.5", (0.5, 1)),
        ("best-of-4", (1.0, 4)),
    ],
)
def test_a_rule_is_what_its_name_says(text, rule):
    assert parse_acting(text) == rule
    assert parse_acting(rule_name(*rule)) == rule


@pytest.mark.parametrize("text", ["", "samples", "1.5", "-0.1", "nan", "inf", "best-of-1", "best-of-4 at 0.5", "auto"])
def test_what_is_no_rule_is_refused_with_those_there_are(text):
    with pytest.raises(ConfigError, match=f'no acting rule "{text}"; expected sample, zero, a noise scale'):
        parse_acting(text)


def test_a_rule_in_words_has_its_return_and_those_of_the_others():
    assert ActingRule().describe(1) == "sample (noise scale 1), not measured"
    assert ActingRule(0.5).describe(4) == "best-of-4 at 0.5 (noise scale 0.5), not measured"
    assert MEASURED.describe(1) == (
        "zero (noise scale 0): return -6.9 (-7.9 … -5.9) over 50 episodes of meam/Pockets-v0 from seed 7; "
        "compared with sample -19.2 (-20.2 … -18.2)"
    )
