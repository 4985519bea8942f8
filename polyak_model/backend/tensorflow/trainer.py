"""TensorFlow: in-place updates, and what a training step needs to know."""

import concurrent.futures
import sys

import keras
import tensorflow as tf
from keras import tree
from keras.src.backend.common.stateless_scope import in_stateless_scope

from polyak_model.backend.tensorflow.strategies import on_each_component


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


def fingerprint(variables):
    """Returns a number that changes with the values of variables, an int64 tensor above or below 0.

    It is a sum over the bits of the values, each with an odd multiplier of its
    own: the order of summation does not matter, and a change of one value always
    shows. Changes of several cancel about once in 2**32 times or less.

    Args:
        variables: Iterable of variables.
    """
    total = tf.constant(0, "int64")
    for variable in variables:
        bits = _bits(tf.convert_to_tensor(variable))
        total = total * _ODD + tf.reduce_sum(bits * _multipliers(bits.shape[0]))
    return tf.where(total == 0, tf.ones_like(total), total)


# The golden ratio in 64 bits, as in Fibonacci hashing: neighbours get numbers far apart.
_ODD = 0x9E3779B97F4A7C15 - 2**64


def _multipliers(count):
    spread = tf.range(1, count + 1, dtype="int64") * _ODD
    high = tf.bitwise.right_shift(spread, tf.constant(32, "int64"))
    return tf.bitwise.bitwise_or(tf.bitwise.bitwise_xor(spread, high), tf.constant(1, "int64"))


def _bits(values):
    # As 64-bit integers: devices multiply those in place, 32-bit ones often on the host.
    lanes = 8 // values.dtype.size
    flat = tf.reshape(values, [-1])
    if lanes == 1:
        return tf.bitcast(flat, "int64")
    padded = tf.pad(flat, [[0, -values.shape.num_elements() % lanes]])
    return tf.bitcast(tf.reshape(padded, [-1, lanes]), "int64")


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


def compiled(function):
    """Returns a function that XLA compiles as a whole."""
    return tf.function(function, jit_compile=True, autograph=False)


def optimizer_step(model):
    """Returns the optimizer steps that a model has taken, as an int64 tensor.

    Under gradient accumulation and loss scaling it advances when the weights
    do, not at every batch. The steps of several optimizers are summed.

    Args:
        model: A compiled `keras.Model`.
    """
    counts = [optimizer.iterations for optimizer in _stepping_optimizers(model)]
    return tf.add_n([tf.cast(tf.convert_to_tensor(count), "int64") for count in counts])


def may_skip_steps(model):
    """Tells whether a batch can leave the weights of a model as they were.

    Args:
        model: A compiled `keras.Model`.
    """
    scaling = keras.optimizers.LossScaleOptimizer
    return any(isinstance(optimizer, scaling) for optimizer in _optimizers(model)) or any(
        optimizer.gradient_accumulation_steps for optimizer in _stepping_optimizers(model)
    )


def _optimizers(model):
    # A model with a training step of its own may hold several, under names of its own.
    return [
        value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)
    ]


def _stepping_optimizers(model):
    # A loss-scaling optimizer counts its steps in the one inside; not every Keras passes that on.
    # One made of several counts batches, whether or not those inside take a step.
    found = []
    for optimizer in _optimizers(model):
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if hasattr(inner, "optimizers") and not inner.built:
            inner.build(model.trainable_variables)  # It may choose them only now.
        found.extend(getattr(inner, "optimizers", [inner]))
    return found


def runs_eagerly():
    """Tells whether operations run now, rather than being traced."""
    return tf.executing_eagerly()


def traces_for_export():
    """Tells whether operations are traced into a graph that is written and served elsewhere."""
    if tf.executing_eagerly():
        return False
    # Neither Keras nor TensorFlow says so; but who traces stands on the stack.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_EXPORTERS):
            return True
        frame = frame.f_back
    return False


_EXPORTERS = ("keras.src.export.", "tensorflow.python.saved_model.")


def keeps_updates():
    """Tells whether an assignment will stand: not while Keras only asks for shapes."""
    return not in_stateless_scope()


def lift():
    """Returns a context that runs operations now, even inside a trace."""
    return tf.init_scope()


def apart(function):
    """Calls a function now, and lets a trace under way know of nothing that it does.

    Even when lifted, whatever reads a variable leaves it among those that the
    graph holds.

    Args:
        function: Callable without arguments; its result is dropped.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(function).result()


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
