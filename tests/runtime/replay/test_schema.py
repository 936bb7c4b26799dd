import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from meam_policy.flight.schema import TOPICS, encode, numbers
from meam_policy.replay.messages import observation_of

SCALARS = ("boolean", "string", "number", "integer")


def require_viewable(schema, place):
    """Two rules of foxglove/studio's parseJsonSchema: properties have types, and arrays hold scalars or objects."""
    assert schema.get("type") == "object", place
    for name, field in schema["properties"].items():
        kind, here = field.get("type"), f"{place}.{name}"
        if kind == "array":
            assert field["items"].get("type") in (*SCALARS, "object"), here
            field = field["items"]
        else:
            assert kind in (*SCALARS, "object"), here
        if field["type"] == "object":
            require_viewable(field, here)


def require_valid(value, schema):
    types = {"object": dict, "array": list, "number": (int, float), "integer": int, "string": str, "boolean": bool}
    assert isinstance(value, types[schema["type"]])
    if schema["type"] == "object":
        for name in value.keys() & schema["properties"].keys():
            require_valid(value[name], schema["properties"][name])
    for item in value if schema["type"] == "array" else ():
        require_valid(item, schema["items"])


@pytest.mark.parametrize("topic", TOPICS)
def test_a_viewer_can_take_the_schemas(topic):
    require_viewable(TOPICS[topic], topic)


def test_messages_are_what_their_schemas_say():
    tick = {"observation": np.ones((2, 3)), "chosen": np.ones((2, 2), np.float32), "action": np.ones((2, 2))}
    inference = {"noise": np.ones(3), "chunk": np.ones((4, 2, 2)), "prefix": np.zeros((4, 2)), "delays": [1, 2]}
    messages = {"tick": tick, "inference": inference, "event": {"observation": {"state": np.ones(2)}}}
    for topic, message in messages.items():
        require_valid(json.loads(encode(message)), TOPICS[topic])
    chunk = numbers(json.loads(encode(inference))["chunk"])
    np.testing.assert_array_equal(chunk, inference["chunk"], strict=True)


PARTS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
KEYS = st.sampled_from(["values", "shape", "observation", "state"])


@given(PARTS | st.recursive(PARTS, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=4))
def test_an_observation_comes_back_as_it_was_given(given_):
    def same(was, now):
        if isinstance(was, dict):
            assert isinstance(now, dict)
            assert list(was) == list(now)
            for key in was:
                same(was[key], now[key])
        else:
            np.testing.assert_array_equal(was, np.asarray(now, np.float32), strict=True)

    same(given_, observation_of(json.loads(encode({"observation": given_}))["observation"]))
