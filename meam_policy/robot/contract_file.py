"""The files of a robot's contract: `robot.json` in a policy folder, and the `robot.toml` that people write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

from meam_policy.errors import ConfigError, FormatError
from meam_policy.robot.contract import RobotContract
from meam_policy.robot.limits import ActionLimits
from meam_policy.robot.vocabulary import ACTION_KINDS, EXTRA, OBSERVATION_KINDS, UNITS
from meam_policy.spec import PolicySpec
from meam_policy.spec.json_reader import parse_object
from meam_policy.spec.names import NamedNumber
from meam_policy.toml_file import read_toml

__all__ = ["CONTRACT_FILE", "contract_text", "given_contract", "parse_contract", "read_contract_toml", "skeleton"]

CONTRACT_FILE = "robot.json"
FORMAT_VERSION = 1
"""Version of `robot.json` that this package writes, and the only one that it reads."""


def contract_text(contract: RobotContract) -> str:
    """The text of `robot.json`."""
    return json.dumps({"format_version": FORMAT_VERSION, **contract.to_json()}, indent=2, allow_nan=False) + "\n"


def parse_contract(text: bytes, spec: PolicySpec) -> RobotContract:
    """Read the text of a policy folder's `robot.json`.

    Raises:
        FormatError: it does not have the expected format, or does not fit the policy.
    """
    data = parse_object(text, CONTRACT_FILE)
    version = data.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{CONTRACT_FILE}: format_version is {version!r}; this meam-policy reads version {FORMAT_VERSION}. "
            "Upgrade meam-policy, or export the policy again."
        )
    return _checked(CONTRACT_FILE, data, spec)


def read_contract_toml(path: str | os.PathLike[str], spec: PolicySpec) -> RobotContract:
    """Read a contract that a person wrote, and check it against the policy.

    Raises:
        NotFoundError: there is no such file, or it cannot be read.
        ConfigError: it is not TOML.
        FormatError: it is no contract, or none of this policy.
    """
    return _checked(os.fspath(path), read_toml(path, "robot contract", "`meam robot init` writes one"), spec)


def given_contract(contract: RobotContract | str | os.PathLike[str], spec: PolicySpec) -> RobotContract:
    """A contract that fits the policy, from an object or a `robot.toml`, with the errors of `read_contract_toml`.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(contract, RobotContract):
        _require_fit(contract, spec)
        return contract
    if not isinstance(contract, (str, os.PathLike)):
        raise ConfigError(f"robot is {contract!r}; expected the path of a robot.toml, or a RobotContract.")
    return read_contract_toml(contract, spec)


def _checked(file: str, data: dict[str, object], spec: PolicySpec) -> RobotContract:
    try:
        contract = RobotContract.from_object(data)
        _require_fit(contract, spec)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error
    return contract


def _require_fit(contract: RobotContract, spec: PolicySpec) -> None:
    contract.check(spec)
    ActionLimits.of(contract, spec)  # something must lie between them


def skeleton(spec: PolicySpec) -> str:
    """A `robot.toml` with what is known of a policy, and comments that say what else may be given.

    It is a valid contract as it is.
    """
    rate = spec.control_rate_hz
    lines = [
        "# What the numbers of this policy are on the robot. Correct the kinds and units, and give limits and rates;",
        "# leave out what does not matter. Then, with this policy's folder: meam robot add POLICY robot.toml "
        "--output-dir DIR",
        "# or with the training run that it comes from: meam export RUN --robot robot.toml --output-dir DIR",
        *_wrapped("units", UNITS),
        "",
        "[timing]",
        f"rate_hz = {rate!r}" if rate is not None else "# rate_hz = 50.0           # actions per second",
        "# latency_budget_ms = 10.0    # an inference that takes longer is counted",
        "# max_observation_age_s = 0.1 # older observations are not acted on",
        '# interpolation = "linear"    # between two actions: hold, linear or spline; for faster controllers',
        "# blend_in_s = 1.0            # first actions come gradually, from measured positions or the defaults",
        '# on_failure = "hold"         # without an action: hold, neutral (zero), home (the defaults) or disable',
        "",
        *_wrapped("kinds of an observation", (*OBSERVATION_KINDS, f"{EXTRA}…")),
        *_numbers("observation", spec.observation_numbers),
        "",
        *_wrapped("kinds of an action", (*ACTION_KINDS, f"{EXTRA}…")),
        "# representation: absolute (the target itself), delta_to_state or delta_to_last",
        *_numbers("action", spec.action_numbers),
    ]
    return "\n".join(lines) + "\n"


def _wrapped(title: str, words: Sequence[str], width: int = 110) -> Iterator[str]:
    line = f"# {title}:"
    for word in words:
        if len(line) + len(word) + 1 > width:
            yield line
            line = "#  "
        line += f" {word}," if word is not words[-1] else f" {word}"
    yield line


def _numbers(table: str, numbers: Sequence[NamedNumber]) -> Iterator[str]:
    action = table == "action"
    for number in numbers:
        name = number.name or f"{table}_{number.index}"
        yield ""
        yield f"[[{table}]]  # number {number.index}, from {number.low:g} to {number.high:g}"
        if number.key is not None:
            yield f"key = {_text(number.key)}"
        yield f"name = {_text(name)}"
        yield f"kind = {_text(EXTRA + name)}"
        yield f"unit = {_text(number.unit if number.unit in UNITS else '1')}"
        yield '# joint = "elbow"'
        if action:
            low, high = (f"{bound!r}" for bound in (number.low, number.high))
            yield f"# lower = {low}"
            yield f"# upper = {high}"
            yield "# max_rate = 1.0  # per second"
            yield "# default = 0.0   # the home pose"


def _text(text: str) -> str:
    # A basic string of TOML is one of JSON, but for the characters that JSON may leave as they are.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
