"""How averages are updated, in operations that XLA fuses into one loop for each.

The formula of an average is a compiled function of its own. Within a training step,
it is traced and lowered once for all weights of equal shape and dtype, rather than
once for each weight.
"""

import jax
import jax.numpy as jnp
from keras import ops

from polyak_model.backend.jax.open_packs import merge
from polyak_model.backend.jax.state import Tracer

# Entries. Above it, weights are so few that the time to compile their update hardly matters.
LARGE = 1 << 18


def update(updates):
    for pairs, weight in updates:
        for pair in merge(pairs):
            w = jax.lax.stop_gradient(ops.convert_to_tensor(pair.raw))
            if pair.residual is None:
                pair.target.assign(_updated(weight, w, pair.target.value))
            else:
                state = pair.target.value, pair.residual.value
                moved, rest = _updated_compensated(weight, w, *state)
                pair.target.assign(moved)
                pair.residual.assign(rest)


@jax.jit
def _updated(c, w, a):
    """Returns `a + c * (w - a)`."""
    w = w.astype(a.dtype)
    c = _for_each_element(c, w)
    # Half of a difference never overflows, and halving is exact. From the nearer end the step is
    # at most half of the difference, so it does not overflow either.
    half, near = 0.5 * w - 0.5 * a, c <= 0.5
    moved = jnp.where(near, a, w) + jnp.where(near, 2 * c, 2 * (c - 1)) * half
    moved = jnp.where(c == 1, w, moved)
    return jnp.where(jnp.isfinite(w), moved, a)


# Compiled as a function of its own, it would take a third of the weights' memory more in a step.
def _updated_compensated(c, w, a, r):
    """Returns the same for an average of twice the precision, `a + r`, and its new residual."""
    w = w.astype(a.dtype)
    c = _for_each_element(c, w)
    step = _step(c, w, a, r)
    moved = a + step
    rest = step - (moved - a)
    # Where the difference overflows, it does not at a quarter of the scale, which is exact.
    overflows = jnp.logical_not(jnp.isfinite(rest))
    moved = jnp.where(overflows, (1 - c) * a + c * w, moved)
    rest = jnp.where(overflows, 4 * (_step(c, w / 4, a / 4, r / 4) - (moved / 4 - a / 4)), rest)
    moved, rest = jnp.where(c == 1, w, moved), jnp.where(c == 1, 0, rest)
    finite = jnp.isfinite(w)
    return jnp.where(finite, moved, a), jnp.where(finite, rest, r)


def _for_each_element(c, w):
    """Returns the weight `c` in the dtype of `w`, and for few elements in its shape.

    With comparisons that are the same for all elements, XLA takes two to three times as long to
    compile the loop, probably since LLVM makes a copy of it for each of their outcomes, but the
    loop takes a fifth less time. So small weights, of which there are many, have a `c` for each
    element, which is NaN where `w` is not finite.
    """
    c = jnp.asarray(c).astype(w.dtype)
    return c if w.size > LARGE else c + (w - w)


def _step(c, w, a, r):
    return c * ((w - a) - r) + r


def assign(pairs, weight=1.0):
    always = isinstance(weight, float) and weight > 0
    for target, source in pairs:
        value = jax.lax.stop_gradient(ops.convert_to_tensor(source, dtype=target.dtype))
        if not always:
            value = jnp.where(weight > 0, value, target.value)
        elif not isinstance(value, Tracer):
            # A step donates its arrays, and none can be donated twice.
            value = jnp.array(value, copy=True)
        target.assign(value)
