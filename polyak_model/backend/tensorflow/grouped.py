"""Updates many small averages with few operations.

In a graph with hundreds of small variables, each operation and each captured variable takes longer
than the arithmetic. So the finiteness of many iterates is checked at once, for all averages, and
each average is updated by one operation, `target -= weight * (target - raw)`, or, if compensated,
together with the others of its shape. That is exact only for a weight below 1; for a weight of 1,
or an iterate that is not finite, the formula of `kernels` is used.
"""

import collections

import keras
import tensorflow as tf

from polyak_model.backend.tensorflow.kernels import (
    inside_xla,
    read,
    traced,
    updated,
    updated_compensated,
    updated_moderately,
)
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


def update_group(rows, weights, check_separately):
    """Updates averages in place.

    Args:
        rows: List of the pairs of each raw weight, a tuple with one pair for
            each average, for which `can_be_grouped` holds. All of them have a
            residual, or none.
        weights: Tuple with the weight of each average, scalar float64 tensors.
        check_separately: Bool. Whether to check the iterates in a function of
            its own, which captures fewer variables; or in the current graph,
            while large iterates are still in the cache of the processor.
    """
    kinds = [(tuple(p.target.shape), p.target.dtype, p.raw.dtype) for p, *_ in rows]
    compensated = rows[0][0].residual is not None
    raw = pack([pair.raw.handle for pair, *_ in rows])
    states = []
    for own in zip(*rows, strict=True):
        states.append(pack([pair.target.handle for pair in own]))
        if compensated:
            states.append(pack([pair.residual.handle for pair in own]))
    inputs = [*weights, *raw, *(handle for packed in states for handle in packed)]

    def split(inputs):
        """Returns the weights, and the handles of raw weights and of each average's variables."""
        packs, size = inputs[len(weights) :], len(raw)
        w, *parts = [unpack(packs[first : first + size]) for first in range(0, len(packs), size)]
        each = len(parts) // len(weights)
        own = [parts[first : first + each] for first in range(0, len(parts), each)]
        return inputs[: len(weights)], w, own

    def branch(update, averages):
        def update_all(*inputs):
            weights, raw, states = split(inputs)
            update(kinds, [weights[i] for i in averages], raw, [states[i] for i in averages])

        return _traced_branch(update_all, inputs)

    def one_by_one(*inputs):
        # Each average takes the branch that it would take alone, so it is the same to the bit.
        weights, raw, _ = split(inputs)
        moderate = _are_moderate(kinds, raw, stacked=True)
        for i, weight in enumerate(weights):
            condition = tf.logical_and(moderate, tf.not_equal(weight, 1))
            _either(condition, branch(fast, [i]), branch(_take_care, [i]), inputs)

    fast = _compensate if compensated else _subtract
    every = range(len(weights))
    usual = branch(fast, every)
    alone = len(weights) == 1
    otherwise = branch(_take_care, every) if alone else _traced_branch(one_by_one, inputs)

    def check(*inputs):
        moderate = _are_moderate(kinds, split(inputs)[1], stacked=True)
        _either(moderate, usual, otherwise, inputs)

    below_1 = weights[0] < 1 if alone else tf.reduce_all(tf.stack(weights) < 1)
    if check_separately:
        _either(below_1, _traced_branch(check, inputs), otherwise, inputs)
    else:
        moderate = _are_moderate(kinds, [pair.raw.handle for pair, *_ in rows], stacked=False)
        _either(tf.logical_and(moderate, below_1), usual, otherwise, inputs)


def _subtract(kinds, weights, raw, states):
    for (shape, dtype, raw_dtype), handle, *own in zip(kinds, raw, *_targets(states), strict=True):
        w = tf.cast(read(handle, shape, raw_dtype), dtype)
        for weight, target in zip(weights, own, strict=True):
            alpha, delta = tf.cast(weight, dtype), read(target, shape, dtype) - w
            tf.raw_ops.ResourceApplyGradientDescent(var=target, alpha=alpha, delta=delta)


def _targets(states):
    return [targets for (targets,) in states]


def _compensate(kinds, weights, raw, states):
    # Variables of one shape are updated as one array, with a seventh of the operations.
    same = collections.defaultdict(list)
    for index, kind in enumerate(kinds):
        same[kind].append(index)
    for (shape, dtype, raw_dtype), members in same.items():

        def stacked(handles, dtype, shape=shape, members=members):
            return tf.stack([read(handles[i], shape, dtype) for i in members])

        w = tf.cast(stacked(raw, raw_dtype), dtype)
        for weight, own in zip(weights, states, strict=True):
            values = [stacked(handles, dtype) for handles in own]
            results = updated_moderately(tf.cast(weight, dtype), w, *values)
            for handles, result in zip(own, results, strict=True):
                for i, value in zip(members, tf.unstack(result), strict=True):
                    tf.raw_ops.AssignVariableOp(resource=handles[i], value=value)


def _take_care(kinds, weights, raw, states):
    formula = updated if len(states[0]) == 1 else updated_compensated
    for index, (shape, dtype, raw_dtype) in enumerate(kinds):
        w = read(raw[index], shape, raw_dtype)
        for weight, own in zip(weights, states, strict=True):
            # This is rarely executed, so trace quickly: once for all shapes.
            function = traced(formula, (1, len(own)), None, dtype, raw_dtype)
            function(weight, w, *(handles[index] for handles in own))


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
