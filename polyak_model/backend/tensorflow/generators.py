"""The global generators of random numbers."""

import contextlib
import random

import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops

_OF_KERAS = "global_seed_generator"


@contextlib.contextmanager
def unchanged_generators():
    """While open, code may draw random numbers; afterwards it is as if it had drawn none.

    This concerns the global generators of Python, NumPy, Keras and TensorFlow:
    what a user draws or creates next is what it would have been.
    """
    python, numpy = random.getstate(), np.random.get_state()
    # TensorFlow has none before it is given a seed.
    tensorflow, variables = getattr(context.context(), "_rng", None), _generators()
    operations = tensorflow and tensorflow.getstate()
    values = [variable.numpy() for variable in variables.values()]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if tensorflow:
            tensorflow.setstate(operations)
        with tf.init_scope():
            for variable, value in zip(variables.values(), values, strict=True):
                variable.assign(value)
        if "keras" not in variables:
            global_state.set_global_attribute(_OF_KERAS, None)
        if "tensorflow" not in variables:
            stateful_random_ops.global_generator = None


def _generators():
    # Both are created when they are first used.
    generators = {
        "keras": global_state.get_global_attribute(_OF_KERAS),
        "tensorflow": stateful_random_ops.global_generator,
    }
    return {name: generator.state for name, generator in generators.items() if generator}
