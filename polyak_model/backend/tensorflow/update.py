"""How averages are updated, by the fastest means that TensorFlow has for each.

Operation by operation, an update reads and writes memory several times. Compiled by XLA it is one
loop that works in place, but calling a compiled function takes as long as a dozen operations on a
few numbers. Small averages are updated in groups. All averages of one raw weight are updated
together, while its value is in the cache of the processor.
"""

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
    plain, compensated = [], []
    # The averages of one raw weight.
    for pairs in zip(*of_averages, strict=True):
        size, has_residual = math.prod(pairs[0].target.shape), pairs[0].residual is not None
        if size < (LARGE if has_residual else HUGE) and all(map(can_be_grouped, pairs)):
            (compensated if has_residual else plain).append(pairs)
        elif has_residual:
            targets = [(pair.target, pair.residual) for pair in pairs]
            _apply(kernels.updated_compensated, weights, pairs[0].raw, targets)
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
    """
    w, dtype = tf.convert_to_tensor(iterate), tf.as_dtype(targets[0][0].dtype)
    if _pays_to_compile(targets[0][0]):
        handles = [target.handle for own in targets for target in own]
        # The averages' device, wherever the iterate is.
        with tf.device(handles[0].device):
            shape, counts = tuple(targets[0][0].shape), (len(weights), len(targets[0]))
            function = kernels.traced(formula, counts, shape, dtype, w.dtype, True)
            function(*weights, w, *handles)
        return
    for weight, own in zip(weights, targets, strict=True):
        values = map(tf.convert_to_tensor, own)
        results = formula(tf.cast(weight, dtype), tf.cast(w, dtype), *values)
        for target, value in zip(own, results, strict=True):
            target.assign(value)


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
