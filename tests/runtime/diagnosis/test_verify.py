import dataclasses
import hashlib
import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from meam_policy import (
    ActionError,
    BoxSpec,
    ConfigError,
    DeviceError,
    FormatError,
    IntegrityError,
    MeamError,
    NotFoundError,
    ParityError,
    PolicySpec,
    VersionError,
    cli,
)
from meam_policy.commands.verify import run
from meam_policy.diagnosis import verify
from meam_policy.diagnosis.verify import TOLERANCE, verify_policy
from meam_policy.folder.golden import Golden
from meam_policy.folder.policy_folder import sha256
from meam_policy.inference.session import PolicySession
from meam_policy.spec import ActingRule

pytest.importorskip("onnxruntime")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

COUNT = 5
WEIGHTS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without arrays."""
WIDE = BoxSpec(shape=(2,), dtype="float32", low=(-4.0, -4.0), high=(4.0, 4.0))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(verify, "_PAUSE_S", 0.0)


def put(folder, name, data):
    """Put a file into a policy folder, with a config.json that vouches for it."""
    (folder / name).write_bytes(data)
    spec = PolicySpec.from_json((folder / "config.json").read_bytes())
    spec = dataclasses.replace(spec, files={**spec.files, name: sha256(data)})
    (folder / "config.json").write_text(spec.to_json())


def with_weight_of(dtype, graph):
    """The graph with one weight more, of a type, which nothing reads."""
    model = onnx.load_from_string(graph)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, dtype), "unread"))
    return model.SerializeToString()


def put_golden(folder, **arrays):
    put(folder, "golden.safetensors", safetensors_numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


def draw(linear, seed=0):
    """Inputs whose actions are exact in float32, and those actions."""
    random, spec = np.random.default_rng(seed), linear.spec
    rows = (random.integers(-8, 9, (COUNT, spec.observation_dim)) / 8).astype(np.float32)
    noise = (random.integers(-8, 9, (COUNT, spec.noise_dim)) / 8).astype(np.float32)
    return {"observation": rows, "noise": noise, "actions": linear.chunks(rows, noise).astype(np.float32)}


@pytest.fixture
def make_golden(make_policy):
    def make(**arguments):
        linear = make_policy(**arguments)
        put_golden(linear.folder, **draw(linear))
        return linear

    return make


@pytest.fixture
def linear(make_golden):
    return make_golden()


def test_whole_policy_passes_with_the_figures_of_its_graph(linear):
    report = verify_policy(linear.folder)
    assert set(report.files) == {"policy.onnx", "golden.safetensors"}
    assert (report.inputs, report.tolerance) == (COUNT, TOLERANCE)
    (graph,) = report.graphs
    assert (graph.variant, graph.file, graph.provider) == (None, "policy.onnx", "CPUExecutionProvider")
    assert (graph.max_difference, graph.rms_difference, graph.batch_difference, graph.repeat_difference) == (0, 0, 0, 0)
    assert (graph.compared, graph.near_ties, graph.failure, graph.same_spec) == (True, 0, None, None)
    model = onnx.load_from_string(linear.graph)
    assert graph.structure is not None
    assert (graph.structure.ir_version, graph.structure.opset) == (10, 20)
    assert graph.structure.nodes == len(model.graph.node)
    assert graph.p50_ms is not None
    assert graph.p99_ms is not None
    assert 0 < graph.p50_ms <= graph.p99_ms


def test_tolerance_is_ten_times_that_of_the_export():
    parity = pytest.importorskip("meam_export.graph.parity")
    assert parity.TOLERANCES["fp32"] * 10 == pytest.approx(TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(
    row=st.integers(0, COUNT - 1),
    step=st.integers(0, 3),
    action=st.integers(0, 1),
    share=st.sampled_from([-0.5, -2e-4, -1.1e-4, -0.9e-4, 1e-6, 0.9e-4, 1.1e-4, 1.0]),
)
def test_difference_is_refused_if_and_only_if_it_is_above_the_tolerance(tmp_path_factory, row, step, action, share):
    scale = (0.5, 4.0)
    folder, golden = tiny_policy(tmp_path_factory.mktemp("policy"), scale)
    golden["actions"][row, step, action] += share * scale[action]
    put_golden(folder, **golden)
    report = verify_policy(folder, strict=False, calls=1)
    (graph,) = report.graphs
    moved = abs(golden["actions"][row, step, action]) / scale[action]
    assert graph.max_difference == pytest.approx(moved)
    assert graph.rms_difference == pytest.approx(moved / np.sqrt(COUNT * 8))
    if abs(share) < TOLERANCE:
        report.check()
        return
    with pytest.raises(ParityError) as caught:
        verify_policy(folder, calls=1)
    message = str(caught.value)
    assert f"policy.onnx differs from the golden actions by {moved:.2g} of the action's half width" in message
    assert f"at the golden input {row} on CPUExecutionProvider; expected at most 0.0001" in message


def tiny_policy(folder, scale):
    """A policy whose actions are all zero."""
    from meam_policy.diagnosis.probe import PROBE_SPEC, probe_graph

    spec = dataclasses.replace(
        PROBE_SPEC,
        observation=(BoxSpec((8,), "float32", (-np.inf,) * 8, (np.inf,) * 8),),
        action=WIDE,
        chunk_size=4,
        execute_steps=1,
        observation_mean=(0.0,) * 8,
        observation_std=(1.0,) * 8,
        action_offset=(0.0,) * 2,
        action_scale=scale,
    )
    (folder / "config.json").write_text(spec.to_json())
    put(folder, "policy.onnx", probe_graph(8, (4, 2)))
    return folder, {
        "observation": np.zeros((COUNT, 8), np.float32),
        "noise": np.zeros((COUNT, 8), np.float32),
        "actions": np.zeros((COUNT, 4, 2), np.float32),
    }


def test_tolerance_may_be_chosen(linear):
    golden = draw(linear)
    golden["actions"][1, 0, 0] += 1e-3
    put_golden(linear.folder, **golden)
    with pytest.raises(ParityError, match="by 0.001 of .* input 1 on .*; expected at most 0.0001"):
        verify_policy(linear.folder)
    assert verify_policy(linear.folder, tolerance=2e-3).graphs[0].max_difference == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["policy.onnx", "golden.safetensors", "model.safetensors"])
def test_file_with_another_hash_is_refused_before_any_graph_is_loaded(linear, monkeypatch, name):
    put(linear.folder, "model.safetensors", WEIGHTS)
    data = bytearray((linear.folder / name).read_bytes())
    data[-1] ^= 1
    (linear.folder / name).write_bytes(data)
    monkeypatch.setattr(verify, "PolicySession", None)
    with pytest.raises(IntegrityError, match=f"{name} has SHA-256"):
        verify_policy(linear.folder)


def test_policy_without_golden_actions_cannot_be_verified(make_policy):
    linear = make_policy()
    with pytest.raises(NotFoundError, match=r"no golden.safetensors in its config.json.*Export the policy again"):
        verify_policy(linear.folder)


def test_missing_file_is_named(linear):
    (linear.folder / "golden.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"has no golden.safetensors"):
        verify_policy(linear.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": np.zeros((COUNT, 7), np.float32)}, r'"noise" has the shape \[5, 7\]; expected \[5, 8\]'),
        ({"observation": np.zeros((4, 3), np.float32)}, r'"observation" has the shape \[4, 3\]; expected \[5, 3\]'),
        ({"actions": np.zeros((COUNT, 8), np.float32)}, r'"actions" has the shape \[5, 8\]; expected \[5, 4, 2\]'),
        ({"actions": np.zeros(1, np.float32)}, r'"actions" has the shape \[1\]; expected \[1, 4, 2\]'),
        ({"actions": np.full((COUNT, 4, 2), np.nan, np.float32)}, '"actions" has NaN or infinity in row 0'),
        (
            {"noise": np.repeat(np.array([0, np.inf], np.float32), [24, 16]).reshape(COUNT, 8)},
            '"noise" has NaN or infinity in row 3',
        ),
        ({"actions": None}, r"holds \['noise', 'observation'\]; expected \['actions', 'noise', 'observation'\]"),
        ({"extra": np.ones(1, np.float32)}, r"holds \['actions', 'extra',"),
        ({"actions": np.zeros((COUNT, 4, 2))}, "\"actions\" has the dtype 'F64'; expected F32"),
    ],
)
def test_golden_actions_that_do_not_fit_the_policy_are_refused(linear, changes, message):
    arrays = {name: array for name, array in {**draw(linear), **changes}.items() if array is not None}
    put_golden(linear.folder, **arrays)
    with pytest.raises(FormatError, match=message) as caught:
        verify_policy(linear.folder)
    assert str(caught.value).startswith("golden.safetensors")


def test_graph_that_needs_a_newer_onnxruntime_fails_alone(linear, light_graph, old_onnxruntime, capfd):
    linear.add_variant("int8", light_graph(), precision="int8")
    linear.add_variant("k3", linear.graph)
    with pytest.raises(VersionError, match=r"int8\.onnx needs onnxruntime 1\.22 or newer, and this is 1\.20\.1"):
        verify_policy(linear.folder, calls=1)
    report = verify_policy(linear.folder, calls=1, strict=False)
    assert [(graph.variant, type(graph.failure)) for graph in report.graphs] == [
        (None, type(None)),
        ("int8", VersionError),
        ("k3", type(None)),
    ]
    light = report.graphs[1]
    assert light.structure is not None
    assert light.structure.operators["com.microsoft.MatMulNBits"] == 1
    assert (light.provider, light.p50_ms, light.max_difference, light.compared) == (None, None, None, False)
    with pytest.raises(VersionError):
        run([str(linear.folder)], "meam verify")
    lines = capfd.readouterr().out.splitlines()
    assert sum(line.startswith("int8") and line.rstrip().endswith("FAILS") for line in lines) == 1
    assert sum(line.startswith("k3") and line.rstrip().endswith("ok") for line in lines) == 1
    assert any(line.startswith("int8.onnx was not run: int8.onnx needs onnxruntime") for line in lines)


def test_graph_that_is_broken_fails_alone(linear):
    linear.add_variant("k1", b"not a graph")
    linear.add_variant("k3", linear.graph)
    report = verify_policy(linear.folder, calls=1, strict=False)
    assert [type(graph.failure) for graph in report.graphs] == [type(None), FormatError, type(None)]
    assert report.graphs[1].structure is None
    assert report.failure is report.graphs[1].failure


def test_missing_graph_of_a_variant_fails_alone(linear):
    linear.add_variant("k3", linear.graph)
    (linear.folder / "k3.onnx").unlink()
    report = verify_policy(linear.folder, calls=1, strict=False)
    assert [type(graph.failure) for graph in report.graphs] == [type(None), NotFoundError]
    assert "has no k3.onnx, which its config.json names" in str(report.failure)
    with pytest.raises(NotFoundError, match=r"has no k3\.onnx"):
        verify_policy(linear.folder, calls=1)


def test_folder_with_nothing_but_config_and_graph_is_checked_with_drawn_inputs(make_policy, capfd):
    linear = make_policy()
    report = verify_policy(linear.folder, calls=1, strict=False)
    assert report.missing == ("model.safetensors", "golden.safetensors", "README.md")
    assert (report.files, report.inputs) == (("policy.onnx",), 8)
    (graph,) = report.graphs
    assert (graph.failure, graph.compared, graph.max_difference) == (None, False, None)
    assert (graph.batch_difference, graph.repeat_difference) == (0, 0)
    with pytest.raises(NotFoundError, match="golden.safetensors"):
        run([str(linear.folder), "--json"], "meam verify")
    data = json.loads(capfd.readouterr().out)
    assert (data["passed"], data["missing"]) == (False, list(report.missing))
    with pytest.raises(NotFoundError, match="golden.safetensors"):
        run([str(linear.folder)], "meam verify")
    output = " ".join(capfd.readouterr().out.split())
    assert "missing: model.safetensors, golden.safetensors, README.md" in output
    assert "8 drawn inputs" in output
    assert ": 1 file has the hash of config.json" in output


def test_what_is_there_of_an_incomplete_folder_is_checked(make_policy):
    broken = make_policy(through="Sqrt")
    with pytest.raises(ActionError, match="NaN or infinity"):
        verify_policy(broken.folder, calls=1)
    damaged = make_policy()
    put(damaged.folder, "model.safetensors", b"networks")
    (damaged.folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(IntegrityError, match=r"model\.safetensors has SHA-256"):
        verify_policy(damaged.folder, calls=1)


def test_missing_weights_and_card_are_named_and_no_failure(linear):
    put(linear.folder, "model.safetensors", WEIGHTS)
    (linear.folder / "model.safetensors").unlink()
    report = verify_policy(linear.folder, calls=1)
    assert report.missing == ("model.safetensors", "README.md")
    assert set(report.files) == {"policy.onnx", "golden.safetensors"}


def test_broken_golden_file_is_refused(linear):
    put(linear.folder, "golden.safetensors", (linear.folder / "golden.safetensors").read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"golden.safetensors is not a valid safetensors file"):
        verify_policy(linear.folder)


def test_golden_is_read_as_it_was_written(linear):
    golden = Golden.read(linear.folder, PolicySpec.from_json((linear.folder / "config.json").read_bytes()))
    for name, array in draw(linear).items():
        np.testing.assert_array_equal(getattr(golden, name), array)


@pytest.mark.parametrize(
    "fields",
    [{"nfe": 2}, {"precision": "int8"}, {"one_step": True}, {"time_grid": (0.0, 1.0)}, {"solver": "ab2"}],
)
def test_variant_that_acts_differently_on_purpose_is_not_compared_but_measured(linear, make_policy, fields):
    other = make_policy(weight=np.full((3, 8), 0.25))
    graph = with_weight_of("int8", other.graph) if "precision" in fields else other.graph
    linear.add_variant("other", graph, **fields)
    _, graph = verify_policy(linear.folder).graphs
    golden = draw(linear)
    expected = np.abs(other.chunks(golden["observation"], golden["noise"]) - golden["actions"]).max()
    assert (graph.variant, graph.compared, graph.failure) == ("other", False, None)
    assert graph.max_difference == pytest.approx(expected)
    assert expected > 0.1


def test_variant_that_is_integrated_like_the_policy_must_act_like_it(linear, make_policy):
    linear.add_variant("copy", make_policy(weight=np.full((3, 8), 0.25)).graph)
    with pytest.raises(ParityError, match=r"^copy.onnx differs from the golden actions"):
        verify_policy(linear.folder)
    first, second = verify_policy(linear.folder, strict=False).graphs
    assert first.failure is None
    assert isinstance(second.failure, ParityError)


def test_only_the_variant_asked_for_is_run(linear):
    linear.add_variant("copy", linear.graph)
    linear.add_variant("broken", b"not a graph", nfe=2)
    (graph,) = verify_policy(linear.folder, variant="copy").graphs
    assert graph.variant == "copy"
    with pytest.raises(FormatError, match=r"broken.onnx is not a valid ONNX file"):
        verify_policy(linear.folder)


def test_actions_out_of_bounds_are_refused_whatever_the_variant(linear, make_policy):
    wide = make_policy(action=WIDE, weight=np.full((3, 8), 3.0))
    linear.add_variant("wide", wide.graph, nfe=2)
    golden = draw(linear)
    row = np.flatnonzero((np.abs(wide.chunks(golden["observation"], golden["noise"])) > 1).any(axis=(1, 2)))[0]
    with pytest.raises(ActionError, match=f"wide.onnx gives the action .* at the golden input {row} on CPU"):
        verify_policy(linear.folder)


def test_actions_that_are_not_finite_are_refused_and_have_no_differences(make_golden):
    linear = make_golden(through="Sqrt")  # of negative numbers too
    (graph,) = verify_policy(linear.folder, strict=False).graphs
    assert (graph.max_difference, graph.rms_difference, graph.batch_difference) == (None, None, None)
    assert graph.repeat_difference == 0
    with pytest.raises(ActionError, match=r"policy.onnx gives NaN or infinity at the golden input 0 on CPU"):
        verify_policy(linear.folder)


class Disturbed(PolicySession):
    """A session whose actions are moved: of every later run, or of runs with one input."""

    drift, alone, runs, seen = 0.0, 0.0, 0, "CPUExecutionProvider"

    def run(self, observation, noise):
        self.runs += 1
        moved = self.drift * (self.runs > 1 + COUNT) + self.alone * (len(noise) == 1)
        return (super().run(observation, noise) / 2 + moved).astype(np.float32)

    @property
    def provider(self):
        return self.seen


@pytest.fixture
def disturb(monkeypatch):
    def change(**values):
        monkeypatch.setattr(verify, "PolicySession", type("Changed", (Disturbed,), values))

    return change


@pytest.mark.parametrize(
    ("provider", "drift", "expected"),
    [("CPU", 0, None), ("CPU", 1e-6, "0"), ("CUDA", 1e-6, None), ("CUDA", 1e-3, "0.0001")],
)
def test_same_inputs_twice_give_the_same_bits_on_the_cpu_and_nearly_so_elsewhere(
    linear, disturb, provider, drift, expected
):
    linear.add_variant("half", linear.graph, nfe=2)
    disturb(drift=drift, seen=f"{provider}ExecutionProvider")
    (graph,) = verify_policy(linear.folder, variant="half", strict=False).graphs
    assert graph.repeat_difference == pytest.approx(drift, rel=0.1)
    if expected is None:
        assert graph.failure is None
        return
    with pytest.raises(ParityError, match=f"same inputs twice on {provider}.*; expected at most {expected}. Check"):
        verify_policy(linear.folder, variant="half")


@pytest.mark.parametrize(("precision", "refused"), [("fp32", True), ("int8", False), ("fp16", False)])
def test_inputs_alone_and_among_others_must_agree_in_float32(linear, disturb, precision, refused):
    graph = with_weight_of({"fp32": "float32", "int8": "int8", "fp16": "float16"}[precision], linear.graph)
    linear.add_variant("half", graph, nfe=2, precision=precision)
    disturb(alone=1e-3)
    report = verify_policy(linear.folder, variant="half", strict=False)
    assert report.graphs[0].batch_difference == pytest.approx(1e-3, rel=0.01)
    if refused:
        with pytest.raises(ParityError, match="by 0.001 of .* one by one and all at once on CPU"):
            report.check()
    else:
        report.check()


@pytest.fixture
def chooser(make_policy):
    """Of two chunks, which are their noises, the one with the larger sum; in the first input both sums are equal."""
    linear = make_policy(best_of=2, weight=np.zeros((3, 8)), noise_weight=np.eye(8))
    noise = (np.random.default_rng(0).permuted(np.tile(np.arange(16) / 32, (COUNT, 1)), axis=1)).astype(np.float32)
    noise[0] = [*np.arange(8) / 8, *np.arange(8)[::-1] / 8]
    noise[1:, 8:] -= 0.25
    actions = linear.chunks(np.zeros((COUNT, 3)), noise).astype(np.float32)
    return linear, {"observation": np.zeros((COUNT, 3), np.float32), "noise": noise, "actions": actions}


def test_input_at_which_two_chunks_are_worth_the_same_is_left_out(chooser):
    linear, golden = chooser
    golden["actions"][0] = golden["noise"][0, 8:].reshape(4, 2)  # the other chunk
    put_golden(linear.folder, **golden)
    (graph,) = verify_policy(linear.folder).graphs
    assert (graph.near_ties, graph.max_difference) == (1, 0)
    golden["actions"][2] = golden["noise"][2, 8:].reshape(4, 2)
    put_golden(linear.folder, **golden)
    with pytest.raises(ParityError, match="at the golden input 2 on"):
        verify_policy(linear.folder)


def test_policy_whose_chunks_are_all_worth_the_same_cannot_be_compared(chooser):
    linear, golden = chooser
    golden["noise"][:], golden["actions"][:] = golden["noise"][0], golden["noise"][0, 8:].reshape(4, 2)
    put_golden(linear.folder, **golden)
    with pytest.raises(ParityError, match="cannot be compared with the golden actions: at every input"):
        verify_policy(linear.folder)


def test_variant_with_more_chunks_takes_noise_of_its_own(linear, make_policy):
    several = make_policy(best_of=2)
    linear.add_variant("best-of-2", several.graph, best_of=2)
    _, graph = verify_policy(linear.folder).graphs
    assert (graph.max_difference, graph.rms_difference, graph.repeat_difference) == (None, None, 0)
    assert graph.batch_difference is not None


def tell_identity(linear, identity):
    model = onnx.load_from_string(linear.graph)
    onnx.helper.set_model_props(model, {"spec_sha256": identity})
    put(linear.folder, "policy.onnx", model.SerializeToString())


def test_graph_that_was_exported_with_this_config_is_told(linear):
    tell_identity(linear, linear.spec.identity)
    assert verify_policy(linear.folder).graphs[0].same_spec is True


def test_graph_that_was_exported_with_another_config_fails_and_is_not_run(linear, capfd):
    tell_identity(linear, "0" * 64)
    with pytest.raises(IntegrityError, match=r"policy.onnx was exported with another config.json: its spec_sha256"):
        verify_policy(linear.folder)
    with pytest.raises(IntegrityError, match=r"policy.onnx was exported with another config.json"):
        linear.load()
    (graph,) = verify_policy(linear.folder, strict=False).graphs
    assert (graph.same_spec, graph.provider) == (False, None)
    for command in ("verify", "info"):
        assert cli.run([command, str(linear.folder)]) == 2
        assert "was exported with another config.json" in capfd.readouterr().err


@pytest.mark.parametrize("change", [{"execute_steps": 3}, {"action_scale": (1.0, 5.0)}, {"control_rate_hz": 7.0}])
def test_a_config_edited_since_the_export_is_refused_for_every_graph(linear, make_policy, change):
    linear.add_variant("k9", linear.graph)
    tell_identity(linear, linear.spec.identity)
    config = linear.folder / "config.json"
    edited = dataclasses.replace(PolicySpec.from_json(config.read_bytes()), **change)
    config.write_text(edited.to_json())
    with pytest.raises(IntegrityError, match="another config.json"):
        linear.load()


def test_an_edited_acting_rule_is_another_rule_for_the_same_graph(linear):
    tell_identity(linear, linear.spec.identity)
    config = linear.folder / "config.json"
    edited = dataclasses.replace(PolicySpec.from_json(config.read_bytes()), acting=ActingRule(0.5))
    config.write_text(edited.to_json())
    assert linear.load().spec.acting.noise_scale == 0.5


def test_folders_of_earlier_versions_carry_the_identity_of_the_fields_that_they_have(linear):
    """As written before the number of evaluations was called nfe, and before acting rules and licences."""
    data = json.loads((linear.folder / "config.json").read_bytes())
    data["flow_steps"] = data.pop("nfe")
    for later in ("acting", "license", "best_of"):
        del data[later]
    hashed = json.dumps({**data, "files": {}, "variants": {}}, sort_keys=True)
    tell_identity(linear, hashlib.sha256(hashed.encode()).hexdigest())
    data["files"] = json.loads((linear.folder / "config.json").read_bytes())["files"]
    (linear.folder / "config.json").write_text(json.dumps(data))
    assert verify_policy(linear.folder).graphs[0].same_spec is True
    data["execute_steps"] = 3
    (linear.folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="another config.json"):
        linear.load()


@pytest.mark.parametrize(
    "broken", [b"networks", b"\x80\x04pickle", WEIGHTS + b"x", (2**63).to_bytes(8, "little") + b"{}"]
)
def test_weights_that_are_no_safetensors_file_are_refused(linear, broken, capfd):
    put(linear.folder, "model.safetensors", broken)
    with pytest.raises(FormatError, match=r"model\.safetensors is not a valid safetensors file"):
        verify_policy(linear.folder)
    for command in ("verify", "info"):
        assert cli.run([command, str(linear.folder)]) == 2
        assert "model.safetensors" in capfd.readouterr().err


class Clock:
    """Time that passes in pauses, and as given in runs."""

    def __init__(self, runs_ms):
        self.now, self.runs = 0.0, iter(runs_ms)

    def sleep(self, seconds):
        self.now += 1.0

    def perf_counter(self):
        self.now += next(self.runs) / 1e3
        return self.now


def test_times_are_of_warm_calls_without_their_pauses(linear, monkeypatch):
    # Two readings of the clock a call.
    runs = [t for _ in range(10) for t in (0.0, 100.0)] + [t for i in range(200) for t in (7.0, 5.0 if i < 3 else 2.0)]
    clock = Clock(runs)
    monkeypatch.setattr(verify, "time", clock)
    (graph,) = verify_policy(linear.folder).graphs
    assert (graph.p50_ms, graph.p99_ms) == (pytest.approx(2), pytest.approx(5))
    assert next(clock.runs, None) is None


@pytest.mark.parametrize("tolerance", [0, -1, float("nan"), float("inf")])
def test_tolerance_that_is_none_is_refused(linear, tolerance):
    with pytest.raises(ConfigError, match="tolerance is"):
        verify_policy(linear.folder, tolerance=tolerance)


def test_arguments_that_cannot_be_are_refused(linear):
    with pytest.raises(ConfigError, match="calls is 0; expected 1 or more"):
        verify_policy(linear.folder, calls=0)
    with pytest.raises(ConfigError, match='no variant "k9"; it has: none'):
        verify_policy(linear.folder, variant="k9")
    with pytest.raises(ConfigError, match="threads is 0"):
        verify_policy(linear.folder, threads=0)
    with pytest.raises(NotFoundError, match="missing does not exist"):
        verify_policy(linear.folder / "missing")


def test_device_that_is_not_there_is_refused_rather_than_replaced(linear):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime offers CUDA")
    with pytest.raises(DeviceError, match='device="cuda"'):
        verify_policy(linear.folder, device="cuda")


def test_command_prints_a_graph_a_line_within_80_columns(linear, make_policy, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    graph = with_weight_of("int8", make_policy(best_of=4).graph)
    linear.add_variant("k5-best-of-4-int8", graph, best_of=4, precision="int8")
    run([str(linear.folder)], "meam verify")
    output = capfd.readouterr()
    assert output.err == ""
    assert max(map(len, output.out.splitlines())) <= 80
    lines = output.out.splitlines()
    assert sum(line.rstrip().endswith("ok") and line.startswith("policy") for line in lines) == 1
    assert "MatMul 2" in output.out
    assert "at most 0.0001" in output.out


def test_command_as_json_is_one_line_with_every_figure(linear, capfd):
    run([str(linear.folder), "--json", "--threads", "2"], "meam verify")
    output = capfd.readouterr()
    assert (output.out.count("\n"), output.err) == (1, "")
    data = json.loads(output.out)
    assert (data["passed"], data["inputs"], data["threads"], data["device"]) == (True, COUNT, 2, "cpu")
    (graph,) = data["graphs"]
    assert (graph["variant"], graph["max_difference"], graph["failure"]) == (None, 0, None)
    assert graph["structure"]["operators"]["MatMul"] == 2


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_command_shows_the_figures_of_a_policy_that_fails_and_then_the_error(make_golden, capfd, json_flag):
    linear = make_golden(through="Sqrt")
    with pytest.raises(MeamError, match="NaN or infinity"):
        run([str(linear.folder), *json_flag], "meam verify")
    output = capfd.readouterr()
    assert output.err == ""
    if json_flag:
        data = json.loads(output.out)
        assert data["passed"] is False
        assert data["graphs"][0]["failure"]["error"] == "ActionError"
    else:
        assert "FAILS" in output.out


@pytest.mark.parametrize(("dtype", "seen"), [("float32", "fp32"), ("float16", "fp16"), ("uint8", "int8")])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_variant_of_another_precision_than_config_json_says_is_neither_loaded_nor_run(linear, dtype, seen, precision):
    linear.add_variant("k3", with_weight_of(dtype, linear.graph), precision=precision)
    (graph,) = verify_policy(linear.folder, variant="k3", calls=1, strict=False).graphs
    if seen == precision:
        assert graph.failure is None
        return
    assert isinstance(graph.failure, FormatError)
    message = f"k3.onnx has {seen} weights, but config.json says {precision}. Download or export the policy again."
    assert str(graph.failure) == message
    with pytest.raises(FormatError, match="weights, but config.json says"):
        linear.load(variant="k3")


def test_a_variant_that_is_said_to_take_a_prefix_and_takes_none_is_refused(linear):
    linear.add_variant("rtc", linear.graph, takes_prefix=True)
    with pytest.raises(FormatError, match=r"rtc\.onnx takes no prefix, but config\.json says takes_prefix true"):
        verify_policy(linear.folder, variant="rtc", calls=1)
