import pickle
import random
import zipfile

import numpy as np
import pytest

from polyak_model.errors import InputError
from polyak_model.weight_files.npz import ArraysError, load_held_out, read_arrays

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
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ArraysError) as caught:
        read_arrays(tmp_path / "a.npz", EXAMPLE)
    assert caught.value.problem.startswith("which cannot be read as arrays of numbers (")
    assert caught.value.remedy == f"Write it with {EXAMPLE}, without object arrays"


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Trap()], object))
    with pytest.raises(ArraysError, match="ValueError"):
        read_arrays(tmp_path / "a.npz", EXAMPLE)


def test_a_missing_file_and_a_single_array_are_refused_with_different_reasons(tmp_path):
    with pytest.raises(ArraysError, match="does not exist"):
        read_arrays(tmp_path / "a.npz", EXAMPLE)
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(ArraysError, match="a single array without a name"):
        read_arrays(tmp_path / "a.npz", EXAMPLE)


# Held-out data

X, Y = np.arange(6.0).reshape(3, 2), np.arange(3)


@pytest.fixture
def load(tmp_path):
    """Saves arrays and loads them."""

    def load(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return load_held_out(tmp_path / "data.npz")

    return load


def test_inputs_and_targets_are_loaded_as_they_are(load):
    x, y = load(x=X, y=Y, other=np.zeros(9))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


def test_numbered_arrays_are_loaded_as_a_list_in_order(load):
    x, y = load(**{f"x{i}": X + i for i in range(11)}, y=Y)
    assert [array[0, 0] for array in x] == list(range(11))
    np.testing.assert_array_equal(y, Y)
    assert type(load(x=X, y0=Y)[1]) is list


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"y": Y}, "which lacks `x` and has ['y']. Name the arrays: numpy.savez(file, x=inputs"),
        ({"x": X}, "which lacks `y`"),
        ({"x1": X, "y": Y}, "which lacks `x`"),
        ({"x": X, "y": Y[:2]}, "with 3 in `x`, 2 in `y` examples"),
        ({"x": X[:0], "y": Y[:0]}, "with 0 in `x`, 0 in `y` examples"),
        ({"x": X, "y": np.float32(1)}, "with 3 in `x`, 0 in `y` examples"),
        ({"x": X, "y": np.array(["a", "b", "c"])}, "where `y` has dtype <U1. Convert it"),
    ],
)
def test_invalid_arrays_are_refused(load, arrays, problem):
    with pytest.raises(InputError) as caught:
        load(**arrays)
    assert "`--data` must be an .npz file of held-out data" in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_member_that_is_not_an_array_are_refused(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(InputError, match="data.npz', which does not exist. Check the path."):
        load_held_out(path)
    np.savez(path, y=Y)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x", "text")
    with pytest.raises(InputError, match="cannot be read as arrays of numbers"):
        load_held_out(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_loaded_or_refused_in_one_line(tmp_path, save):
    path = tmp_path / "data.npz"
    save(path, x=X, y=Y)
    intact = path.read_bytes()
    generator = random.Random(0)
    lines = []
    for _ in range(500):
        damaged = bytearray(intact)
        for _ in range(generator.choice([1, 2, 8])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load_held_out(path)
        except InputError as error:
            lines.append(str(error))
    assert 0 < len(lines) < 500
    assert all(line.isprintable() for line in lines)
