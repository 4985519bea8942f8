"""The formulas of an update, and their functions in TensorFlow, compiled by XLA or not."""

import functools

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext


def updated(c, w, a):
    """Returns `a + c * (w - a)`, as a tuple of one."""
    w = tf.where(tf.math.is_finite(w), w, a)
    # Half of a difference never overflows, and halving is exact. From the nearer end the step is
    # at most half of the difference, so it does not overflow either.
    half, near = 0.5 * w - 0.5 * a, c <= 0.5
    moved = tf.where(near, a, w) + tf.where(near, 2 * c, 2 * (c - 1)) * half
    return (tf.where(c == 1, w, moved),)


def updated_compensated(c, w, a, r):
    """Returns the same for an average of twice the precision, `a + r`, and its new residual."""
    moved, rest = updated_moderately(c, w, a, r)
    # Where the difference overflows, it does not at a quarter of the scale, which is exact.
    overflows = tf.logical_not(tf.math.is_finite(rest))
    moved = tf.where(overflows, (1 - c) * a + c * w, moved)
    rest = tf.where(overflows, 4 * (_step(c, w / 4, a / 4, r / 4) - (moved / 4 - a / 4)), rest)
    moved, rest = tf.where(c == 1, w, moved), tf.where(c == 1, tf.zeros_like(r), rest)
    finite = tf.math.is_finite(w)
    return tf.where(finite, moved, a), tf.where(finite, rest, r)


def updated_moderately(c, w, a, r):
    """Returns the same where `c` is below 1, `w` is finite and no difference overflows."""
    step = _step(c, w, a, r)
    moved = a + step
    return moved, step - (moved - a)


def _step(c, w, a, r):
    return c * ((w - a) - r) + r


def read(handle, shape, dtype):
    """Returns the value of a variable, given its handle."""
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    value.set_shape(shape)
    return value


@functools.cache
def compiled(formula):
    """Returns a formula as one function that XLA compiles."""
    return tf.function(formula, jit_compile=True, autograph=False)


@functools.cache
def traced(formula, counts, shape, dtype, iterate_dtype, jit_compile=None):
    """Returns a function of weights, the iterate and handles that applies a formula in place.

    Variables are arguments, so that all those of one shape share one function.

    Args:
        formula: One of this module.
        counts: Tuple with the number of averages of the iterate, and the number
            of variables of each.
        shape: Tuple, the shape of the variables, or None for any.
        dtype: The dtype of the variables.
        iterate_dtype: The dtype of the iterate.
        jit_compile: Bool. Whether XLA compiles it.
    """
    averages, each = counts
    scalar, resource = tf.TensorSpec((), "float64"), tf.TensorSpec((), tf.resource)

    def apply(*arguments):
        weights, (w, *handles) = arguments[:averages], arguments[averages:]
        w = tf.cast(w, dtype)
        for i, weight in enumerate(weights):
            own = handles[i * each : (i + 1) * each]
            values = [read(handle, shape, dtype) for handle in own]
            results = formula(tf.cast(weight, dtype), w, *values)
            for handle, value in zip(own, results, strict=True):
                tf.raw_ops.AssignVariableOp(resource=handle, value=value)

    with tf.init_scope():
        function = tf.function(apply, jit_compile=jit_compile, autograph=False)
        iterate = tf.TensorSpec(shape, iterate_dtype)
        return function.get_concrete_function(
            *[scalar] * averages, iterate, *[resource] * averages * each
        )


def inside_xla():
    """Returns whether the current graph is compiled by XLA as a whole."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@functools.cache
def xla_works():
    """Returns whether this build of TensorFlow includes XLA."""
    try:
        with tf.init_scope():
            tf.function(lambda: tf.constant(1.0) + 1.0, jit_compile=True)()
    except tf.errors.OpError:
        return False
    return True
