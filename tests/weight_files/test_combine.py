import contextlib
import math

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_samples import write_hdf5

from polyak_model.errors import InputError
from polyak_model.weight_files.combine import combine, combine_several, copy
from polyak_model.weight_files.reader import open_weights

NAME = "layers/dense/vars/0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Outlives the examples of one hypothesis test."""
    return tmp_path_factory.mktemp("examples")


def combine_arrays(folder, arrays, coefficients, progress=None):
    paths = [
        write_hdf5(folder / f"{n}.weights.h5", {NAME: array}) for n, array in enumerate(arrays)
    ]
    output = folder / "combined.weights.h5"
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in paths]
        target = stack.enter_context(h5py.File(output, "w"))
        combine(files, coefficients, [NAME], target, progress)
    with open_weights(output) as weights:
        return weights.variables[NAME].read()


@settings(max_examples=60)
@given(
    st.sampled_from(["float16", ml_dtypes.bfloat16, "float32", "float64"]),
    st.lists(st.floats(-50, 50), min_size=2, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_a_combination_is_the_sum_in_float64_rounded_once(folder, dtype, coefficients, seed):
    generator = np.random.default_rng(seed)
    arrays = [generator.normal(size=7).astype(dtype) for _ in coefficients]
    received = combine_arrays(folder, arrays, coefficients)
    assert received.dtype == np.dtype(dtype)
    for i in range(7):
        terms = [c * float(a[i]) for c, a in zip(coefficients, arrays, strict=True)]
        exact, rounding = math.fsum(terms), 2**-50 * sum(map(abs, terms))
        low, high = np.array([exact - rounding, exact + rounding]).astype(dtype)
        assert low <= received[i] <= high


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("count", [1, 4, 35])
def test_several_combinations_are_each_the_sum_in_float64_rounded_once(folder, dtype, count):
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(3, 2**15)).astype(dtype) for _ in range(count)]
    coefficients = np.stack([*generator.normal(size=(3, count)), np.full(count, 1 / count)])
    outputs = [folder / f"output-{n}.weights.h5" for n in range(4)]
    with contextlib.ExitStack() as stack:
        paths = [write_hdf5(folder / f"{n}.weights.h5", {NAME: a}) for n, a in enumerate(arrays)]
        files = [stack.enter_context(open_weights(path)) for path in paths]
        targets = [stack.enter_context(h5py.File(output, "w")) for output in outputs]
        combine_several(files, coefficients.tolist(), [NAME], targets)
    terms = np.stack(arrays).astype("longdouble")
    for output, own in zip(outputs, coefficients, strict=True):
        with open_weights(output) as weights:
            received = weights.variables[NAME].read()
        exact = np.tensordot(own, terms, 1)
        rounding = np.tensordot(np.abs(own), np.abs(terms), 1) * 2.0**-50
        assert received.dtype == np.dtype(dtype)
        assert np.all((exact - rounding).astype(dtype) <= received)
        assert np.all(received <= (exact + rounding).astype(dtype))


def test_coefficients_of_both_signs_may_leave_the_range_of_the_files(folder):
    arrays = [np.array([1.0, 5.0]), np.array([2.0, 4.0])]
    np.testing.assert_array_equal(combine_arrays(folder, arrays, [-1.0, 2.0]), [3.0, 3.0])
    np.testing.assert_array_equal(combine_arrays(folder, arrays, [2.0, 2.0]), [6.0, 18.0])


def test_a_result_out_of_range_is_refused(folder):
    arrays = [np.full(3, 60_000, "float16")] * 2
    with pytest.raises(InputError, match=f"combination of '{NAME}' exceeds the range of float16"):
        combine_arrays(folder, arrays, [2.0, 1.0])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_are_refused_with_the_file_that_contains_them(folder, value):
    arrays = [np.ones(3), np.array([1.0, value, 1.0]), np.ones(3)]
    with pytest.raises(InputError, match=rf"1\.weights\.h5': '{NAME}' contains inf or NaN"):
        combine_arrays(folder, arrays, [1.0, 0.0, -1.0])


def test_progress_increases_to_one(folder):
    progress = []
    combine_arrays(folder, [np.ones((5, 2**17), "float32")] * 2, [0.5, 0.5], progress.append)
    assert progress == sorted(progress)
    assert len(progress) > 1
    assert progress[-1] == 1


def test_variables_are_copied_under_new_names(tmp_path):
    arrays = {"a/vars/0": np.arange(6).reshape(3, 2), "b/vars/0": np.ones(2, ml_dtypes.bfloat16)}
    with (
        open_weights(write_hdf5(tmp_path / "a.weights.h5", arrays)) as weights,
        h5py.File(tmp_path / "b.weights.h5", "w") as target,
    ):
        copy(weights, {"a/vars/0": "c/vars/0", "b/vars/0": "b/vars/0"}, target)
    with open_weights(tmp_path / "b.weights.h5") as copied:
        assert sorted(copied.variables) == ["b/vars/0", "c/vars/0"]
        for old, new in (("a/vars/0", "c/vars/0"), ("b/vars/0", "b/vars/0")):
            np.testing.assert_array_equal(copied.variables[new].read(), arrays[old], strict=True)
