"""Triton's configuration, read with Triton's own protobuf schema."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_export.triton.config_text import config_text, is_as_written
from meam_export.triton.signature import Signature, Tensor
from meam_policy import BoxSpec, PolicySpec
from meam_policy.spec import Integration

# A generated module, whose members pyright cannot see.
schema: Any = importlib.import_module("tritonclient.grpc.model_config_pb2")

SPEC = PolicySpec(
    integration=Integration(nfe=4, solver="euler"),
    observation=(BoxSpec((3,), "float32", (-np.inf,) * 3, (np.inf,) * 3, key="arm"),),
    action=BoxSpec((2,), "float32", (-1.0, -1.0), (1.0, 1.0)),
    chunk_size=3,
    execute_steps=2,
    observation_mean=(0.0,) * 3,
    observation_std=(1.0,) * 3,
    action_offset=(0.0,) * 2,
    action_scale=(1.0,) * 2,
    method="qam",
    environment_id="meam/Arm-v0",
    files={"policy.onnx": "0" * 64},
)
SIGNATURE = Signature(
    inputs=(Tensor("observation", "TYPE_FP32", (3,)), Tensor("noise", "TYPE_FP32", (-1, 6))),
    outputs=(Tensor("actions", "TYPE_FP32", (3, 2)), Tensor("value", "TYPE_FP32", ())),
)
SETTINGS: dict[str, Any] = {"max_batch_size": 8, "instances": 1, "device": "cpu", "max_queue_delay_us": 0}


def write(spec: PolicySpec = SPEC, **settings: Any) -> bytes:
    return config_text("arm", SIGNATURE, spec, 1, **{**SETTINGS, **settings})


def read(text: bytes) -> Any:
    return text_format.Parse(text.decode("ascii"), schema.ModelConfig())


any_text = st.text() | st.text(alphabet="\"\\\n\r\t\0'#{}é\u2028\U0001f916ab0 ")


@pytest.mark.slow
@settings(deadline=None)
@given(environment_id=any_text, method=any_text, key=any_text)
def test_any_text_comes_back_from_the_configuration(environment_id: str, method: str, key: str) -> None:
    box = replace(SPEC.observation[0], key=key)
    text = write(replace(SPEC, environment_id=environment_id, method=method, observation=(box,)))
    found = {name: value.string_value for name, value in read(text).parameters.items()}
    assert found["policy_environment_id"] == environment_id
    assert found["policy_method"] == method
    assert json.loads(found["policy_observation"]) == [{"key": key, "shape": [3]}]


@settings(deadline=None)
@given(
    max_batch_size=st.integers(1, 2**31 - 1) | st.integers(1, 300),
    instances=st.integers(1, 2**31 - 1),
    delay=st.integers(0, 2**31 - 1),
)
def test_numbers_come_back_and_no_warm_up_is_larger_than_a_batch(
    max_batch_size: int, instances: int, delay: int
) -> None:
    config = read(write(max_batch_size=max_batch_size, instances=instances, max_queue_delay_us=delay))
    assert config.max_batch_size == max_batch_size
    assert config.instance_group[0].count == instances
    assert config.dynamic_batching.max_queue_delay_microseconds == delay
    sizes = [sample.batch_size for sample in config.model_warmup]
    assert sizes == sorted({1, max_batch_size, *sizes})
    assert sizes[-1] == max_batch_size


@pytest.mark.parametrize("byte", [0, 40, 80, -1])
def test_a_byte_that_changed_anywhere_shows(byte: int) -> None:
    text = bytearray(write())
    assert is_as_written(bytes(text))
    text[byte] ^= 1
    assert not is_as_written(bytes(text))


def test_a_number_a_row_has_the_shape_that_triton_gives_it() -> None:
    value = read(write()).output[1]
    assert list(value.dims) == [1]
    assert value.HasField("reshape")
    assert list(value.reshape.shape) == []
