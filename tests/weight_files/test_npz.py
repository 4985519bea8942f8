import pickle

import numpy as np
import pytest

from polyak_model.weight_files.npz import ArraysError, read_arrays

EXAMPLE = "numpy.savez(file, x=x)"


class Trap:
    """Ends the process once it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


def test_arrays_are_read_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.ones((2, 2), "float16"))
    arrays = read_arrays(tmp_path / "a.npz", EXAMPLE)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "x": ("int64", (3,)),
        "y": ("float16", (2, 2)),
    }


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", pickle.dumps(Trap())])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ArraysError) as caught:
        read_arrays(tmp_path / "a.npz", EXAMPLE)
    assert caught.value.problem.startswith("which cannot be read as arrays of numbers (")
    assert caught.value.remedy == f"Write it with {EXAMPLE}, without object arrays"


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Trap()], object))
    with pytest.raises(ArraysError, match="ValueError"):
        read_arrays(tmp_path / "a.npz", EXAMPLE)


def test_a_missing_file_and_one_of_a_single_array_are_told_apart(tmp_path):
    with pytest.raises(ArraysError, match="does not exist"):
        read_arrays(tmp_path / "a.npz", EXAMPLE)
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(ArraysError, match="a single array without a name"):
        read_arrays(tmp_path / "a.npz", EXAMPLE)
