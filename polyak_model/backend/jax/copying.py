"""How JAX's objects are copied by structure, see `polyak_model.backend.structure`."""

import jax

__all__ = ["copy_rules", "is_bookkeeping", "is_shared", "track_copies"]


def is_bookkeeping(name):
    return False


def track_copies(old, new, copier):
    pass  # Keras tracks everything itself.


def is_shared(value):
    return type(value).__module__.partition(".")[0] in ("jax", "jaxlib")


def _copy_function(value, copier):
    # The compiler's options are not known from outside.
    if copier.whole(value.__wrapped__) is not value.__wrapped__:
        raise TypeError("it is a compiled function of the original")
    return value


_RULES = {
    jax.Array: lambda value, copier: value,  # It never changes.
    type(jax.jit(lambda: None)): _copy_function,
}


def copy_rules():
    return _RULES
