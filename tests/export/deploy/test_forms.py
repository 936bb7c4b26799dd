"""LEAPP bundles, exploy's names, physicalai's packages and plain graphs: what they say, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnx
import pytest
import safetensors.numpy
import yaml
from gymnasium import spaces

from meam_export.commands import deploy
from meam_export.deploy.exploy import write_exploy
from meam_export.deploy.leapp import kinds_by_message, write_leapp_bundle
from meam_export.deploy.leapp_check import check_leapp_bundle
from meam_export.deploy.manifest import write_manifest
from meam_export.deploy.plain import write_plain
from meam_export.deploy.source import Source, read_source
from meam_export.deploy.tick_graph import TickSettings, build_tick
from meam_policy import ConfigError, FormatError, IntegrityError, NotFoundError, OutputError
from meam_policy.graph.graph_check import check_graph
from meam_policy.robot import RobotContract

Make = Callable[..., Source]
Contract = Callable[..., RobotContract]


@pytest.fixture
def arm(make_source: Make, make_contract: Contract) -> Source:
    return make_source(make_contract(0.7))


# LEAPP


@pytest.fixture
def bundle(arm: Source, tmp_path: Path) -> Path:
    return write_leapp_bundle(arm, tmp_path / "bundle")[0]


def test_a_bundle_describes_its_graph(bundle: Path, arm: Source) -> None:
    assert sorted(file.name for file in bundle.iterdir()) == [
        "bundle.onnx",
        "bundle.yaml",
        "bundle_initial_values.safetensors",
    ]
    description = yaml.safe_load((bundle / "bundle.yaml").read_text())
    node, pipeline = description["models"]["policy"], description["pipeline"]
    graph = (bundle / "bundle.onnx").read_bytes()
    assert node["parameters"]["md5sum"] == hashlib.md5(graph).hexdigest()
    assert node["parameters"]["sha256sum"] == hashlib.sha256(graph).hexdigest()
    assert node["inputs"][0] == {
        "name": "state_joint_position",
        "dtype": "float32",
        "shape": [1, 2],
        "type": "tensor",
        "kind": "state/joint/position",
        "element_names": [[], ["a", "b"]],
        "units": ["rad", "rad"],
    }
    (action,) = (tensor for tensor in node["outputs"] if tensor["name"] == "target_joint_position")
    assert (action["upper"], action["max_rate"]) == ([0.3, 0.3], [0.7, 0.7])
    assert pipeline["outputs"] == {"policy": ["target_joint_position", "kp", "kd"]}
    assert pipeline["feedback_flow"] == pipeline["feedback_connections"]
    assert pipeline["feedback_flow"]["policy/queue_out"] == ["policy/queue_in"]
    assert pipeline["configs"]["frequency"] == 20
    assert description["semantic"]["scene"]["dt"] == 0.05
    state = safetensors.numpy.load((bundle / pipeline["initial_values"]).read_bytes())
    assert {name: array.shape for name, array in state.items()} == {
        "policy/queue_in": (1, 4, 2),
        "policy/state_in": (1, 2),
        "policy/last_in": (1, 3),
    }
    assert not any(array.any() for array in state.values())


DAMAGES: dict[str, tuple[str, str, str]] = {
    "md5": ("md5sum: ", "md5sum: 0", "md5sum of bundle.onnx is 0"),
    "sha256": ("sha256sum: ", "sha256sum: 0", "sha256sum of bundle.onnx is 0"),
    "kind": ("state/joint/velocity", "state/joint/speed", "the kind of state_joint_velocity is 'state/joint/speed'"),
    "shape": ("shape: [1, 4, 2]", "shape: [1, 5, 2]", r"shape of queue_in is \[1, 5, 2\]; expected the .*\[1, 4, 2\]"),
    "dtype": ("dtype: float32", "dtype: float64", "the dtype of state_joint_position is 'float64'; expected .*float32"),
    "name": ("- name: state_in", "- name: counter_in", "the list of inputs is .*counter_in"),
    "element names": ("- [a, b]", "- [a, b, c]", r"element_names of state_joint_position is .*'c'\]\]; expected none"),
    "no element names": (
        "element_names:\n      - []\n      - [a, b]",
        "element_names: []",
        r"position is \[\]; expected",
    ),
    "feedback": (
        "policy/state_out: [policy/state_in]",
        "policy/state_out: []",
        "feedback_flow is .*expected every state",
    ),
    "crossed feedback": (
        "queue_out: [policy/queue_in]",
        "queue_out: [policy/last_in]",
        "feedback_flow is .*every state",
    ),
    "pipeline inputs": ("policy: [state_joint_position, ", "policy: [", "pipeline.inputs is .*no state"),
    "pipeline outputs": ("policy: [target_joint_position, kp, kd", "policy: [kp, kd", "pipeline.outputs is"),
    "time of a step": ("dt: 0.05", "dt: 0.02", "dt is 0.02; expected the time of a step at the frequency, 20.0 Hz"),
    "a huge step": ("dt: 0.05", "dt: .inf", "dt is inf"),
    "another node": (
        "  policy:\n    formatting",
        "  network:\n    formatting",
        "is no LEAPP bundle .*KeyError: 'policy'",
    ),
    "no pipeline": ("pipeline:", "pipe:", "is no LEAPP bundle"),
    "no system information": ("system information:", "system:", "is no LEAPP bundle"),
    "no YAML": ("models:", "models: ]", "is no LEAPP bundle"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundles_are_refused(bundle: Path, damage: str) -> None:
    old, new, message = DAMAGES[damage]
    file = bundle / "bundle.yaml"
    check_leapp_bundle(file)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(FormatError, match=message):
        check_leapp_bundle(file)


def test_a_bundle_that_does_not_begin_at_zero_is_refused(bundle: Path) -> None:
    file, values = bundle / "bundle.yaml", bundle / "bundle_initial_values.safetensors"
    zeros = safetensors.numpy.load(values.read_bytes())

    def refused(message: str, **changes: Any) -> None:
        state = {**zeros, **{f"policy/{name}": array for name, array in changes.items()}}
        values.write_bytes(safetensors.numpy.save({name: array for name, array in state.items() if array is not None}))
        with pytest.raises(FormatError, match=message):
            check_leapp_bundle(file)

    refused(r"initial_values is .*; expected the states", state_in=None)
    refused(r"the initial shape of policy/last_in is \[1, 2\]; expected \[1, 3\]", last_in=np.zeros((1, 2), np.float32))
    refused(r"the initial value of policy/state_in is .*7.*; expected zeros", state_in=np.array([[0, 7]], np.float32))
    refused(r"has the dtype 'F64'; expected F32", state_in=np.zeros((1, 2)))
    values.write_bytes(b"")
    with pytest.raises(FormatError, match="is not a valid safetensors file"):
        check_leapp_bundle(file)
    values.unlink()
    with pytest.raises(NotFoundError, match=r"Cannot read .*bundle_initial_values\.safetensors"):
        check_leapp_bundle(file)
    with pytest.raises(NotFoundError, match="is a folder; expected the YAML file of a bundle"):
        check_leapp_bundle(bundle)


def test_a_bundle_whose_graph_is_none_is_refused(bundle: Path) -> None:
    file, graph = bundle / "bundle.yaml", b"no ONNX"
    before = (bundle / "bundle.onnx").read_bytes()
    (bundle / "bundle.onnx").write_bytes(graph)
    text = file.read_text()
    for digest in (hashlib.md5, hashlib.sha256):
        text = text.replace(digest(before).hexdigest(), digest(graph).hexdigest())
    file.write_text(text)
    with pytest.raises(FormatError, match=r"bundle\.onnx"):
        check_leapp_bundle(file)


def test_a_bundle_whose_graph_was_swapped_is_refused(bundle: Path, arm: Source) -> None:
    (bundle / "bundle.onnx").write_bytes(arm.graph)
    with pytest.raises(IntegrityError, match=r"^bundle\.yaml: md5sum of bundle.onnx is .* and the file's is"):
        check_leapp_bundle(bundle / "bundle.yaml")
    (bundle / "bundle.onnx").unlink()
    with pytest.raises(NotFoundError, match=r"Cannot read .*bundle\.onnx"):
        check_leapp_bundle(bundle / "bundle.yaml")


def test_a_bundle_of_unknown_meaning_or_rate_is_refused(
    make_source: Make, make_contract: Contract, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="arm has no robot.json .* Write one with `meam robot init`"):
        write_leapp_bundle(make_source(), tmp_path / "b")
    with pytest.raises(ConfigError, match="Nobody says how often slow acts, which a LEAPP bundle needs"):
        write_leapp_bundle(make_source(make_contract(), control_rate_hz=None, name="slow"), tmp_path / "b")
    with pytest.raises(ConfigError, match='noise is "input"'):
        write_leapp_bundle(make_source(make_contract(), name="fed"), tmp_path / "b", TickSettings(noise="input"))
    assert not (tmp_path / "b").exists()


def changed(robot: RobotContract, side: str, **changes: Any) -> RobotContract:
    """The contract with other words for the second number of a side."""
    data = json.loads(json.dumps(robot.to_json()))
    data[side][1] |= changes
    return RobotContract.from_object(
        {**data, side: [{k: v for k, v in n.items() if v is not None} for n in data[side]]}
    )


@pytest.mark.parametrize(
    ("side", "changes", "message"),
    [
        ("action", {"representation": "delta_to_state"}, "b is delta_to_state in robot.json; expected absolute"),
        ("observation", {"unit": "deg/s"}, "a velocity is in deg/s in robot.json; expected radians"),
        ("action", {"stiffness": None}, "b has no stiffness in robot.json, and others have"),
    ],
)
def test_what_readers_would_take_for_something_else_is_refused(
    make_source: Make, make_contract: Contract, tmp_path: Path, side: str, changes: dict[str, Any], message: str
) -> None:
    source = make_source(changed(make_contract(), side, **changes))
    with pytest.raises(ConfigError, match=message):
        write_leapp_bundle(source, tmp_path / "b")


def test_gains_are_by_joint_and_kinds_of_both_sides_have_names_of_their_own(make_source: Make, tmp_path: Path) -> None:
    number = {"kind": "extra/x", "unit": "1"}
    observation = [{"name": f"o{i}", **number} for i in range(4)]
    action = [{"name": f"act {j}", "joint": j, **number, "stiffness": 1.0, "damping": 0.0} for j in ("left", "right")]
    source = make_source(RobotContract.from_object({"observation": observation, "action": action}))
    folder, _ = write_leapp_bundle(source, tmp_path / "b")
    node = yaml.safe_load((folder / "b.yaml").read_text())["models"]["policy"]
    outputs = {tensor["name"]: tensor for tensor in node["outputs"]}
    assert [tensor["name"] for tensor in node["inputs"]][:1] == ["extra_x"]
    assert outputs["extra_x_2"]["element_names"] == outputs["kp"]["element_names"] == [[], ["left", "right"]]


def test_kinds_that_isaac_does_not_convert_are_named(make_contract: Contract) -> None:
    assert kinds_by_message(make_contract()) == ()
    force = {"name": "f", "kind": "extra/force", "unit": "N"}
    other = RobotContract.from_object({"observation": [force], "action": []})
    assert kinds_by_message(other) == ("extra/force",)


# exploy: names that its matchers take (control/include/exploy/matcher.hpp, control/src/matcher.cpp), and metadata.

EXPLOY = json.loads((Path(__file__).parent / "exploy.json").read_text())


@pytest.mark.parametrize("form", ["where", "if"])
def test_exploy_finds_its_names_and_metadata(arm: Source, tmp_path: Path, form: Any) -> None:
    file, found = write_exploy(arm, tmp_path / "e.onnx", TickSettings(form))
    assert found.ticks > 60
    model = onnx.load_model_from_string(file.read_bytes())
    assert sorted(value.name for value in model.graph.input) == EXPLOY["inputs"]
    assert sorted(value.name for value in model.graph.output) == EXPLOY["outputs"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert EXPLOY["metadata"].keys() <= metadata.keys()
    assert json.loads(metadata["exploy_version"]) == "0.1"
    assert metadata["update_rate"] == "20"
    assert json.loads(metadata["obj.robot.joints"]) == {"joint_names": ["a", "b"]}
    assert json.loads(metadata["output.joint_targets.robot"]) == {
        "names": ["a", "b"],
        "stiffness": [80.0, 80.0],
        "damping": [2.0, 2.0],
    }
    check_graph(file.read_bytes(), conditional=form == "if")


def test_what_exploy_cannot_say_is_refused(make_source: Make, make_contract: Contract, tmp_path: Path) -> None:
    def refused(message: str, robot: RobotContract | None, **changes: Any) -> None:
        number = len(list(tmp_path.iterdir()))
        with pytest.raises(ConfigError, match=message):
            write_exploy(make_source(robot, name=f"arm{number}", **changes), tmp_path / "e.onnx")

    refused("no robot.json", None)
    refused("a has no stiffness in robot.json; expected one", make_contract(gains=False))
    refused("rate_hz is 12.5; expected a whole number", make_contract(rate_hz=12.5), control_rate_hz=12.5)
    data = json.loads(json.dumps(make_contract().to_json()))
    data["observation"][0]["unit"] = "deg"
    refused("a position is in deg in robot.json; expected radians", RobotContract.from_object(data))
    data["observation"][0] |= {"unit": "1", "kind": "extra/x"}
    refused("The observation has numbers of extra/x; expected state/joint/position", RobotContract.from_object(data))
    data = json.loads(json.dumps(make_contract().to_json()))
    data["action"][1] |= {"kind": "target/joint/velocity", "unit": "rad/s"}
    refused("The actions are of several kinds", RobotContract.from_object(data))


# physicalai


def test_a_package_maps_a_state_to_the_executed_actions(make_source: Make, tmp_path: Path) -> None:
    source = make_source()
    folder, found = write_manifest(source, tmp_path / "package")
    assert found.ticks == 600
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["policy"]["name"]) == ("policy_package", "meam")
    assert manifest["model"]["runner"] == {"type": "single_pass"}  # any parameter is refused by 0.3.0
    graph = onnx.load(folder / f"{manifest['policy']['name']}.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["state", "action"]
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == [1, 3, 2]
    (robot,) = manifest["hardware"]["robots"]
    assert (robot["state"]["shape"], robot["action"]["shape"]) == ([4], [2])


def test_a_package_has_the_contracts_names_and_rate(make_source: Make, make_contract: Contract, tmp_path: Path) -> None:
    source = make_source(make_contract(rate_hz=25.0), control_rate_hz=None)
    folder, _ = write_manifest(source, tmp_path / "package")
    manifest = json.loads((folder / "manifest.json").read_text())
    (robot,) = manifest["hardware"]["robots"]
    assert robot["state"]["order"] == ["a position", "a velocity", "b position", "b velocity"]
    assert robot["action"]["order"] == ["a", "b"]
    assert (manifest["meam"]["control_rate_hz"], manifest["meam"]["spec_sha256"]) == (25.0, source.spec.identity)


def test_a_package_keeps_no_rate_so_none_is_dropped(arm: Source, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"robot\.json has a max_rate"):
        write_manifest(arm, tmp_path / "package")


# Plain


class Push(gymnasium.Env[Any, Any]):
    """Pays the first number of the action; ten steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = spaces.Box(np.array([-1, -2], np.float32), np.array([1, 0.5], np.float32))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 10
        return self.observation(), {}

    def observation(self) -> Any:
        return np.array([1, -20, 300, 0], np.float32) + self.np_random.normal(size=4).astype(np.float32) * 0.01

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return self.observation(), float(action[0]), self.left == 0, False, {}


def test_plain_is_written_with_its_own_return(make_source: Make, tmp_path: Path) -> None:
    source = make_source()
    with contextlib.closing(Push()) as env:
        file, result = write_plain(source, tmp_path / "plain.onnx", env, "Push", episodes=4)
    metadata = check_graph(file.read_bytes()).metadata
    assert float(metadata["meam_return_mean"]) == pytest.approx(result.return_mean)
    assert (metadata["meam_tick"], metadata["meam_episodes"]) == ("plain", "4")
    graph = onnx.load(file).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["observation", "actions"]
    policy = source.acting()
    with contextlib.closing(Push()) as env:
        returns = []
        for episode in range(4):
            observation, _ = env.reset(seed=episode)
            total, ends = 0.0, False
            while not ends:
                policy.reset()
                observation, reward, ends, *_ = env.step(policy.act(observation, deterministic=True))
                total += reward
            returns.append(total)
    np.testing.assert_allclose(result.returns, returns)


# The command


def run(*arguments: object) -> None:
    deploy.run([str(argument) for argument in arguments], "meam deploy")


def test_the_command_writes_every_form(
    make_source: Make, make_contract: Contract, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(make_contract())
    forms = {"tick": "t.onnx", "leapp": "l", "exploy": "e.onnx", "manifest": "m"}
    flags = [part for name, file in forms.items() for part in (f"--{name}", tmp_path / "out" / file)]
    run(tmp_path / "arm", *flags, "--form", "if", "--rows", 9, "--json")
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found.keys() == forms.keys()
    assert all(Path(entry["path"]).exists() and entry["ticks"] > 60 for entry in found.values())
    assert "acts by zero noise, which physicalai needs; arm itself draws noise" in captured.err
    metadata = check_graph((tmp_path / "out/t.onnx").read_bytes(), conditional=True).metadata
    assert (metadata["meam_tick"], metadata["meam_noise_rows"]) == ("if", "9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Nothing is to be written; give --tick, --leapp"),
        (("--manifest", "m", "--form", "if"), "--form has no effect without --tick"),
        (("--plain", "p.onnx"), "written only with its own measured return; --episodes is 0"),
        (("--tick", "t.onnx", "--episodes", "5"), "--episodes has no effect without --plain"),
        (("--tick", "t.onnx", "--rows", "0"), "rows is 0"),
        (("--tick", "t.onnx", "--rows", "9", "--noise", "zero"), "--rows has no effect with noise zero"),
        (("--tick", "t.onnx", "--variant", "k3"), 'no variant "k3"'),
    ],
)
def test_what_has_no_effect_is_refused(
    make_source: Make, tmp_path: Path, monkeypatch: Any, arguments: tuple[str, ...], message: str
) -> None:
    make_source()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run("arm", *arguments)


def test_places_that_cannot_be_written_are_refused(make_source: Make, tmp_path: Path) -> None:
    source = make_source()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Cannot write .*file/t\.onnx"):
        run(tmp_path / "arm", "--tick", tmp_path / "file" / "t.onnx")
    run(tmp_path / "arm", "--tick", tmp_path / "t.onnx")
    before = (tmp_path / "arm/policy.onnx").read_bytes()
    for there in (tmp_path / "t.onnx", tmp_path / "arm/policy.onnx"):
        with pytest.raises(OutputError, match="exists already. Choose another file, or delete it first"):
            run(tmp_path / "arm", "--tick", there)
    assert (tmp_path / "arm/policy.onnx").read_bytes() == before
    with pytest.raises(NotFoundError):
        read_source(tmp_path / "nowhere", variant=None)
    with pytest.raises(OutputError, match=r"file/package cannot be written: Not a directory"):
        write_manifest(source, tmp_path / "file" / "package")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    with pytest.raises(OutputError, match="already holds something"):
        write_manifest(source, full)


def test_large_coordinates_are_said_to_lose_digits(
    make_source: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(observation_offset=(0.0, 4.5e6, 0.0, 0.0))
    run(tmp_path / "arm", "--tick", tmp_path / "t.onnx")
    assert "in which the policy's large coordinates lose digits" in capsys.readouterr().err


def test_a_tick_graph_is_that_of_the_policy_beside_it(arm: Source) -> None:
    tick = build_tick(arm.graph, arm.spec, arm.robot)
    assert check_graph(tick.graph).metadata["meam_graph_sha256"] == arm.sha256
