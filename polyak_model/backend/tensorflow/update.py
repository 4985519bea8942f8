"""How averages are updated, by the fastest means that TensorFlow has for each.

Operation by operation, an update reads and writes memory several times. Compiled by XLA it is one
loop that works in place, but calling a compiled function takes as long as a dozen operations on a
few numbers. Small averages are updated in groups. All averages of one raw weight are updated
together, while its value is in the cache of the processor.
"""

import itertools
import math

import tensorflow as tf

from polyak_model.backend.tensorflow import kernels
from polyak_model.backend.tensorflow.grouped import can_be_grouped, update_group
from polyak_model.backend.tensorflow.strategies import on_each_component

# From this many elements on, a compiled function is faster than single operations,
LARGE = 2**14
# and from this many on, faster than an update in a group.
HUGE = 2**17
# Larger groups would wait longer for their last iterate.
TOGETHER = 64
# Groups of fewer elements in all than this are faster with so many averages, checked separately.
SMALL = 2**17
FEW = 32


def update(updates):
    if not updates:
        return
    of_averages, weights = zip(*updates, strict=True)
    plain, compensated, previous = [], [], []
    # The averages of one raw weight.
    for pairs in zip(*of_averages, strict=True):
        size, has_residual = math.prod(pairs[0].target.shape), pairs[0].residual is not None
        if size < (LARGE if has_residual else HUGE) and all(map(can_be_grouped, pairs)):
            (compensated if has_residual else plain).append(pairs)
        elif has_residual:
            for weight, pair in zip(weights, pairs, strict=True):
                # In turn, so that only one at a time needs memory for its results.
                with tf.control_dependencies(previous):
                    own = [(pair.target, pair.residual)]
                    previous = _apply(kernels.updated_compensated, [weight], pair.raw, own)
        else:
            _apply(kernels.updated, weights, pairs[0].raw, [(pair.target,) for pair in pairs])
    for part in [*_parts(plain, TOGETHER), *_parts(compensated, TOGETHER)]:
        elements = sum(math.prod(pairs[0].target.shape) for pairs in part)
        if len(part) >= FEW and elements < SMALL:
            for few in _parts(part, FEW):
                update_group(few, weights, check_separately=True)
        else:
            update_group(part, weights, check_separately=False)


def _parts(pairs, size):
    return [pairs[first : first + size] for first in range(0, len(pairs), size)]


def _apply(formula, weights, iterate, targets):
    """Assigns to the variables of each average what a formula computes from them.

    Args:
        formula: One of `kernels`.
        weights: Tuple with the weight of each average.
        iterate: The raw weight.
        targets: List with a tuple of variables for each average.

    Returns:
        List of the operations of a graph that others may wait for.
    """
    w = tf.convert_to_tensor(iterate)
    if _pays_to_compile(targets[0][0]):
        # The averages' device, wherever the iterate is.
        with tf.device(targets[0][0].handle.device):
            return _apply_compiled(formula, weights, w, targets)
    for weight, own in zip(weights, targets, strict=True):
        for target, value in zip(own, _results(formula, weight, w, own), strict=True):
            target.assign(value)
    return []


def _apply_compiled(formula, weights, w, targets):
    handles = [[target.handle for target in own] for own in targets]
    if len(targets[0]) == 1:
        target = targets[0][0]
        shape, dtype = tuple(target.shape), tf.as_dtype(target.dtype)
        function = kernels.traced(formula, (len(weights), 1), shape, dtype, w.dtype, True)
        function(*weights, w, *itertools.chain(*handles))
        return []
    # XLA computes two results in two loops. To work in place it would copy both variables first.
    return [
        tf.raw_ops.AssignVariableOp(resource=handle, value=value)
        for weight, own, mine in zip(weights, targets, handles, strict=True)
        for handle, value in zip(
            mine, _results(kernels.compiled(formula), weight, w, own), strict=True
        )
    ]


def _results(formula, weight, w, variables):
    dtype = variables[0].dtype
    return formula(tf.cast(weight, dtype), tf.cast(w, dtype), *map(tf.convert_to_tensor, variables))


def _pays_to_compile(target):
    # Inside a function that XLA compiles as a whole, it is compiled already.
    large = math.prod(target.shape) >= LARGE
    return large and not kernels.inside_xla() and kernels.xla_works()


def assign(pairs, weight=1.0):
    always = isinstance(weight, float) and weight > 0

    def copy(target, source):
        value = tf.cast(tf.convert_to_tensor(source), target.dtype)
        target.assign(value if always else tf.where(weight > 0, value, target))

    for target, source in pairs:
        on_each_component(copy, target, source)
