import functools

import tensorflow as tf


@functools.cache
def add_second_device():
    """Adds a logical device, which shows where variables are placed, before the first tensor."""
    cpu, *_ = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
