"""The onnxruntime session behind a policy."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ActionError, ConfigError, DeviceError, FormatError, VersionError
from meam_policy.graph.graph_check import GraphSummary, check_graph
from meam_policy.graph.graph_identity import check_declared, check_identity
from meam_policy.inference.process import require_process
from meam_policy.inference.providers import Device, import_onnxruntime, needs_gpu, provider_list, require_provider
from meam_policy.inference.versions import load_failure
from meam_policy.spec import GRAPH_FILE, PolicySpec, VariantSpec
from meam_policy.spec.names import check_names, names_metadata
from meam_policy.typed import typed

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Optimization", "PolicySession", "Session", "session_options"]

Optimization = Literal["none", "basic", "extended", "all"]
"""How far onnxruntime may rewrite the graph; policies act with "all", the others serve to check it."""

MAX_THREADS = 1024
"""More than any machine has cores; each is started at once, spins, and has a stack."""

MAX_BATCH = 2**16
"""Of a graph that is prepared for one batch size, whose buffers are allocated at once."""

CPU_BATCH = 256
"""Rows that run at once on the CPU: with more, the layers' outputs do not fit into the second-level cache."""

_MAX_BINDINGS = 8
"""Batch sizes for which buffers are kept."""

Rows = NDArray[np.float32]


class Session(Protocol):
    """What computes a policy's chunks: the graph of a policy folder, or networks in training."""

    takes_prefix: bool
    """Whether it takes a prefix: the actions that the new chunk must continue."""

    @property
    def provider(self) -> str:
        """What runs it, such as "CPUExecutionProvider"."""
        ...

    def run_all(
        self, observation: Rows, noise: Rows, prefix: Rows | None = None, prefix_weight: Rows | None = None
    ) -> dict[str, Rows]:
        """Compute every output: see `PolicySession.run_all`."""
        ...


class PolicySession:
    """Runs a policy graph: raw observations and noise in, action chunks in environment units out.

    One run at a time; other threads wait.

    Attributes:
        takes_prefix: Whether the graph takes a prefix: the actions that the new chunk must continue.
        structure: What the check of the graph found in it.

    Args:
        graph: Contents of the ONNX file.
        spec: Spec that the graph must match.
        device: "cpu"; "cuda" or "tensorrt", which fail rather than fall back; or "auto": CUDA where it works, else the
            CPU.
        threads: Intra-op threads. One is the default because these graphs are small and a control loop should not
            compete with its own thread pool: more than one wait for work by spinning, which takes their cores whole.
        fixed_batch: Prepare the graph for exactly this batch size, and on CUDA capture it as a CUDA graph; other sizes
            are padded or split. None for any size.
        tf32: Let CUDA round the inputs of float32 products to TF32.
        optimization: How far the graph may be rewritten.
        name: Name of the graph's file in error messages.
        identity: What a graph that `meam export` wrote must carry as `spec_sha256`; None compares nothing.
        declared: What config.json says of the graph, if it is that of a variant; None compares nothing.

    Raises:
        FormatError: the graph is not ONNX, holds something that no policy needs, has other inputs and outputs than
            those of the policy format, names its numbers otherwise than the spec, or is not what is declared.
        IntegrityError: it was exported with another config.json.
        VersionError: it needs a newer onnxruntime, or a newer meam-policy.
        DeviceError: the device is asked for by name, and not usable here.
        MissingExtraError: onnxruntime is not installed.
    """

    @typed()
    def __init__(
        self,
        graph: bytes,
        spec: PolicySpec,
        device: Device = "cpu",
        threads: int = 1,
        *,
        fixed_batch: int | None = None,
        tf32: bool = False,
        optimization: Optimization = "all",
        name: str = GRAPH_FILE,
        identity: str | None = None,
        declared: VariantSpec | None = None,
    ) -> None:
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads is {threads}; expected 1 to {MAX_THREADS}.")
        if fixed_batch is not None and not 1 <= fixed_batch <= MAX_BATCH:
            raise ConfigError(f"fixed_batch is {fixed_batch}; expected 1 to {MAX_BATCH}, or None.")
        if optimization not in get_args(Optimization):
            raise ConfigError(f"optimization is {optimization!r}; expected one of {', '.join(get_args(Optimization))}.")
        self._spec, self._name, self._fixed_batch = spec, name, fixed_batch
        providers = provider_list(device, fixed_batch=fixed_batch is not None, tf32=tf32)
        self.structure = summary = check_graph(graph, name)
        names = names_metadata(spec.observation, spec.observation_names, spec.action_names, spec.observation_offset)
        check_names(names, summary.metadata, name)
        check_identity(summary, identity, name)
        if declared is not None:
            check_declared(summary, declared.takes_prefix, declared.precision, name)
        options = session_options(threads, fixed_batch, spec.integration.best_of, optimization)
        if needs_gpu(device):
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1" if fixed_batch else "0")
        self._session = _create_session(graph, summary, options, providers, device, name)
        require_provider(device, self._session.get_providers())
        self.takes_prefix = any(node.name == "prefix" for node in self._session.get_inputs())
        self._check_signature()
        self._largest_batch = CPU_BATCH if self.provider == "CPUExecutionProvider" else sys.maxsize
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._bindings: dict[int, _Binding] = {}

    @property
    def provider(self) -> str:
        """The execution provider that runs the graph."""
        return self._session.get_providers()[0]

    def run(self, observation: Rows, noise: Rows) -> Rows:
        """Compute chunks [batch, chunk_size, action_dim] from [batch, observation_dim] and [batch, noise_dim]."""
        return self.run_all(observation, noise)["actions"]

    def run_all(
        self, observation: Rows, noise: Rows, prefix: Rows | None = None, prefix_weight: Rows | None = None
    ) -> dict[str, Rows]:
        """Compute every output.

        Args:
            observation: Raw observations [batch, observation_dim], less `spec.observation_offset`.
            noise: Standard normal [batch, noise_dim].
            prefix: Where the graph takes one, actions that the new chunk must continue [batch, chunk_size, action_dim],
                environment units; None for none.
            prefix_weight: How strongly it must equal each of them [batch, chunk_size], 0 (not at all) to 1.

        Returns:
            `actions`, as from `run`; where one chunk of several is chosen (best_of > 1) also its `value` [batch], and
            the critics' `disagreement` [batch] about it.

        Raises:
            ActionError: the graph failed while it ran.
        """
        inputs = {"observation": observation, "noise": noise}
        if self.takes_prefix:
            shapes = self._shapes(len(observation))
            for name, array in (("prefix", prefix), ("prefix_weight", prefix_weight)):
                inputs[name] = np.zeros(shapes[name], np.float32) if array is None else array
        batch, size = len(observation), self._fixed_batch or self._largest_batch
        if batch == size or (batch < size and self._fixed_batch is None):
            return self._run(inputs, batch)
        parts = []
        for start in range(0, batch, size):
            part = {name: rows[start : start + size] for name, rows in inputs.items()}
            if self._fixed_batch is not None:
                part = {name: _padded(rows, size) for name, rows in part.items()}
            parts.append(self._run(part, len(part["observation"])))
        return {name: np.concatenate([part[name] for part in parts])[:batch] for name in parts[0]}

    def _run(self, inputs: Mapping[str, Rows], batch: int) -> dict[str, Rows]:
        require_process(self._process)
        with self._lock:
            try:
                return self._binding(batch).run(inputs)
            except Exception as error:  # as in `_create_session`
                raise ActionError(f"{self._name} failed while it ran; no action is returned: {_line(error)}") from error

    def _binding(self, batch: int) -> _Binding:
        binding = self._bindings.get(batch)
        if binding is None:
            if len(self._bindings) == _MAX_BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            binding = self._bindings[batch] = _Binding(self._session, self._shapes(batch))
        return binding

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        spec, best_of = self._spec, self._spec.integration.best_of
        noise = (batch, best_of, spec.chunk_dim) if best_of > 1 else (batch, spec.noise_dim)
        shapes = {
            "observation": (batch, spec.observation_dim),
            "noise": noise,
            "actions": (batch, spec.chunk_size, spec.action_dim),
        }
        if self.takes_prefix:
            shapes |= {"prefix": shapes["actions"], "prefix_weight": (batch, spec.chunk_size)}
        return shapes | ({"value": (batch,), "disagreement": (batch,)} if best_of > 1 else {})

    def _check_signature(self) -> None:
        expected = self._shapes(0)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = [sorted(node.name for node in nodes) for nodes in (inputs, outputs)]
        ends = {"actions", "value", "disagreement"}
        wanted = [sorted(set(expected) - ends), sorted(set(expected) & ends)]
        if names != wanted:
            raise FormatError(
                f"{self._name} has the inputs {names[0]} and outputs {names[1]}; expected {wanted[0]} and {wanted[1]}. "
                "Export it with `meam export`."
            )
        for node in (*inputs, *outputs):
            # Dynamic axes have names, for which a fixed batch puts numbers.
            free = 2 if node.name == "noise" and self._spec.integration.best_of > 1 else 1
            given = (self._fixed_batch, self._fixed_batch and self._spec.integration.best_of)[:free]
            same_rank = len(node.shape) == len(expected[node.name])
            dynamic = not any(isinstance(n, int) and n != m for n, m in zip(node.shape, given, strict=False))
            fits = same_rank and dynamic and tuple(node.shape[free:]) == expected[node.name][free:]
            if node.type != "tensor(float)" or not fits:
                axes = ["'batch'", "'samples'"][:free] + [str(size) for size in expected[node.name][free:]]
                raise FormatError(
                    f'{self._name}: "{node.name}" is {node.type} {node.shape}; expected tensor(float) '
                    f"[{', '.join(axes)}], as config.json says."
                )


class _Binding:
    """Buffers of one batch size, at addresses that never change: a CUDA graph demands it, and every call is cheaper."""

    def __init__(self, session: onnxruntime.InferenceSession, shapes: Mapping[str, tuple[int, ...]]) -> None:
        ort = import_onnxruntime()
        self._session, self._binding = session, session.io_binding()
        self._on_cpu = session.get_providers()[0] == "CPUExecutionProvider"
        device = "cpu" if self._on_cpu else "cuda"
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in arrays.items()}
        self._inputs = [(node.name, arrays[node.name]) for node in session.get_inputs()]
        self._outputs = [(node.name, arrays[node.name]) for node in session.get_outputs()]
        for name, _ in self._inputs:
            self._binding.bind_ortvalue_input(name, self._values[name])
        for name, _ in self._outputs:
            self._binding.bind_ortvalue_output(name, self._values[name])

    def run(self, inputs: Mapping[str, Rows]) -> dict[str, Rows]:
        """Run, and return fresh arrays."""
        for name, array in self._inputs:
            given = inputs[name]
            array[...] = given if given.shape == array.shape else given.reshape(array.shape)
            if not self._on_cpu:
                self._values[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding)
        if self._on_cpu:
            return {name: array.copy() for name, array in self._outputs}
        return {name: self._values[name].numpy() for name, _ in self._outputs}


def session_options(
    threads: int = 1, fixed_batch: int | None = None, samples: int = 1, optimization: Optimization = "all"
) -> onnxruntime.SessionOptions:
    """Options of a session that shares its machine with a controller.

    Args:
        threads: Intra-op threads.
        fixed_batch: Number to put for the axis `batch`; None leaves it open.
        samples: The same for the axis `samples`, if there is a fixed batch.
        optimization: How far the graph may be rewritten.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool takes a core from the controller; but several threads that sleep wake up too late to be of use.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads > 1)))
    options.log_severity_level = 3
    level = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level[optimization]}")
    if fixed_batch is not None:
        options.add_free_dimension_override_by_name("batch", fixed_batch)
        options.add_free_dimension_override_by_name("samples", samples)
    return options


def _create_session(
    graph: bytes,
    summary: GraphSummary,
    options: onnxruntime.SessionOptions,
    providers: list[Any],
    device: Device,
    name: str,
) -> onnxruntime.InferenceSession:
    ort = import_onnxruntime()
    try:
        # Its own fallback prints to stdout.
        return ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own types, which share no base class
        if len(providers) > 1 and device == "auto":  # `require_provider` reports that it came to this
            return _create_session(graph, summary, options, providers[-1:], device, name)
        failure = load_failure(name, summary, ort.__version__, str(error), on_cpu=not needs_gpu(device))
        if needs_gpu(device) and not isinstance(failure, VersionError):
            raise DeviceError(f'device="{device}" cannot run {name}: {_line(error)}') from error
        raise failure from error


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _padded(rows: Rows, size: int) -> Rows:
    missing = size - len(rows)
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows
