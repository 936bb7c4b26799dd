"""A small graph, built without onnx, that shows whether an execution provider works on this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from meam_policy.inference.providers import Device
from meam_policy.inference.session import PolicySession
from meam_policy.spec import BoxSpec, Integration, PolicySpec

__all__ = ["PROBE_SPEC", "Probe", "probe_device", "probe_graph"]

_SIZE = 64
"""Large enough for a GPU to multiply on the units that can round to TF32."""

_FREE = BoxSpec((_SIZE,), "float32", (-math.inf,) * _SIZE, (math.inf,) * _SIZE)
PROBE_SPEC = PolicySpec(
    observation=(_FREE,),
    action=_FREE,
    chunk_size=1,
    execute_steps=1,
    observation_mean=(0.0,) * _SIZE,
    observation_std=(1.0,) * _SIZE,
    action_offset=(0.0,) * _SIZE,
    action_scale=(1.0,) * _SIZE,
    integration=Integration(nfe=1),
    method="probe",
)
"""Spec of the policy in `probe_graph()`: one action of 64 numbers, observation plus noise."""


@dataclass(frozen=True)
class Probe:
    """What an execution provider did with the graph.

    Attributes:
        provider: Its name.
        exact: Whether it multiplied in float32; TF32, which keeps ten bits, does not.
    """

    provider: str
    exact: bool


def probe_device(device: Device) -> Probe:
    """Start a session on a device, as a policy does, and multiply matrices there.

    Raises:
        DeviceError: the device was requested by name, and cannot start.
        ActionError: it starts, and cannot run the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    session = PolicySession(probe_graph(), PROBE_SPEC, device, name="the probe graph")
    observation = np.full((_SIZE, _SIZE), 1 + 2**-12, dtype=np.float32)  # 1 in TF32
    actions = session.run(observation, np.zeros_like(observation))
    return Probe(session.provider, bool((actions.reshape(_SIZE, _SIZE) == observation).all()))


def probe_graph(size: int = _SIZE, chunk_shape: tuple[int, int] = (1, _SIZE)) -> bytes:
    """The bytes of an ONNX file for reshape(observation @ identity + noise, [-1, *chunk_shape]).

    Args:
        size: Dimension of the observation, and of the noise.
        chunk_shape: Shape of a chunk, of `size` numbers.
    """
    identity, shape = np.eye(size, dtype="<f4"), np.array([-1, *chunk_shape], dtype="<i8")
    graph = [
        _node("MatMul", ["observation", "identity"], "product"),
        _node("Add", ["product", "noise"], "sum"),
        _node("Reshape", ["sum", "shape"], "actions"),
        _text(2, "probe"),
        _message(5, _number(1, size), _number(1, size), _number(2, 1), _text(8, "identity"), _data(identity)),
        _message(5, _number(1, 3), _number(2, 7), _text(8, "shape"), _data(shape)),
        _message(11, *_value("observation", size)),
        _message(11, *_value("noise", size)),
        _message(12, *_value("actions", *chunk_shape)),
    ]
    # IR version 8 and opset 17: whatever runs policies reads them.
    return _number(1, 8) + _message(7, *graph) + _message(8, _number(2, 17))


def _node(operator: str, inputs: list[str], output: str) -> bytes:
    return _message(1, *(_text(1, name) for name in inputs), _text(2, output), _text(4, operator))


def _value(name: str, *sizes: int) -> list[bytes]:
    dimensions = [_message(1, _text(2, "batch")), *(_message(1, _number(1, size)) for size in sizes)]
    tensor = _message(1, _number(1, 1), _message(2, *dimensions))
    return [_text(1, name), _message(2, tensor)]


def _data(array: np.ndarray) -> bytes:
    return _message(9, array.tobytes())


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, *parts: bytes) -> bytes:
    """A field of protobuf that holds bytes: a text, data, or a message given by its fields."""
    content = b"".join(parts)
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])
