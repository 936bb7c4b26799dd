"""The onnxruntime session behind a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ConfigError, DeviceError, FormatError, MissingExtraError
from meam_policy.spec import PolicySpec

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Device", "PolicySession"]

Device = Literal["auto", "cpu", "cuda"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class PolicySession:
    """Runs a policy graph: raw observations and noise in, action chunks in environment units out.

    Args:
        graph: The bytes of `policy.onnx`.
        spec: What the graph must look like.
        device: "cpu"; "cuda", which fails rather than falls back; or "auto": CUDA where it works, else the CPU.
        threads: Intra-op threads. One is the default because these graphs are small and a control loop should not
            compete with its own thread pool.

    Raises:
        FormatError: the graph is not ONNX, or its inputs and outputs are not those of the policy format.
        DeviceError: "cuda" is asked for and not usable here.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, graph: bytes, spec: PolicySpec, device: Device = "cpu", threads: int = 1) -> None:
        if device not in get_args(Device):
            raise ConfigError(f"device is {device!r}; expected one of {', '.join(get_args(Device))}.")
        if threads < 1:
            raise ConfigError(f"threads is {threads}; expected 1 or more.")
        self._spec = spec
        self._session = _create_session(graph, device, threads)
        self._check_signature()

    @property
    def provider(self) -> str:
        """The execution provider that runs the graph."""
        return self._session.get_providers()[0]

    def run(self, observation: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute chunks [batch, chunk_size, action_dim] from [batch, observation_dim] and [batch, noise_dim]."""
        return np.asarray(self._session.run(["actions"], {"observation": observation, "noise": noise})[0])

    def _check_signature(self) -> None:
        spec = self._spec
        expected = {
            "observation": [spec.observation_dim],
            "noise": [spec.noise_dim],
            "actions": [spec.chunk_size, spec.action_dim],
        }
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = [sorted(node.name for node in nodes) for nodes in (inputs, outputs)]
        if names != [["noise", "observation"], ["actions"]]:
            raise FormatError(
                f"policy.onnx has the inputs {names[0]} and outputs {names[1]}; expected ['noise', 'observation'] "
                "and ['actions']. Export it with `meam export`."
            )
        found = {node.name: node for node in (*inputs, *outputs)}
        for name, shape in expected.items():
            node = found[name]
            if node.type != "tensor(float)" or node.shape[1:] != shape or isinstance(node.shape[0], int):
                raise FormatError(
                    f'policy.onnx: "{name}" is {node.type} {node.shape}; expected tensor(float) '
                    f"['batch', {', '.join(map(str, shape))}], as config.json says."
                )


def _create_session(graph: bytes, device: Device, threads: int) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "Acting needs onnxruntime, which is not installed: pip install 'meam-policy[cpu]' (or [gpu], never both)."
        ) from error
    available = onnxruntime.get_available_providers()
    if device == "cuda" and _CUDA not in available:
        raise DeviceError(
            f'device="cuda", but onnxruntime offers only {available} here. '
            'Install meam-policy[gpu] in an environment without [cpu], or use device="cpu".'
        )
    wanted = [_CUDA, _CPU] if device != "cpu" and _CUDA in available else [_CPU]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool burns a core between two control steps.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=wanted)
    except Exception as error:  # onnxruntime raises its own types, which share no base class
        first_line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FormatError(f"policy.onnx cannot be loaded by onnxruntime: {first_line}") from error
    if device == "cuda" and session.get_providers()[0] != _CUDA:
        # onnxruntime falls back to the CPU with no more than a warning.
        raise DeviceError(
            f'device="cuda", but onnxruntime could only create {session.get_providers()}. '
            'Check the CUDA and cuDNN libraries, or use device="cpu".'
        )
    return session
