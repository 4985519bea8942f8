"""Training steps on TensorFlow, for `overhead.py`.

A step calls the training function of `fit` with an iterator over one batch, and waits
for its loss.
"""

import itertools

import tensorflow as tf
from training_steps import DECAY, UNTIMED, VARIANTS, begin_training, prepare_training, take_turns

PEERS = {}


def measure(make, batch_size, options):
    """Times the steps of all variants of a model, and the floor, in alternation.

    Returns:
        A dict from each variant, and `floor`, to a dict of `first`, the seconds of
        the first call, and `steps`, a list of seconds per training step.
    """
    k, calls = options.steps_per_execution, options.rounds + UNTIMED
    steps = {
        name: prepare(name, make, batch_size, options.jit, k, calls) for name in options.variants
    }
    steps["floor"] = prepare_floor(make().count_params())
    times = take_turns(steps, options.rounds, options.seed)
    for name in options.variants:
        times[name]["steps"] = [seconds / k for seconds in times[name]["steps"]]
    return times


def prepare(name, make, batch_size, jit, steps_per_execution=1, calls=100):
    """Returns a function that runs training steps as `fit` does and waits for them.

    Args:
        name: One of `VARIANTS`.
        make: `() -> keras.Model`.
        batch_size: Int.
        jit: Bool. Whether to compile with XLA.
        steps_per_execution: Int, training steps per call. Defaults to 1.
        calls: Int, how many calls callbacks are told to expect. Defaults to 100.
    """
    k = steps_per_execution
    model, callback, batch = prepare_training(
        VARIANTS[name], make, batch_size, jit_compile=jit, steps_per_execution=k
    )
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    model.make_train_function()
    begin_training(callback, model, calls * k)
    batches = itertools.count(k - 1, k)

    def step():
        logs = model.train_function(iterator)
        # Some versions of Keras wrap what they return.
        logs = getattr(logs, "get_value", lambda: logs)()
        float(logs["loss"])
        callback.on_train_batch_end(next(batches), logs)

    return step


def prepare_floor(parameters):
    """Returns a function that reads two buffers and writes one of them, in place."""
    average = tf.Variable(tf.zeros(parameters))
    w = tf.Variable(tf.ones(parameters))

    @tf.function
    def add():
        handle = average.handle
        tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=DECAY - 1, delta=w.read_value())
        return w[0]

    return lambda: float(add())
