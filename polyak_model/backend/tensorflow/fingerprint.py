"""A hash of variables: a sum over the bits of their values, each with its own odd multiplier.

The order of summation does not matter, so eager execution, graphs and XLA agree.
"""

import tensorflow as tf

# The golden ratio in 32 bits, as in Fibonacci hashing: neighbours get multipliers far apart.
_ODD = 0x9E3779B1
_LOW = 2**32 - 1


def fingerprint(variables):
    # The lower halves of 64-bit integers: devices multiply those in place, 32-bit ones often on
    # the host. What the upper halves are does not matter to the lower ones.
    total = tf.constant(0, "int64")
    for variable in variables:
        bits = _bits(tf.convert_to_tensor(variable))
        multipliers = _mix(tf.range(1, bits.shape[0] + 1, dtype="int64") * _ODD) | 1
        total = total * _ODD + tf.reduce_sum(_mix(bits) * multipliers)
    low = tf.bitcast(total, "int32")[0]
    return tf.cast(tf.where(low == 0, tf.ones_like(low), low), "int64")


def _mix(x):
    # The upper bits of a product do not reach the lower ones.
    return x ^ tf.bitwise.right_shift(x & _LOW, tf.constant(16, "int64"))


def _bits(values):
    flat = tf.reshape(values, [-1])
    if values.dtype.size == 2:
        return tf.cast(tf.bitcast(flat, "uint16"), "int64")
    return tf.cast(tf.reshape(tf.bitcast(flat, "int32"), [-1]), "int64")
