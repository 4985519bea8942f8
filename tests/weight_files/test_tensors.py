import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weight_samples import write_hdf5

from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.tensor import cut


@given(st.lists(st.integers(0, 7), max_size=4).map(tuple), st.integers(1, 60))
def test_the_parts_concatenate_to_the_tensor_in_row_major_order(shape, size):
    whole = np.arange(math.prod(shape)).reshape(shape)
    parts = list(cut(shape, size))
    assert all(math.prod(part.shape) <= size for part in parts)
    assert all(whole[part.index].shape == part.shape for part in parts)
    np.testing.assert_array_equal(
        np.concatenate([whole[part.index].reshape(-1) for part in parts]), whole.reshape(-1)
    )
    for part in parts:
        assert (whole[part.index].reshape(-1)[:1] == part.start).all()


def test_a_huge_empty_tensor_is_one_part():
    assert [part.shape for part in cut((2**60, 0), 4)] == [(2**60, 0)]


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64", "int8", ">i8", "bool"])
@pytest.mark.parametrize("options", [{}, {"chunks": (2, 3, 2)}, {"compression": "gzip"}])
@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_parts_read_as_slices_of_the_whole(tmp_path, dtype, options, size):
    array = (np.arange(5 * 4 * 3).reshape(5, 4, 3) % 7).astype(dtype)
    with open_weights(write_hdf5(tmp_path / "a.weights.h5", {"vars/0": array}, **options)) as file:
        variable = file.variables["vars/0"]
        assert variable.dtype == np.dtype(dtype).name
        np.testing.assert_array_equal(variable.read(), array)
        for part in cut(variable.shape, size):
            read = variable.read(part)
            assert (read.dtype, read.shape) == (array.dtype, part.shape)
            np.testing.assert_array_equal(read, array[part.index])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors_are_read(tmp_path, shape):
    array = np.ones(shape, "float32")
    with open_weights(write_hdf5(tmp_path / "a.weights.h5", {"vars/0": array})) as file:
        np.testing.assert_array_equal(file.variables["vars/0"].read(), array, strict=True)
