"""How averages move: the formulas, and by what means TensorFlow computes them.

Operation by operation, a move passes over memory once for each, and allocates. Compiled by XLA
it is one loop that reads the iterate, reads the average and writes it in place; but the call of
a compiled function takes as long as a dozen operations on a few numbers.
"""

import collections
import functools
import math

import keras
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from polyak_model.backend.tensorflow.packed_handles import pack, unpack

# From this many elements on a call of a compiled function is faster than single operations,
LARGE = 2**14
# and from this many on than to move together.
HUGE = 2**17
# More of them together would wait longer for the last iterate.
TOGETHER = 64
# Where those have fewer elements in all than this, so many at a time are faster, and to ask apart.
SMALL = 2**17
FEW = 32


def move(pairs, weight):
    """Moves averages: `average += weight * (iterate - average)`.

    A weight of 1 makes the average the iterate, a weight of 0 leaves it, bit
    for bit, and so does an iterate that equals the average. Where the iterate
    is infinite or not a number, the average stays.

    Args:
        pairs: Iterable of `(average, iterate)` variables of equal shape.
        weight: Scalar float64 tensor in [0, 1].
    """
    together = []
    for average, iterate in pairs:
        if math.prod(average.shape) < HUGE and _may_move_together(average, iterate):
            together.append((average, iterate))
        else:
            _apply(_moved, weight, iterate, average)
    for part in _parts(together, TOGETHER):
        elements = sum(math.prod(average.shape) for average, _ in part)
        if len(part) >= FEW and elements < SMALL:
            for few in _parts(part, FEW):
                _move_together(few, weight, ask_apart=True)
        else:
            _move_together(part, weight, ask_apart=False)


def _parts(pairs, size):
    return [pairs[first : first + size] for first in range(0, len(pairs), size)]


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
            shape = tuple(average.shape)
            function = _traced(formula, len(targets), shape, dtype, w.dtype, jit_compile=True)
            function(weight, w, *handles)
    else:
        values = map(tf.convert_to_tensor, targets)
        moved = formula(tf.cast(weight, dtype), tf.cast(w, dtype), *values)
        for target, value in zip(targets, moved, strict=True):
            target.assign(value)


def _is_compiled_as_a_whole():
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _move_together(pairs, weight, ask_apart):
    """Moves averages by the fewest operations: `average -= weight * (average - iterate)`.

    In a graph with hundreds of small variables every operation counts, and every variable that
    is captured. Whether the iterates are finite is asked of their sums. Seldom one is not, or the
    weight is 1, at which that difference is not exact: then they move with care, one by one.

    Args:
        pairs: List of `(average, iterate)`.
        weight: Scalar float64 tensor.
        ask_apart: Bool. Whether to ask for the sums in a function of its own;
            or right where the iterates come from, while large ones are still
            in the cache of the processor.
    """
    averages, iterates = zip(*pairs, strict=True)
    given = [weight, *(pack([v.handle for v in variables]) for variables in (averages, iterates))]
    kinds = [(tuple(a.shape), a.dtype, w.dtype) for a, w in pairs]

    def subtract(weight, averages, iterates):
        alphas = {dtype: tf.cast(weight, dtype) for dtype in {dtype for _, dtype, _ in kinds}}
        for kind, average, iterate in _each(kinds, averages, iterates):
            alpha = alphas[kind[1]]
            delta = _read(average, *kind[:2]) - _read_as(iterate, *kind)
            tf.raw_ops.ResourceApplyGradientDescent(var=average, alpha=alpha, delta=delta)

    def take_care(weight, averages, iterates):
        for (shape, dtype, iterate_dtype), average, iterate in _each(kinds, averages, iterates):
            w = _read(iterate, shape, iterate_dtype)
            # Traced once for all shapes: what is seldom taken must not take long to trace.
            _traced(_moved, 1, None, dtype, iterate_dtype)(weight, w, average)

    def ask(weight, averages, iterates):
        finite = _have_finite_sums(kinds, unpack(iterates))
        _either(finite, subtract, take_care, [weight, averages, iterates])

    subtract, take_care = _branch(subtract, given), _branch(take_care, given)
    below_1 = tf.not_equal(weight, 1)
    if ask_apart:
        _either(below_1, _branch(ask, given), take_care, given)
    else:
        finite = _have_finite_sums(kinds, [iterate.handle for iterate in iterates])
        _either(tf.logical_and(finite, below_1), subtract, take_care, given)


def _branch(function, given):
    return tf.function(function, autograph=False).get_concrete_function(*given)


def _either(condition, then, otherwise, given):
    # Unlike `tf.cond` this leaves the branch that is not taken alone, operation by operation.
    # It is also left alone by XLA that compiles parts of a graph at its own choice, which would
    # not see that a packed variable is the one that others use.
    tf.raw_ops.If(cond=condition, input=given, Tout=[], then_branch=then, else_branch=otherwise)


def _each(kinds, averages, iterates):
    return zip(kinds, unpack(averages), unpack(iterates), strict=True)


def _have_finite_sums(kinds, handles):
    """Tells whether sums of values, shape by shape, and of their squares are all finite.

    If so, then all the values are. The inverse fails only where a sum overflows.
    """
    groups = collections.defaultdict(list)
    for kind, handle in zip(kinds, handles, strict=True):
        groups[kind[:2]].append(_read_as(handle, *kind))
    sums = [tf.nn.l2_loss(tf.add_n(group)) for group in groups.values()]
    return tf.math.is_finite(tf.add_n([tf.cast(value, "float32") for value in sums]))


def _may_move_together(average, iterate):
    # What it gains on other devices than a CPU is not known.
    return (
        not tf.executing_eagerly()
        and not _is_compiled_as_a_whole()
        and isinstance(iterate, keras.Variable)
        and average.handle.device == iterate.handle.device
        and tf.DeviceSpec.from_string(average.handle.device).device_type == "CPU"
    )


def _read_as(handle, shape, dtype, own_dtype):
    return tf.cast(_read(handle, shape, own_dtype), dtype)


def _read(handle, shape, dtype):
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
def _traced(formula, count, shape, dtype, iterate_dtype, jit_compile=None):
    # Variables come as arguments: those of equal shape share one function, traced once.
    resource = tf.TensorSpec((), tf.resource)

    def apply(weight, w, *handles):
        values = [_read(handle, shape, dtype) for handle in handles]
        moved = formula(tf.cast(weight, dtype), tf.cast(w, dtype), *values)
        for handle, value in zip(handles, moved, strict=True):
            tf.raw_ops.AssignVariableOp(resource=handle, value=value)

    with tf.init_scope():
        function = tf.function(apply, jit_compile=jit_compile, autograph=False)
        return function.get_concrete_function(
            tf.TensorSpec((), "float64"), tf.TensorSpec(shape, iterate_dtype), *[resource] * count
        )
