import functools

from frameworks import BACKEND


@functools.cache
def add_second_device():
    """Adds a logical device, which shows where variables are placed, before the first tensor.

    Only TensorFlow places the variables of one model on several devices.
    """
    if BACKEND != "tensorflow":
        return
    import tensorflow as tf

    cpu, *_ = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
