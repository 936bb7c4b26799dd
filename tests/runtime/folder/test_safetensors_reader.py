import json
import pickle

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy import FormatError
from meam_policy.folder.safetensors_reader import read_arrays, read_metadata

safetensors_numpy = pytest.importorskip("safetensors.numpy")
NAME = "golden.safetensors"
SHAPES = arrays_of.array_shapes(min_dims=0, max_dims=4, max_side=4)
ARRAYS = st.dictionaries(
    st.text(max_size=8).filter(lambda key: key != "__metadata__"), SHAPES.flatmap(lambda s: arrays_of.arrays("f4", s))
)
SMALL = {"actions": np.arange(6, dtype=np.float32).reshape(3, 2), "noise": np.array([np.pi, -0.0], np.float32)}


def file_of(header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def agrees_or_refuses(data):
    """Read a file; where it is accepted, the safetensors library must read the same arrays."""
    try:
        seen = read_arrays(data, NAME)
    except FormatError:
        return False
    expected = safetensors_numpy.load(data)
    assert seen.keys() == expected.keys()
    for key, array in seen.items():
        assert (array.dtype, array.shape) == (expected[key].dtype, expected[key].shape)
        assert array.tobytes() == expected[key].tobytes()
    return True


# The library writes an empty header of metadata as JSON that nobody reads.
@pytest.mark.slow
@given(ARRAYS, st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1))
def test_files_of_the_safetensors_library_are_read_to_the_bit(arrays, metadata):
    assert agrees_or_refuses(safetensors_numpy.save(arrays, metadata))


def test_arrays_are_copies_that_can_be_written_to():
    arrays = read_arrays(safetensors_numpy.save(SMALL), NAME)
    for array in arrays.values():
        array += 1
        assert array.flags.aligned


def test_every_truncation_is_refused():
    data = safetensors_numpy.save(SMALL)
    for end in range(len(data)):
        assert not agrees_or_refuses(data[:end]), end


@given(st.binary(min_size=1, max_size=20))
def test_trailing_bytes_are_refused(extra):
    with pytest.raises(FormatError, match="bytes follow its last array; expected none"):
        read_arrays(safetensors_numpy.save(SMALL) + extra, NAME)


@pytest.mark.slow
@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), min_size=1, max_size=3))
def test_file_with_changed_bytes_is_read_as_the_library_does_or_refused(changes):
    data = bytearray(safetensors_numpy.save(SMALL))
    for position, value in changes:
        data[position % len(data)] = value
    agrees_or_refuses(bytes(data))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_as_the_library_does_or_refused(data):
    agrees_or_refuses(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 20)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "I8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)
NUMBERS = st.lists(st.integers(0, 8), max_size=3)
ENTRIES = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F16"]), "shape": NUMBERS, "data_offsets": NUMBERS})


@pytest.mark.slow
@settings(max_examples=500)
@given(st.dictionaries(st.text(max_size=2), ENTRIES | JSON, max_size=3) | JSON, st.integers(0, 16))
def test_arbitrary_header_is_read_as_the_library_does_or_refused(header, size):
    agrees_or_refuses(file_of(header, bytes(size)))


def test_the_texts_beside_the_arrays_are_read_after_the_same_checks():
    texts = {"export": '{"steps": 1}', "é": ""}
    assert read_metadata(safetensors_numpy.save(SMALL, texts), NAME) == texts
    assert read_metadata(safetensors_numpy.save(SMALL), NAME) == {}
    with pytest.raises(FormatError, match="__metadata__ is not"):
        read_metadata(file_of({"__metadata__": {"a": 1}}), NAME)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", f"its header is {2**63} bytes long; expected at most 2"),
        ((2**64 - 1).to_bytes(8, "little"), "bytes long; expected at most 0"),
        ((2**21).to_bytes(8, "little") + bytes(2**21), f"expected at most {2**20}"),
        (pickle.dumps(SMALL), "bytes long; expected at most"),
        (b"<!DOCTYPE html><html></html>", "bytes long; expected at most"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (file_of(b"\xff{}"), "not JSON"),
        (file_of(b'{"a": '), "not JSON"),
        (file_of(b"[" * 100_000), "nested too deeply"),
        (file_of(b'{"a": 0, "a": 0}'), "a key appears twice"),
        (file_of(b'{"\\ud800": 0}'), "not JSON"),
        (file_of([]), "not an object"),
        (file_of(b" {}"), "not an object"),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__ is not"),
        (file_of({"__metadata__": None}), "__metadata__ is not"),
        (file_of({"a": {"dtype": "F32", "shape": []}}), '"a" is not a valid'),
        (file_of({"a": {**entry([1], 0, 4), "extra": 0}}, bytes(4)), "dtype, shape and data_offsets"),
        (file_of({"a": entry([1], 0, 8, "F64")}, bytes(8)), "\"a\" has the dtype 'F64'; expected F32"),
        (file_of({"a": entry([0], 0, 0)}), r"its shape is \[0\]"),
        (file_of({"a": entry([True], 0, 4)}, bytes(4)), r"its shape is \[True\]"),
        (file_of({"a": entry([1] * 17, 0, 4)}, bytes(4)), "at most 16 sizes"),
        (file_of({"a": entry([1], 0, 4.0)}, bytes(4)), "expected two numbers"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]}}', bytes(4)), "-0 is not a size"),
        (file_of({"a": entry([2**62, 2**62], 0, 4)}, bytes(4)), '"a" has 4 bytes; expected those of'),
        (file_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), '"b" is at bytes 4 to 12 of 12'),
        (file_of({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "at bytes 0 to 4 of 4"),
        (file_of({"a": entry([1], 4, 8)}, bytes(8)), "expected it to begin at 0"),
        (file_of({"a": entry([2], 0, 8)}, bytes(4)), '"a" is at bytes 0 to 8 of 4'),
        (file_of({"a": entry([1], 4, 0)}, bytes(4)), "begin at 0"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, ' + b"9" * 5000 + b"]}}"), "not a size"),
    ],
)
def test_broken_file_is_refused_with_its_name_and_the_reason(data, message):
    with pytest.raises(FormatError, match=message) as caught:
        read_arrays(data, NAME)
    assert str(caught.value).startswith(NAME)
    assert len(str(caught.value)) < 400
    assert str(caught.value).endswith((" again.", "`git lfs pull`."))
