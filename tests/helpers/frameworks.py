"""What tests need of the current backend of Keras."""

import keras

BACKEND = keras.backend.backend()


def compiled(function, run_eagerly=False, jit_compile=False):
    """Compiles a function that changes variables as `compile` compiles a training step.

    Only TensorFlow compiles such functions.

    Args:
        function: A function.
        run_eagerly: As in `keras.Model.compile`.
        jit_compile: As in `keras.Model.compile`.
    """
    if run_eagerly or BACKEND != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=jit_compile)
