import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from meam_policy import DeviceError
from meam_policy.diagnosis import probe
from meam_policy.diagnosis.probe import PROBE_SPEC, probe_device, probe_graph
from meam_policy.graph.graph_check import check_graph
from meam_policy.inference.session import PolicySession

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("size", "chunk_shape"), [(64, (1, 64)), (6, (3, 2)), (1, (1, 1)), (200, (4, 50))])
def test_graph_is_valid_onnx_and_adds_observation_and_noise(size, chunk_shape):
    graph = probe_graph(size, chunk_shape)
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.SerializeToString() == graph  # no field that onnx would drop
    assert check_graph(graph).operators == {"MatMul": 1, "Add": 1, "Reshape": 1}
    random = np.random.default_rng(0)
    rows, noise = (random.standard_normal((3, size)).astype(np.float32) for _ in range(2))
    (actions,) = ReferenceEvaluator(model).run(None, {"observation": rows, "noise": noise})
    np.testing.assert_array_equal(actions, (rows + noise).reshape(3, *chunk_shape))


def test_cpu_multiplies_in_float32():
    assert probe_device("cpu") == probe.Probe("CPUExecutionProvider", exact=True)


class RoundedSession(PolicySession):
    """Rounds to the ten bits that TF32 keeps."""

    def run(self, observation, noise):
        bits = observation.view(np.uint32) + np.uint32(1 << 12) & np.uint32(0xFFFF_E000)
        return super().run(bits.view(np.float32), noise)


def test_products_rounded_to_tf32_are_noticed(monkeypatch):
    monkeypatch.setattr(probe, "PolicySession", RoundedSession)
    assert not probe_device("cpu").exact


def test_device_that_does_not_start_is_an_error(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match='device="cuda"'):
        probe_device("cuda")


def test_probe_runs_the_graph_that_its_spec_describes():
    session = PolicySession(probe_graph(), PROBE_SPEC)
    rows = np.arange(128, dtype=np.float32).reshape(2, 64)
    np.testing.assert_array_equal(session.run(rows, 2 * rows), 3 * rows[:, None])
