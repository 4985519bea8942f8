"""A hash of variables: a sum over the bits of their values, each with its own odd multiplier.

The order of summation does not matter, so eager execution, graphs and XLA agree.
"""

import tensorflow as tf

# The golden ratio in 64 bits, as in Fibonacci hashing: neighbours get multipliers far apart.
_ODD = 0x9E3779B97F4A7C15 - 2**64


def fingerprint(variables):
    total = tf.constant(0, "int64")
    for variable in variables:
        bits = _bits(tf.convert_to_tensor(variable))
        total = total * _ODD + tf.reduce_sum(bits * _multipliers(bits.shape[0]))
    return tf.where(total == 0, tf.ones_like(total), total)


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
