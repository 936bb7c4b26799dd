"""Where a policy runs: the real session code, with stand-ins for an onnxruntime that offers CUDA and TensorRT."""

import sys
import warnings

import numpy as np
import pytest

from meam_policy import DeviceError, FormatError
from meam_policy.inference.providers import needs_gpu, provider_list, require_provider

onnxruntime = pytest.importorskip("onnxruntime")

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
REAL_SESSION = onnxruntime.InferenceSession


class DeviceValue:
    """Stands in for an OrtValue in a GPU's memory, which NumPy does not share."""

    def __init__(self, array):
        self.memory = array.copy()

    @classmethod
    def ortvalue_from_numpy(cls, array, device, index):
        assert (device, index) == ("cuda", 0)
        return cls(array)

    def update_inplace(self, array):
        self.memory[:] = array

    def numpy(self):
        return self.memory.copy()


class Binding:
    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value


class Machine:
    """An onnxruntime that offers some providers, of which some work."""

    def __init__(self, monkeypatch):
        self.offered, self.working, self.fails = [CPU], {CPU}, ""
        self.providers, self.options, self.bindings = [], [], []
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: self.offered)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("cannot find cuDNN"))
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.create)

    def offer(self, *names, working=True):
        self.offered = [*names, CPU]
        self.working = {*(names if working else ()), CPU}

    def create(self, graph, options, providers, enable_fallback):
        assert not enable_fallback, "onnxruntime would print that it falls back"
        names = [entry if isinstance(entry, str) else entry[0] for entry in providers]
        self.providers.append(providers)
        self.options.append(options)
        if self.fails and names != [CPU]:
            raise RuntimeError(self.fails)
        # As the real one: what cannot be started is left out, and the CPU is always there.
        seen = [name for name in names if name in self.working and name != CPU]
        real = REAL_SESSION(graph, options if names == [CPU] else None, providers=[CPU])
        return Session(self, real, [*seen, CPU]) if seen else real

    def only_options(self, provider):
        (providers,) = self.providers
        return dict(entry for entry in providers if entry[0] == provider)[provider]


class Session:
    def __init__(self, machine, real, providers):
        self.machine, self.real, self.providers = machine, real, providers
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs

    def get_providers(self):
        return self.providers

    def io_binding(self):
        self.machine.bindings.append(Binding())
        return self.machine.bindings[-1]

    def run_with_iobinding(self, binding):
        feeds = {name: value.memory for name, value in binding.inputs.items()}
        for name, result in zip(binding.outputs, self.real.run(list(binding.outputs), feeds), strict=True):
            binding.outputs[name].update_inplace(result)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(onnxruntime, "OrtValue", DeviceValue)
    return Machine(monkeypatch)


@pytest.fixture
def linear(make_policy):
    return make_policy()


@pytest.mark.parametrize(("device", "provider"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_device_that_onnxruntime_does_not_offer_is_an_error_before_a_session_is_made(linear, machine, device, provider):
    machine.offer(*{CUDA, TENSORRT} - {provider})
    with pytest.raises(DeviceError) as caught:
        linear.load(device=device)
    message = str(caught.value)
    assert f'device="{device}"' in message
    assert str(machine.offered) in message
    assert "meam-policy[gpu]" in message
    assert machine.providers == []


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_device_that_is_offered_and_does_not_start_is_an_error_with_what_came_instead(linear, machine, device):
    machine.offer(TENSORRT, CUDA, working=False)
    with pytest.raises(DeviceError) as caught:
        linear.load(device=device)
    assert f'device="{device}"' in str(caught.value)
    assert f"could only create ['{CPU}']" in str(caught.value)
    assert len(machine.providers) == 1


def test_tensorrt_that_comes_down_to_cuda_is_an_error(linear, machine):
    machine.offer(TENSORRT, CUDA)
    machine.working = {CUDA, CPU}
    with pytest.raises(DeviceError, match=f"could only create \\['{CUDA}', '{CPU}'\\]"):
        linear.load(device="tensorrt")


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_device_that_cannot_run_the_graph_is_an_error_with_its_reason_and_not_the_cpu(linear, machine, device):
    machine.offer(TENSORRT, CUDA)
    machine.fails = "CUDA failure 100: no CUDA-capable device is detected\nmore lines"
    with pytest.raises(DeviceError) as caught:
        linear.load(device=device)
    assert str(caught.value) == (
        f'device="{device}" cannot run policy.onnx: CUDA failure 100: no CUDA-capable device is detected'
    )
    assert len(machine.providers) == 1
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_auto_takes_cuda_where_it_works(linear, machine):
    machine.offer(CUDA)
    assert linear.load(device="auto").provider == CUDA


def test_auto_without_an_onnxruntime_for_cuda_is_the_cpu_without_a_warning(linear, machine):
    machine.offer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear.load(device="auto").provider == CPU
    assert machine.providers == [[CPU]]


@pytest.mark.parametrize("fails", ["", "CUDA failure 35"])
def test_auto_with_a_cuda_that_does_not_start_is_the_cpu_with_a_warning(linear, machine, fails, capfd):
    machine.offer(CUDA, working=False)
    machine.fails = fails
    with pytest.warns(
        RuntimeWarning, match=f'device="auto" runs on {CPU}: this onnxruntime was built for CUDA'
    ) as caught:
        policy = linear.load(device="auto")
    assert len(caught) == 1
    assert policy.provider == CPU
    assert capfd.readouterr().out == ""


def test_graph_that_nobody_can_run_is_a_format_error_with_auto(linear, machine):
    machine.offer(CUDA)
    linear.replace_graph(b"not a graph")
    with pytest.raises(FormatError, match="not a valid ONNX file"):
        linear.load(device="auto")


def test_cpu_is_only_the_cpu_even_where_cuda_works(linear, machine):
    machine.offer(TENSORRT, CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear.load(device="cpu").provider == CPU
    assert machine.providers == [[CPU]]


def test_devices_asked_for_by_name_list_no_cpu_and_tensorrt_leaves_its_rest_to_cuda(machine):
    machine.offer(TENSORRT, CUDA)
    names = {
        device: [
            entry if isinstance(entry, str) else entry[0]
            for entry in provider_list(device, fixed_batch=False, tf32=False)
        ]
        for device in ("cpu", "cuda", "tensorrt", "auto")
    }
    assert names == {"cpu": [CPU], "cuda": [CUDA], "tensorrt": [TENSORRT, CUDA], "auto": [CUDA, CPU]}


@pytest.mark.parametrize("device", ["cuda", "auto", "tensorrt"])
@pytest.mark.parametrize(("arguments", "option"), [({}, "0"), ({"tf32": False}, "0"), ({"tf32": True}, "1")])
def test_tf32_is_off_unless_it_is_asked_for(linear, machine, device, arguments, option):
    machine.offer(TENSORRT, CUDA)
    linear.load(device=device, **arguments)
    assert machine.only_options(CUDA)["use_tf32"] == option


@pytest.mark.parametrize("device", ["cuda", "auto"])
@pytest.mark.parametrize(("fixed_batch", "option"), [(None, "0"), (1, "1"), (4, "1")])
def test_cuda_graphs_are_captured_if_and_only_if_the_batch_is_fixed(linear, machine, device, fixed_batch, option):
    machine.offer(CUDA)
    linear.load(device=device, fixed_batch=fixed_batch)
    assert machine.only_options(CUDA)["enable_cuda_graph"] == option


@pytest.mark.parametrize(("fixed_batch", "option"), [(None, "False"), (4, "True")])
def test_tensorrt_captures_the_cuda_graph_itself(linear, machine, fixed_batch, option):
    machine.offer(TENSORRT, CUDA)
    assert linear.load(device="tensorrt", fixed_batch=fixed_batch).provider == TENSORRT
    assert machine.only_options(TENSORRT) == {"trt_cuda_graph_enable": option}
    assert machine.only_options(CUDA)["enable_cuda_graph"] == "0"


@pytest.mark.parametrize(
    ("device", "fixed_batch", "entry"), [("cuda", 4, "1"), ("tensorrt", 4, "1"), ("cuda", None, "0"), ("auto", 4, None)]
)
def test_parts_of_a_fixed_batch_on_the_cpu_are_refused_only_for_a_device_asked_for_by_name(
    linear, machine, device, fixed_batch, entry
):
    machine.offer(TENSORRT, CUDA)
    linear.load(device=device, fixed_batch=fixed_batch)
    (options,) = machine.options
    if entry is None:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.disable_cpu_ep_fallback")
    else:
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == entry


@pytest.mark.parametrize("fixed_batch", [None, 1, 3])
def test_buffers_on_the_device_are_filled_read_back_and_kept(linear, machine, fixed_batch):
    machine.offer(CUDA)
    session = linear.load(device="cuda", fixed_batch=fixed_batch).session
    random = np.random.default_rng(0)
    results, expected = [], []
    for _ in range(3):
        rows, noise = random.integers(-8, 9, (7, 3)) / 8, random.integers(-8, 9, (7, 8)) / 8
        results.append(session.run(rows.astype(np.float32), noise.astype(np.float32)))
        expected.append(linear.chunks(rows, noise))
    np.testing.assert_array_equal(results, expected)
    sizes = {1, 7} if fixed_batch is None else {fixed_batch}  # one observation is what loading rehearses
    assert len(machine.bindings) == len(sizes)


def test_what_onnxruntime_prints_while_it_looks_for_cuda_does_not_reach_stdout(linear, machine, capfd):
    machine.offer(CUDA)
    linear.load(device="cuda")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == "cannot find cuDNN\n"
    assert sys.stdout is not sys.stderr


def test_onnxruntime_from_before_it_could_preload_libraries_is_enough(linear, machine, monkeypatch):
    monkeypatch.delattr(onnxruntime, "preload_dlls")
    machine.offer(CUDA)
    assert linear.load(device="cuda").provider == CUDA


@pytest.mark.parametrize(("device", "gpu"), [("cpu", False), ("auto", False), ("cuda", True), ("tensorrt", True)])
def test_only_cuda_and_tensorrt_ask_for_a_gpu_by_name(device, gpu):
    assert needs_gpu(device) is gpu


@pytest.mark.parametrize(
    ("device", "seen"),
    [("cpu", [CPU]), ("cuda", [CUDA, CPU]), ("tensorrt", [TENSORRT, CUDA, CPU]), ("auto", [CUDA, CPU])],
)
def test_provider_that_was_asked_for_is_accepted_without_a_warning(machine, device, seen):
    machine.offer(TENSORRT, CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_provider(device, seen)
