"""On TensorFlow, Keras trains in one process."""

import keras
import tensorflow as tf

from polyak_model.backend.common import in_one_process, is_writer

__all__ = ["fetch", "in_one_process", "is_writer"]


def fetch(value):
    variable = getattr(value, "value", None)
    if not isinstance(variable, tf.Variable) or isinstance(
        variable, tf.distribute.DistributedValues
    ):
        return keras.ops.convert_to_numpy(value)
    # Keras and TensorFlow take four times as long to come to this operation.
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype).numpy()
