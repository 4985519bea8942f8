"""Compilers must not simplify compensation away: algebraically, `(a + s) - a` is `s`.

XLA does so, and the test below fails, under XLA_FLAGS=--xla_cpu_enable_fast_math=true, which is
not its default.
"""

import numpy as np
import pytest
import tensorflow as tf
from pairs import Pair

from polyak_model import backend

COMPILERS = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}
UPDATES = 200
# c * (w - a) is about a tenth of the last place of `a`, so that adding it changes nothing.
WEIGHT = 1e-5
START = np.linspace(1, 2, 64, endpoint=False, dtype="float32")
ITERATE = START + np.float32(1e-3)


def run(compiler, compensated):
    """Updates an average many times and returns it and its residual, in float64."""
    average, iterate = tf.Variable(START), tf.Variable(ITERATE)
    residual = tf.Variable(np.zeros_like(START))
    pair, weight = Pair(average, iterate, residual if compensated else None), np.float64(WEIGHT)

    def several_updates():
        for _ in range(10):
            backend.update([([pair], tf.constant(weight))])

    compiled = COMPILERS[compiler](several_updates)
    for _ in range(UPDATES // 10):
        compiled()
    return [variable.numpy().astype("float64") for variable in (average, residual)]


def exact():
    """Returns the average in float64: each update shrinks the distance by a factor of `1 - c`."""
    distance = ITERATE.astype("float64") - START
    return ITERATE - distance * (1 - np.float64(np.float32(WEIGHT))) ** UPDATES


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compilers_keep_the_compensation_of_an_average(compiler):
    average, residual = run(compiler, compensated=True)
    uncompensated, _ = run(compiler, compensated=False)
    half_a_unit = np.spacing(START) / 2
    assert np.all(np.abs(average - exact()) <= 1.001 * half_a_unit)
    assert np.abs(average + residual - exact()).max() <= 2e-12
    # Without compensation the average has not changed at all.
    np.testing.assert_array_equal(uncompensated, START)
    assert np.abs(uncompensated - exact()).min() >= 16 * half_a_unit.max()
