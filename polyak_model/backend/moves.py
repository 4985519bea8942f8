"""How averages move: the formulas, and by what means TensorFlow computes them.

Operation by operation, a move passes over memory once for each, and allocates. Compiled by XLA
it is one loop that reads the iterate, reads the average and writes it in place; but the call of
a compiled function takes as long as a dozen operations on a few numbers.
"""

import functools
import math

import keras
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from polyak_model.backend.handles import pack, unpack

# From this many elements on a call of a compiled function pays.
LARGE = 2**14
# From this many small variables on it pays to save operations at the price of a condition.
MANY = 16


def move(pairs, weight):
    """Moves averages: `average += weight * (iterate - average)`.

    A weight of 1 makes the average the iterate, a weight of 0 leaves it, bit
    for bit, and so does an iterate that equals the average. Where the iterate
    is infinite or not a number, the average stays.

    Args:
        pairs: Iterable of `(average, iterate)` variables of equal shape.
        weight: Scalar float64 tensor in [0, 1].
    """
    pairs = list(pairs)
    small = [pair for pair in pairs if not _pays_to_compile(pair[0]) and _pays_to_subtract(*pair)]
    if len(small) >= MANY:
        _subtract(small, weight)
        done = {id(average) for average, _ in small}
        pairs = [pair for pair in pairs if id(pair[0]) not in done]
    for average, iterate in pairs:
        _apply(_moved, weight, iterate, average)


def move_compensated(triples, weight):
    """Moves averages and carries along what rounding took (Kahan).

    The average to twice the precision is `average + residual`. Where the
    iterate is infinite or not a number, both stay.

    Args:
        triples: Iterable of `(average, iterate, residual)` variables of equal
            shape.
        weight: Scalar float64 tensor in [0, 1].

    Reference:
        Kahan 1965, Further remarks on reducing truncation errors.
    """
    for average, iterate, residual in triples:
        _apply(_moved_compensated, weight, iterate, average, residual)


def _moved(c, w, a):
    w = tf.where(tf.math.is_finite(w), w, a)
    return (tf.where(c == 1, w, a + c * (w - a)),)


def _moved_compensated(c, w, a, r):
    step = c * ((w - a) - r) + r
    moved = tf.where(c == 1, w, a + step)
    rest = tf.where(c == 1, tf.zeros_like(r), step - (moved - a))
    finite = tf.math.is_finite(w)
    return tf.where(finite, moved, a), tf.where(finite, rest, r)


def _apply(formula, weight, iterate, *targets):
    """Assigns to variables what a formula makes of them and the iterate."""
    average, w = targets[0], tf.convert_to_tensor(iterate)
    dtype = tf.as_dtype(average.dtype)
    if _pays_to_compile(average):
        handles = [target.handle for target in targets]
        # An average is moved where it lives, wherever the iterate comes from.
        with tf.device(handles[0].device):
            function = _compiled(formula, len(targets), tuple(average.shape), dtype, w.dtype)
            function(weight, w, *handles)
    else:
        values = map(tf.convert_to_tensor, targets)
        moved = formula(tf.cast(weight, dtype), tf.cast(w, dtype), *values)
        for target, value in zip(targets, moved, strict=True):
            target.assign(value)


def _is_compiled_as_a_whole():
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _subtract(pairs, weight):
    """Moves averages by the fewest operations: `average -= weight * (average - iterate)`.

    In a graph with hundreds of small variables every operation counts, and every variable that
    is captured. That difference is not exact at a weight of 1, which is rare: averages are then
    assigned too, inside a condition.
    """
    averages, iterates = zip(*pairs, strict=True)
    packed = [pack([v.handle for v in variables]) for variables in (averages, iterates)]
    kinds = [(tuple(a.shape), a.dtype, w.dtype) for a, w in pairs]

    def become(*packed):
        for kind, *handles in zip(kinds, *map(unpack, packed), strict=True):
            _become(*kind)(*handles)

    def leave(*packed):
        pass

    branches = [tf.function(branch, autograph=False) for branch in (become, leave)]
    then, otherwise = [branch.get_concrete_function(*packed) for branch in branches]
    alphas = {a.dtype: tf.cast(weight, a.dtype) for a in averages}
    # XLA, where it compiles parts of a graph at its own choice, would not see that a packed
    # variable is the one that others use.
    with tf.xla.experimental.jit_scope(compile_ops=False):
        for kind, handle, iterate in zip(kinds, unpack(packed[0]), iterates, strict=True):
            a, w = _read_finite(*kind, handle, iterate.handle)
            alpha = alphas[kind[1]]
            tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=alpha, delta=a - w)
        # Unlike `tf.cond` this leaves the branch that is not taken alone, operation by operation.
        tf.raw_ops.If(
            cond=tf.equal(weight, 1), input=packed, Tout=[], then_branch=then, else_branch=otherwise
        )


def _read_finite(shape, dtype, iterate_dtype, average, iterate):
    """Reads an average and its iterate; where that is not finite, the average stands for it."""
    a, w = _read(average, dtype, shape), tf.cast(_read(iterate, iterate_dtype, shape), dtype)
    return a, tf.where(tf.math.is_finite(w), w, a)


@functools.cache
def _become(*kind):
    # Variables of equal shape share one function: it takes less time to trace.
    def become(average, iterate):
        _, w = _read_finite(*kind, average, iterate)
        tf.raw_ops.AssignVariableOp(resource=average, value=w)

    resource = tf.TensorSpec((), tf.resource)
    with tf.init_scope():
        return tf.function(become, autograph=False).get_concrete_function(resource, resource)


def _pays_to_subtract(average, iterate):
    # What it gains on other devices than a CPU is not known.
    return (
        not tf.executing_eagerly()
        and not _is_compiled_as_a_whole()
        and isinstance(iterate, keras.Variable)
        and average.handle.device == iterate.handle.device
        and tf.DeviceSpec.from_string(average.handle.device).device_type == "CPU"
    )


def _read(handle, dtype, shape):
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    value.set_shape(shape)
    return value


def _pays_to_compile(average):
    # Within a function that XLA compiles as a whole, this is a part of it already.
    return math.prod(average.shape) >= LARGE and not _is_compiled_as_a_whole() and xla_works()


@functools.cache
def xla_works():
    """Tells whether XLA is a part of this TensorFlow: not of every build it is."""
    try:
        with tf.init_scope():
            tf.function(lambda: tf.constant(1.0) + 1.0, jit_compile=True)()
    except tf.errors.OpError:
        return False
    return True


@functools.cache
def _compiled(formula, count, shape, dtype, iterate_dtype):
    # Variables come as arguments: those of equal shape share one function, compiled once.
    resource = tf.TensorSpec((), tf.resource)

    def apply(weight, w, *handles):
        values = [_read(handle, dtype, shape) for handle in handles]
        moved = formula(tf.cast(weight, dtype), tf.cast(w, dtype), *values)
        for handle, value in zip(handles, moved, strict=True):
            tf.raw_ops.AssignVariableOp(resource=handle, value=value)

    with tf.init_scope():
        function = tf.function(apply, jit_compile=True, autograph=False)
        return function.get_concrete_function(
            tf.TensorSpec((), "float64"), tf.TensorSpec(shape, iterate_dtype), *[resource] * count
        )
