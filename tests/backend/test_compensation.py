"""Compilers may not simplify compensation away: algebraically, `(a + s) - a` is `s`.

XLA does so, and the test below fails, under XLA_FLAGS=--xla_cpu_enable_fast_math=true, which is
not its default.
"""

import numpy as np
import pytest
import tensorflow as tf

from polyak_model import backend

pytestmark = pytest.mark.without_keras

COMPILERS = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}
MOVES = 200
# A step of c * (w - a) is about a tenth of the last place of `a`: alone it changes nothing.
WEIGHT = 1e-5
START = np.linspace(1, 2, 64, endpoint=False, dtype="float32")
ITERATE = START + np.float32(1e-3)


def run(compiler, move, *beside):
    """Moves an average many times, some of them in one graph, and returns its variables."""
    average, *rest = variables = [tf.Variable(value) for value in (START, *beside)]
    iterate, weight = tf.Variable(ITERATE), tf.constant(WEIGHT, "float64")

    def moves():
        for _ in range(10):
            move([(average, iterate, *rest)], weight)

    compiled = COMPILERS[compiler](moves)
    for _ in range(MOVES // 10):
        compiled()
    return [variable.numpy().astype("float64") for variable in variables]


def exact():
    """What the average is, in float64: its distance shrinks by `1 - c` with every move."""
    distance = ITERATE.astype("float64") - START
    return ITERATE - distance * (1 - np.float64(np.float32(WEIGHT))) ** MOVES


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiler_leaves_the_compensation_of_an_average(compiler):
    average, residual = run(compiler, backend.move_compensated, np.zeros_like(START))
    (uncompensated,) = run(compiler, backend.move)
    half_a_unit = np.spacing(START) / 2
    assert np.all(np.abs(average - exact()) <= 1.001 * half_a_unit)
    assert np.abs(average + residual - exact()).max() <= 2e-12
    # Where nothing is carried along, the average has not even begun to move.
    np.testing.assert_array_equal(uncompensated, START)
    assert np.abs(uncompensated - exact()).min() >= 16 * half_a_unit.max()
