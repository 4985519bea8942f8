"""What two objects share, found by following all references of both."""

import collections
import enum
import gc
import inspect
import sys
import types

import keras
import numpy as np
import tensorflow as tf

# Nothing that is trained, built or called is assigned to these.
CONSTANT = (
    enum.Enum,
    inspect.Signature,
    keras.DTypePolicy,
    keras.Initializer,
    keras.constraints.Constraint,
    keras.regularizers.Regularizer,
    np.dtype,
    np.generic,
    tf.Tensor,
    tf.DType,
    tf.TensorShape,
    tf.TypeSpec,
    tf.lookup.StaticHashTable,
    tf.distribute.Strategy,
    types.BuiltinFunctionType,
    types.CodeType,
    types.ModuleType,
    type,
)


def reachable(*roots):
    """Returns all objects that can be assigned to and are reached from some, by their `id`.

    Args:
        *roots: Anything.
    """
    namespaces = {id(vars(module)) for module in list(sys.modules.values()) if module}
    found, queue = {}, collections.deque(roots)
    while queue:
        value = queue.popleft()
        if id(value) in found or id(value) in namespaces or isinstance(value, CONSTANT):
            continue
        found[id(value)] = value
        if isinstance(value, types.FunctionType):
            queue.extend([value.__closure__, value.__defaults__, value.__kwdefaults__])
        else:
            queue.extend(gc.get_referents(value))
    return found


def assert_shares_nothing(model, clone):
    """Raises `AssertionError` if anything that can be assigned to is part of both.

    Args:
        model: A `keras.Model`.
        clone: Its clone.
    """
    ours, theirs = reachable(model), reachable(clone)
    shared = [value for key, value in ours.items() if key in theirs and is_assignable(value)]
    assert not shared, [(type(value), str(value)[:200]) for value in shared[:5]]
    assert len(theirs) > 10


def is_assignable(value):
    """Returns whether an object can be changed, a container or one with attributes."""
    if isinstance(value, (list, dict, set, collections.deque, np.ndarray)):
        return True
    if isinstance(value, (types.FunctionType, types.CellType)):
        return False  # What they hold was followed.
    return hasattr(value, "__dict__")
