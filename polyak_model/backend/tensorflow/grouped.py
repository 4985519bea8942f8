"""Updates many small averages with few operations.

In a graph with hundreds of small variables, each operation and each captured variable takes longer
than the arithmetic. So the finiteness of many iterates is checked at once, for all averages, and
each average is updated by one operation, `target -= weight * (target - raw)`, or by few, if
compensated. Those of one shape are stacked. The formula is exact only for a weight below 1; for a
weight of 1, or an iterate that is not finite, that of `kernels` is used.
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
    compensated = rows[0][0].residual is not None
    kinds = [(tuple(p.target.shape), p.target.dtype, p.raw.dtype) for p, *_ in rows]
    # To stack large values would take longer than more operations.
    stacked = check_separately or compensated
    alike = _positions(kinds) if stacked else [[i] for i in range(len(kinds))]
    raw = pack([pair.raw.handle for pair, *_ in rows])
    states = []
    for own in zip(*rows, strict=True):
        states.append(pack([pair.target.handle for pair in own]))
        if compensated:
            states.append(pack([pair.residual.handle for pair in own]))
    inputs = [*weights, *raw, *(handle for packed in states for handle in packed)]

    def split(inputs):
        """Returns weights, the handles of raw weights and of each average's, and the iterates."""
        first, size = len(weights), len(raw)
        last = first + size * (1 + len(states))
        w, *parts = [unpack(inputs[i : i + size]) for i in range(first, last, size)]
        each = len(parts) // first
        own = [parts[i : i + each] for i in range(0, len(parts), each)]
        return inputs[:first], w, own, inputs[last:]

    def branch(update, averages, inputs):
        def update_some(*inputs):
            weights, raw, states, iterates = split(inputs)
            chosen = [weights[i] for i in averages], [states[i] for i in averages]
            update(kinds, alike, raw, iterates, *chosen)

        return _traced_branch(update_some, inputs)

    def one_by_one(*inputs):
        # Each average takes the branch that it would take alone, so it is the same to the bit.
        weights, *_, iterates = split(inputs)
        moderate = _are_moderate(iterates)
        for i, weight in enumerate(weights):
            condition = tf.logical_and(moderate, _are_below_1([weight], kinds))
            branches = branch(move, [i], inputs), branch(_take_care, [i], inputs)
            _either(condition, *branches, inputs)

    move = _compensate if compensated else _subtract

    def update_all(handles, weights, inputs):
        iterates = [_iterates(kinds, handles, positions) for positions in alike]
        condition = tf.logical_and(_are_moderate(iterates), _are_below_1(weights, kinds))
        inputs, every = [*inputs, *iterates], range(len(weights))
        usual = branch(move, every, inputs)
        if len(weights) == 1:
            otherwise = branch(_take_care, every, inputs)
        else:
            otherwise = _traced_branch(one_by_one, inputs)
        _either(condition, usual, otherwise, inputs)

    if check_separately:

        def separately(*inputs):
            weights, handles, *_ = split(inputs)
            update_all(handles, weights, inputs)

        # A call would be inlined, but not this.
        function = _traced_branch(separately, inputs)
        _either(weights[0] < 1, function, function, inputs)
    else:
        update_all([pair.raw.handle for pair, *_ in rows], weights, inputs)


def _positions(kinds):
    """Returns lists of the positions of equal kinds."""
    found = collections.defaultdict(list)
    for position, kind in enumerate(kinds):
        found[kind].append(position)
    return list(found.values())


def _stacked(handles, shape, dtype):
    values = [read(handle, shape, dtype) for handle in handles]
    return tf.stack(values) if len(values) > 1 else values[0]


def _iterates(kinds, raw, positions):
    shape, dtype, raw_dtype = kinds[positions[0]]
    return tf.cast(_stacked([raw[i] for i in positions], shape, raw_dtype), dtype)


def _subtract(kinds, alike, raw, iterates, weights, states):
    for positions, w in zip(alike, iterates, strict=True):
        shape, dtype, _ = kinds[positions[0]]
        for weight, (targets,) in zip(weights, states, strict=True):
            own = [targets[i] for i in positions]
            alpha, delta = tf.cast(weight, dtype), _stacked(own, shape, dtype) - w
            for target, each in zip(own, _unstacked(delta, own), strict=True):
                tf.raw_ops.ResourceApplyGradientDescent(var=target, alpha=alpha, delta=each)


def _compensate(kinds, alike, raw, iterates, weights, states):
    for positions, w in zip(alike, iterates, strict=True):
        shape, dtype, _ = kinds[positions[0]]
        for weight, state in zip(weights, states, strict=True):
            own = [[handles[i] for i in positions] for handles in state]
            values = [_stacked(handles, shape, dtype) for handles in own]
            results = updated_moderately(tf.cast(weight, dtype), w, *values)
            for handles, result in zip(own, results, strict=True):
                for handle, value in zip(handles, _unstacked(result, handles), strict=True):
                    tf.raw_ops.AssignVariableOp(resource=handle, value=value)


def _unstacked(value, handles):
    return tf.unstack(value) if len(handles) > 1 else [value]


def _take_care(kinds, alike, raw, iterates, weights, states):
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


def _are_moderate(iterates):
    """Returns whether the squares of all iterates have a finite sum.

    Then no iterate is inf or NaN, nor so large that its difference from an
    average overflows.
    """
    sums = [tf.cast(tf.nn.l2_loss(iterate), "float32") for iterate in iterates]
    return tf.math.is_finite(tf.add_n(sums))


def _are_below_1(weights, kinds):
    # Rounded, as the formulas use them.
    dtypes = {dtype for _, dtype, _ in kinds}
    return tf.reduce_all([tf.cast(tf.stack(weights), dtype) < 1 for dtype in dtypes])
