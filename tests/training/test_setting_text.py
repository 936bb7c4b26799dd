"""The same message in Python's words and in those of the command line."""

import copy
import pickle
import re
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy.errors import ConfigError, MeamError
from meam_training.commands import train as train_command
from meam_training.config import PRESETS, TrainConfig
from meam_training.config.declaration import Field, fields_of
from meam_training.runs.options import as_flag, flag, option
from meam_training.setting_text import SettingText, in_notation, said

FIELDS = {name: field for name, field in fields_of(TrainConfig).items() if name != "method"}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 5, 7, 1000, 2**40])
IN_PYTHON = re.compile(rf"(?<![\w-])({'|'.join(name for name in FIELDS if '_' in name)})(?!\w)|\w=|TrainConfig")


def typed_values(field: Field) -> st.SearchStrategy[Any]:
    """Values that the parser of the command line takes for a setting, in its range or not."""
    kind = get_args(field.kind)[0] if get_origin(field.kind) is tuple else field.kind
    if get_origin(kind) is Literal:
        one: st.SearchStrategy[Any] = st.sampled_from(get_args(kind))
    else:
        texts = st.sampled_from(["auto", "cpu", "tpu", "{steps}", "{0}"])
        one = {bool: st.booleans(), str: texts, int: NUMBERS, float: NUMBERS | st.sampled_from([0.5, 1e300])}[kind]
    return st.lists(one, min_size=1, max_size=2).map(tuple) if get_origin(field.kind) is tuple else one


@st.composite
def given_settings(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(list(FIELDS)), min_size=1, max_size=3, unique=True))
    return {name: draw(typed_values(FIELDS[name])) for name in names}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(PRESETS)), given_settings())
def test_what_the_command_line_refuses_is_refused_in_its_own_words(preset, values):
    try:
        TrainConfig.preset(preset, **values)
        python = None
    except ConfigError as error:
        python = str(error)
    arguments = [preset, "--data", "walk.npz", "--output-dir", "run"]
    for name, value in values.items():
        arguments += option(name, value, None)
    try:
        with in_notation(as_flag):
            parsed = train_command._parse(arguments, "meam train")
    except MeamError as error:
        typed = str(error)
    else:
        assert python is None
        assert {name: getattr(parsed.config, name) for name in values} == values
        return
    assert python is not None
    assert "--" not in python
    fixed = "In Python, " in typed  # where both ways are named
    assert IN_PYTHON.search(typed.partition("In Python, ")[0] if fixed else typed) is None
    named = [name for name in FIELDS if re.match(rf"{name} (is|has) ", python)]
    assert all(typed.startswith(f"{flag(name)} ") for name in named)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_named_by_its_flag_where_its_value_is_out_of_range(name):
    field = FIELDS[name]
    bad: Any = {int: -1, float: -1e300, str: 3, bool: 3}.get(field.kind, 3)
    if get_origin(field.kind) is Literal or get_args(field.kind)[:1] == (Any,):
        return  # the parser of the command line knows the choices
    if field.kind is float and bad in field.range:
        bad = float("inf")
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: bad})
    assert str(caught.value).startswith(f"{name} is {bad!r}; expected ")
    with pytest.raises(ConfigError) as caught, in_notation(as_flag):
        TrainConfig(**{name: bad})
    assert str(caught.value).startswith(f"{flag(name)} is {bad!r}; expected ")


@pytest.mark.parametrize(
    ("template", "values", "python", "typed"),
    [
        ("set {chunk_size:{0}}", (5,), "set chunk_size=5", "set --chunk-size 5"),
        ("{0!r} of {steps}", ("{steps}",), "'{steps}' of steps", "'{steps}' of --steps"),
        ('take {method:"qam"}', (), 'take method="qam"', "take preset qam"),
        ("another {method}", (), "another method", "another preset"),
        (
            "{compile:False} or {pad_chunks:True}",
            (),
            "compile=False or pad_chunks=True",
            "--no-compile or --pad-chunks",
        ),
        ("{kl_budget:None}", (), "kl_budget=None", "--kl-budget None"),
        ("{hidden_dims:(8, 8)}", (), "hidden_dims=(8, 8)", "--hidden-dims 8 8"),
    ],
)
def test_settings_are_named_and_set_in_either_notation(template, values, python, typed):
    text = SettingText(template, *values)
    assert text == python
    assert text.shown(as_flag) == said(text, as_flag) == typed
    assert said(python, as_flag) == python  # any other text stays as it is
    for copied in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert copied == python
        assert copied.shown(as_flag) == typed


def test_what_is_set_on_the_command_line_is_read_as_what_is_set_in_python():
    arguments = ["me-am", "--data", "walk.npz", "--output-dir", "run"]
    for name, value in (("chunk_size", "5"), ("pad_chunks", "False"), ("hidden_dims", "(8, 9)"), ("kl_budget", "None")):
        arguments += as_flag(name, value).split()
    config = train_command._parse(arguments, "meam train").config
    assert config == TrainConfig.preset("me-am", chunk_size=5, pad_chunks=False, hidden_dims=(8, 9), kl_budget=None)
