"""TensorFlow: in-place updates, and what a training step needs to know."""

import keras
import tensorflow as tf
from keras import tree

from polyak_model.backend.replicas import on_each_component


def assign(pairs, weight=1.0):
    """Copies values: `target = source` where `weight` is above 0.

    Args:
        pairs: Iterable of `(target, source)` variables of equal shape.
        weight: Scalar, 0 to change nothing. Defaults to 1.
    """
    always = isinstance(weight, float) and weight > 0

    def copy(target, source):
        value = tf.cast(tf.convert_to_tensor(source), target.dtype)
        target.assign(value if always else tf.where(weight > 0, value, target))

    for target, source in pairs:
        on_each_component(copy, target, source)


def move(pairs, weight):
    """Moves averages: `average += weight * (iterate - average)`.

    A weight of 1 makes the average the iterate, a weight of 0 leaves it, bit
    for bit, and so does an iterate that equals the average.

    Args:
        pairs: Iterable of `(average, iterate)` variables of equal shape.
        weight: Scalar float64 tensor in [0, 1].
    """
    for average, iterate in pairs:
        c = tf.cast(weight, average.dtype)
        a, w = tf.convert_to_tensor(average), tf.cast(iterate, average.dtype)
        average.assign(tf.where(c == 1, w, a + c * (w - a)))


def move_compensated(triples, weight):
    """Moves averages and carries along what rounding took (Kahan).

    The average to twice the precision is `average + residual`.

    Args:
        triples: Iterable of `(average, iterate, residual)` variables of equal
            shape.
        weight: Scalar float64 tensor in [0, 1].

    Reference:
        Kahan 1965, Further remarks on reducing truncation errors.
    """
    for average, iterate, residual in triples:
        c = tf.cast(weight, average.dtype)
        a, w, r = (tf.cast(v, average.dtype) for v in (average, iterate, residual))
        step = c * ((w - a) - r) + r
        moved = tf.where(c == 1, w, a + step)
        residual.assign(tf.where(c == 1, tf.zeros_like(r), step - (moved - a)))
        average.assign(moved)


def when(condition, function):
    """Calls `function` if `condition`, a bool or a scalar tensor, holds.

    Args:
        condition: Bool or scalar boolean tensor.
        function: Callable without arguments; its result is dropped.
    """

    def call():
        function()
        return tf.constant(True)

    tf.cond(tf.convert_to_tensor(condition), call, lambda: tf.constant(False))


def optimizer_step(model):
    """Returns the optimizer steps that a model has taken, as an int64 tensor.

    Under gradient accumulation and loss scaling it advances when the weights
    do, not at every batch. The steps of several optimizers are summed.

    Args:
        model: A compiled `keras.Model`.
    """
    # A loss-scaling optimizer counts its steps in the one inside; not every Keras passes that on.
    inner = [getattr(optimizer, "inner_optimizer", optimizer) for optimizer in _optimizers(model)]
    return tf.add_n([tf.cast(tf.convert_to_tensor(o.iterations), "int64") for o in inner])


def may_skip_steps(model):
    """Tells whether a batch can leave the weights of a model as they were.

    Args:
        model: A compiled `keras.Model`.
    """
    return any(
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or optimizer.gradient_accumulation_steps
        for optimizer in _optimizers(model)
    )


def _optimizers(model):
    # A model with a training step of its own may hold several, under names of its own.
    return [
        value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)
    ]


def runs_eagerly():
    """Tells whether operations run now, rather than being traced."""
    return tf.executing_eagerly()


def symbolic(inputs):
    """Returns placeholders of the shapes and dtypes of a batch.

    Args:
        inputs: A tensor or array, or a nested structure of them.
    """

    def placeholder(tensor):
        if tensor is None:
            return None
        shape = tuple(tensor.shape)
        return keras.KerasTensor(shape, keras.backend.standardize_dtype(tensor.dtype))

    return tree.map_structure(placeholder, inputs)


def lacks_metrics(model):
    """Tells whether a compiled model creates metrics at its first batch.

    Args:
        model: A compiled `keras.Model`.
    """
    parts = (model._compile_metrics, model._compile_loss)
    return any(part is not None and not part.built for part in parts)


def rehearse(function, batch, variables):
    """Calls a function symbolically: it creates its variables, and changes none.

    Args:
        function: Callable; its result is dropped.
        batch: Its argument, a nested structure of tensors, arrays and None.
        variables: The variables that it reads.
    """

    def specification(leaf):
        return None if leaf is None else tf.type_spec_from_value(tf.convert_to_tensor(leaf))

    def call(batch):
        function(batch)

    state = [(variable, tf.convert_to_tensor(variable)) for variable in variables]
    with keras.StatelessScope(state_mapping=state):
        specifications = tree.map_structure(specification, batch)
        tf.function(call, autograph=False).get_concrete_function(specifications)


def score(model, x, y, sample_weight, outputs):
    """Updates the loss and the metrics of a model with outputs at hand.

    It is Keras's `test_step` after the forward pass.

    Args:
        model: A compiled `keras.Model`.
        x: Inputs of the batch.
        y: Targets of the batch.
        sample_weight: Sample weights of the batch, or None.
        outputs: What the model answered.

    Returns:
        The logs, a dict.
    """
    loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=False)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        # Keras divides losses by the replicas, since their gradients are summed.
        loss = loss * tf.cast(replicas, loss.dtype)
    batch_size = tf.shape(next(leaf for leaf in tree.flatten(x) if leaf is not None))[0]
    model._loss_tracker.update_state(loss, sample_weight=batch_size)
    return model.compute_metrics(x, y, outputs, sample_weight=sample_weight)
