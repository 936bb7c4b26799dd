import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from meam_policy.errors import DatasetError
from meam_training.data.npz_files import NpzFile

PLAIN = st.sampled_from([np.float16, np.float32, ">f8", np.int8, np.bool_])


@given(
    npst.arrays(PLAIN, npst.array_shapes(min_dims=1, max_dims=3, max_side=9)),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
)
def test_blocks_of_an_array_make_up_the_array(tmp_path_factory, array, column_major, compressed, rows):
    array = np.asfortranarray(array) if column_major else array
    path = tmp_path_factory.mktemp("npz") / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, other=np.zeros(3), array=array)
    with NpzFile(path) as file:
        assert file.names == {"other", "array"}
        member = file.open("array")
        assert (member.shape, member.dtype) == (array.shape, array.dtype)
        blocks = [member.read(rows) for _ in range(0, len(array), rows)]
        np.testing.assert_array_equal(np.concatenate(blocks), array)
        assert len(member.read(rows)) == 0


def test_arrays_are_read_side_by_side(tmp_path):
    np.savez(tmp_path / "data.npz", a=np.arange(6), b=np.arange(6) * 10)
    with NpzFile(tmp_path / "data.npz") as file:
        a, b = file.open("a"), file.open("b")
        rows = [(a.read(2).tolist(), b.read(2).tolist()) for _ in range(3)]
    assert rows == [([0, 1], [0, 10]), ([2, 3], [20, 30]), ([4, 5], [40, 50])]


def array_file(shape, content=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + content


@pytest.mark.parametrize("content", [array_file((10**12,)), array_file((2,), bytes(15)), array_file((2,), bytes(17))])
def test_an_array_that_claims_more_or_less_than_its_file_holds_is_refused(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with NpzFile(tmp_path / "data.npz") as file, pytest.raises(DatasetError, match="not an .npz file of plain arrays"):
        file.open("a")


def test_an_array_packed_more_tightly_than_deflate_can_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", array_file((10**6,), bytes(8 * 10**6)))
    with NpzFile(tmp_path / "data.npz") as file, pytest.raises(DatasetError, match=r"a\.npy claims 8000128 bytes"):
        file.open("a")


def test_zeros_that_deflate_packed_are_read(tmp_path):
    np.savez_compressed(tmp_path / "data.npz", a=np.zeros(10**6))
    with NpzFile(tmp_path / "data.npz") as file:
        assert not file.open("a").read(10**6).any()


def test_a_byte_that_changed_in_storage_is_noticed(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, a=np.zeros(1000))
    whole = bytearray(path.read_bytes())
    whole[4000] ^= 1
    path.write_bytes(whole)
    with NpzFile(path) as file, pytest.raises(DatasetError, match="Bad CRC-32"):
        file.open("a").read(1000)


def test_a_missing_array_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", a=np.zeros(1))
    with NpzFile(tmp_path / "data.npz") as file, pytest.raises(DatasetError, match="no item named 'b.npy'"):
        file.open("b")
