"""A hash of variables: a sum over the bits of their values, each with its own odd multiplier."""

import jax
import jax.numpy as jnp
from keras import ops

# The golden ratio in 32 bits, as in Fibonacci hashing: neighbours get multipliers far apart.
_ODD = 0x9E3779B1


def fingerprint(variables):
    total, odd = jnp.uint32(0), jnp.uint32(_ODD)
    for variable in variables:
        bits = _bits(jax.lax.stop_gradient(ops.convert_to_tensor(variable)))
        multipliers = _mix(jnp.arange(1, bits.size + 1, dtype="uint32") * odd) | 1
        total = total * odd + jnp.sum(_mix(bits) * multipliers, dtype="uint32")
    return jax.lax.bitcast_convert_type(jnp.where(total == 0, jnp.uint32(1), total), "int32")


def _mix(x):
    # The upper bits of a product do not reach the lower ones.
    return x ^ (x >> 16)


def _bits(values):
    flat = jnp.reshape(values, [-1])
    bits = min(8 * values.dtype.itemsize, 32)
    return jnp.reshape(jax.lax.bitcast_convert_type(flat, f"uint{bits}"), [-1]).astype("uint32")
