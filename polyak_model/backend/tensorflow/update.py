"""How averages are updated, by the fastest means that TensorFlow has for each.

Operation by operation, an update reads and writes memory several times. Compiled by XLA it is one
loop that works in place, but calling a compiled function takes as long as a dozen operations on a
few numbers. Small averages are updated in groups.
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
    for pairs, weight in updates:
        _update(pairs, weight)


def _update(pairs, weight):
    grouped = []
    for pair in pairs:
        if pair.residual is not None:
            _apply(kernels.updated_compensated, weight, pair.raw, pair.target, pair.residual)
        elif math.prod(pair.target.shape) < HUGE and can_be_grouped(pair):
            grouped.append(pair)
        else:
            _apply(kernels.updated, weight, pair.raw, pair.target)
    for part in _parts(grouped, TOGETHER):
        elements = sum(math.prod(pair.target.shape) for pair in part)
        if len(part) >= FEW and elements < SMALL:
            for few in _parts(part, FEW):
                update_group(few, weight, check_separately=True)
        else:
            update_group(part, weight, check_separately=False)


def _parts(pairs, size):
    return [pairs[first : first + size] for first in range(0, len(pairs), size)]


def _apply(formula, weight, iterate, *targets):
    """Assigns to variables what a formula computes from them and the iterate."""
    w, dtype = tf.convert_to_tensor(iterate), tf.as_dtype(targets[0].dtype)
    if _pays_to_compile(targets[0]):
        handles = [target.handle for target in targets]
        # The average's device, wherever the iterate is.
        with tf.device(handles[0].device):
            shape = tuple(targets[0].shape)
            function = kernels.traced(formula, len(targets), shape, dtype, w.dtype, True)
            function(weight, w, *handles)
    else:
        values = map(tf.convert_to_tensor, targets)
        results = formula(tf.cast(weight, dtype), tf.cast(w, dtype), *values)
        for target, value in zip(targets, results, strict=True):
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
