"""One fingerprint of variables, the same on all backends and however it is computed."""

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from hypothesis import given
from hypothesis import strategies as st

from polyak_model import backend

SHAPES = [(), (1,), (5,), (2, 4), (7, 3)]


def variables(*values, dtype="float32"):
    return [keras.Variable(np.array(value), dtype=dtype) for value in values]


def computed_by_numpy(values):
    """Returns the fingerprint that the interface defines."""
    total, odd, low = np.uint64(0), np.uint64(0x9E3779B1), np.uint64(2**32 - 1)

    def mix(x):
        return x ^ (x >> np.uint64(16))

    for value in values:
        value = np.ascontiguousarray(value)
        bits = np.atleast_1d(value).view("uint16" if value.dtype.itemsize == 2 else "uint32")
        bits = bits.ravel().astype("uint64")
        multipliers = mix(np.arange(1, bits.size + 1, dtype="uint64") * odd & low) | np.uint64(1)
        total = (total * odd + (mix(bits) * multipliers & low).sum()) & low
    return int(total.astype("uint32").view("int32")) or 1


def traced(function):
    """Returns the functions that compute what a function does, on this backend."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return [function, tf.function(function), tf.function(function, jit_compile=True)]
    if BACKEND == "jax":
        import jax

        return [function, jax.jit(function)]
    return [function]


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("float64", marks=pytest.mark.skipif(BACKEND == "jax", reason="JAX: 32 bits")),
        *("float32", "bfloat16", "float16"),
    ],
)
def test_a_fingerprint_is_the_same_however_it_is_computed(dtype):
    several = variables(*(np.random.rand(*shape) for shape in SHAPES), dtype=dtype)
    expected = computed_by_numpy([keras.ops.convert_to_numpy(variable) for variable in several])
    for function in traced(lambda: backend.fingerprint(several)):
        assert int(function()) == expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", -738280320), ("bfloat16", 394181760), ("float16", 1933026304)],
)
def test_a_fingerprint_is_the_same_on_all_backends(dtype, expected):
    several = variables(np.arange(6) / 8 - 0.25, [[1.5], [-2.0]], dtype=dtype)
    assert int(backend.fingerprint(several)) == expected


@given(
    values=st.lists(st.integers(-8, 8), min_size=6, max_size=6),
    steps=st.lists(st.integers(-2, 2), min_size=6, max_size=6),
)
def test_fingerprints_differ_where_values_do(values, steps):
    values, moved = np.array(values), np.array(values) + np.array(steps)
    one, other = (backend.fingerprint(variables(v[:4], v[4:])) for v in (values, moved))
    assert (int(one) == int(other)) == np.array_equal(values, moved)
    assert int(one) != 0


def test_no_fingerprint_is_0():
    assert int(backend.fingerprint(variables([0.0]))) == 1
