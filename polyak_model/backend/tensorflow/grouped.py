"""Updates many small averages with few operations.

In a graph with hundreds of small variables, each operation and each captured variable takes longer
than the arithmetic. So the finiteness of many iterates is checked at once, and each average is
updated by one operation, `target -= weight * (target - raw)`. That is exact only for a weight
below 1; for a weight of 1, or an iterate that is not finite, the formula of `kernels` is used.
"""

import collections

import keras
import tensorflow as tf

from polyak_model.backend.tensorflow.kernels import inside_xla, read, traced, updated
from polyak_model.backend.tensorflow.packed_handles import pack, unpack


def can_be_grouped(pair):
    """Returns whether a pair may be passed to `update_group`."""
    target, raw = pair.target, pair.raw
    return (
        not tf.executing_eagerly()
        and not inside_xla()
        and isinstance(raw, keras.Variable)
        # Squares of float16 are no bound: differences overflow where they do not.
        and target.dtype != "float16"
        # The gain on other devices was not measured.
        and target.handle.device == raw.handle.device
        and tf.DeviceSpec.from_string(target.handle.device).device_type == "CPU"
    )


def update_group(pairs, weight, check_separately):
    """Updates averages in place, without compensation.

    Args:
        pairs: List of pairs for which `can_be_grouped` holds.
        weight: Scalar float64 tensor.
        check_separately: Bool. Whether to check the iterates in a function of
            its own, which captures fewer variables; or in the current graph,
            while large iterates are still in the cache of the processor.
    """
    targets = [pair.target.handle for pair in pairs]
    raw = [pair.raw.handle for pair in pairs]
    kinds = [(tuple(p.target.shape), p.target.dtype, p.raw.dtype) for p in pairs]
    packs = [*pack(targets), *pack(raw)]
    inputs = [weight, *packs]

    def each(packs):
        half = len(packs) // 2
        return zip(kinds, unpack(packs[:half]), unpack(packs[half:]), strict=True)

    def subtract(weight, *packs):
        alphas = {dtype: tf.cast(weight, dtype) for dtype in {dtype for _, dtype, _ in kinds}}
        for (shape, dtype, raw_dtype), target, raw in each(packs):
            delta = read(target, shape, dtype) - tf.cast(read(raw, shape, raw_dtype), dtype)
            tf.raw_ops.ResourceApplyGradientDescent(var=target, alpha=alphas[dtype], delta=delta)

    def take_care(weight, *packs):
        for (shape, dtype, raw_dtype), target, raw in each(packs):
            # This is rarely executed, so trace quickly: once for all shapes.
            w = read(raw, shape, raw_dtype)
            traced(updated, 1, None, dtype, raw_dtype)(weight, w, target)

    def check(weight, *packs):
        raw = [handle for _, _, handle in each(packs)]
        _either(_are_moderate(kinds, raw, stacked=True), subtract, take_care, [weight, *packs])

    subtract, take_care = _traced_branch(subtract, inputs), _traced_branch(take_care, inputs)
    below_1 = tf.not_equal(weight, 1)
    if check_separately:
        _either(below_1, _traced_branch(check, inputs), take_care, inputs)
    else:
        moderate = _are_moderate(kinds, raw, stacked=False)
        _either(tf.logical_and(moderate, below_1), subtract, take_care, inputs)


def _traced_branch(function, inputs):
    return tf.function(function, autograph=False).get_concrete_function(*inputs)


def _either(condition, then, otherwise, inputs):
    # `tf.cond` is lowered to operations that are scheduled even in the branch that is not taken.
    # XLA that clusters parts of a graph on its own also leaves this operation out; it would not
    # know that a packed variable is one that other operations use.
    tf.raw_ops.If(cond=condition, input=inputs, Tout=[], then_branch=then, else_branch=otherwise)


def _are_moderate(kinds, handles, stacked):
    """Returns whether the squares of all iterates have a finite sum.

    Then no iterate is inf or NaN, nor so large that its difference from an
    average overflows.

    Args:
        kinds: List of `(shape, dtype, raw dtype)`.
        handles: List of the handles of the iterates.
        stacked: Bool. Whether to stack iterates of one shape first: fewer
            operations, but a copy.
    """
    values = collections.defaultdict(list)
    for (shape, dtype, raw_dtype), handle in zip(kinds, handles, strict=True):
        values[shape, dtype].append(tf.cast(read(handle, shape, raw_dtype), dtype))
    groups = [
        value for group in values.values() for value in ([tf.stack(group)] if stacked else group)
    ]
    sums = [tf.cast(tf.nn.l2_loss(group), "float32") for group in groups]
    return tf.math.is_finite(tf.add_n(sums))
