import io
import struct

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model.weight_files.hdf5 import GuardedFile

CONTENT = bytes(range(256))


@given(st.integers(0, 256), st.integers(0, 256), st.integers(0, 300), st.integers(0, 300))
def test_a_part_reads_as_a_file_of_its_own(offset, size, position, count):
    size = min(size, 256 - offset)
    file = GuardedFile(io.BytesIO(CONTENT), offset, size)
    part = CONTENT[offset : offset + size]
    assert file.seek(0, io.SEEK_END) == file.size == size
    assert file.seek(position) == position
    if position + count > size:
        with pytest.raises(OSError, match="it ends before byte"):
            file.readinto(bytearray(count))
    else:
        assert file.read(count) == part[position : position + count]
        assert file.seek(0, io.SEEK_CUR) == position + count


def test_a_file_that_shrinks_while_it_is_read_is_refused():
    whole = io.BytesIO(CONTENT)
    file = GuardedFile(whole)
    whole.truncate(100)
    with pytest.raises(OSError, match="it was truncated while it was read"):
        file.read(200)


def heap(*objects, size=4096):
    """A heap of HDF5: pairs of an index and the length that it claims."""
    head = struct.pack("<4sB3xQ", b"GCOL", 1, size)
    chain = b"".join(struct.pack("<HH4xQ", index, 1, length) for index, length in objects)
    return (head + chain).ljust(4096, b"\0")


@pytest.mark.parametrize(
    "content",
    [
        heap((0, 0)),
        heap((1, 2**64 - 16)),
        heap((1, 2**64 - 8)),
        heap((1, 4096)),
        heap((0, 2**63)),
        heap(size=5000),
        heap(size=2**62),
    ],
)
def test_a_chain_that_stands_still_or_leaves_its_heap_is_refused(content):
    with pytest.raises(OSError, match="has no end|is longer than|ends before byte"):
        GuardedFile(io.BytesIO(content)).read(len(content))


def test_heaps_that_hdf5_wrote_are_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for n in range(300):
            file.attrs[f"text {n}"] = "ä" * n
    with open(tmp_path / "a.h5", "rb") as file, h5py.File(GuardedFile(file), "r") as hdf5:
        assert [hdf5.attrs[f"text {n}"] for n in range(300)] == ["ä" * n for n in range(300)]
