"""What the backends share: the optimizers of a model, placeholders, and training in one process."""

import contextlib
import contextvars
import sys
import types

import keras
from keras import tree

from polyak_model.backend.keras_internals import flatten_layers, has_training_step_of_keras

# Objects of these packages refer to much, but not to optimizers: of their layers only the layers
# inside are searched, of their models everything.
_LIBRARIES = frozenset(
    {*sys.stdlib_module_names, "h5py", "jax", "jaxlib", "keras", "numpy", "tensorflow", "torch"}
)


_exportable = contextvars.ContextVar("exportable", default=False)


@contextlib.contextmanager
def exportable(value=True):
    """While open, what is traced may be exported later and captures variables alone.

    Args:
        value: Bool. Whether to do so, or nothing. Defaults to True.
    """
    token = _exportable.set(value)
    try:
        yield
    finally:
        _exportable.reset(token)


def may_be_exported():
    """Returns whether `exportable` is open."""
    return _exportable.get()


def optimizers_of(model):
    """Returns the optimizers that a model or one of its layers refers to, each once.

    A training step of the user's own may keep several: in attributes, in dicts,
    lists, tuples and sets, and in objects of the user's own, at any depth. An
    optimizer inside another one is not listed.

    Args:
        model: A `keras.Model`.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.optimizers = {"slow": keras.optimizers.SGD(), "fast": [keras.optimizers.Adam()]}
    >>> [type(optimizer).__name__ for optimizer in optimizers_of(model)]
    ['SGD', 'Adam']
    """
    found, seen, readers, waiting = [], set(), {}, [model]
    while waiting:
        value = waiting.pop()
        # The class that a proxy of TensorFlow stands for, not that of the proxy.
        kind = value.__class__
        if kind not in readers:
            readers[kind] = _reader(kind)
        if readers[kind] is None or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, keras.optimizers.Optimizer):
            found.append(value)
        else:
            waiting.extend(reversed(list(readers[kind](value))))
    return found


def _reader(kind):
    """Returns a function from an object of a class to what it refers to, or None to skip it."""
    if issubclass(kind, dict):
        return lambda value: value.values()
    if issubclass(kind, (list, tuple, set, frozenset)):
        return iter
    searched = (keras.Model, keras.optimizers.Optimizer, types.SimpleNamespace)
    is_foreign = kind.__module__.partition(".")[0] not in _LIBRARIES
    if issubclass(kind, searched) or (is_foreign and not issubclass(kind, type)):
        return _attributes
    if issubclass(kind, keras.Layer):
        return lambda layer: flatten_layers(layer, include_self=False)
    return None


def _attributes(value):
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            yield getattr(value, name, None)


def optimizers_in_step(model):
    """Returns the optimizers that may take steps in the training step of a model, a list.

    Args:
        model: A `keras.Model`.
    """
    # A model whose `compile` does not call Keras's has no such attribute.
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and has_training_step_of_keras(model):
        return [optimizer]
    return optimizers_of(model)


def stepping_optimizers(model):
    """Returns the optimizers of a model that count the steps it takes, a list.

    Args:
        model: A compiled `keras.Model`.
    """
    return _counting(optimizers_in_step(model), model)


def _counting(optimizers, model):
    # A loss-scaling optimizer counts steps in its inner optimizer, which the oldest Keras does not
    # pass on. A MultiOptimizer counts batches, whether or not its optimizers take a step.
    found = []
    for optimizer in optimizers:
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if hasattr(inner, "optimizers") and not inner.built:
            inner.build(model.trainable_variables)  # It may create its optimizers only now.
        found.extend(getattr(inner, "optimizers", [inner]))
    return list({id(optimizer): optimizer for optimizer in found}.values())


def may_skip_steps(model):
    optimizers = optimizers_in_step(model)
    scaling = keras.optimizers.LossScaleOptimizer
    return any(isinstance(optimizer, scaling) for optimizer in optimizers) or any(
        optimizer.gradient_accumulation_steps for optimizer in _counting(optimizers, model)
    )


def symbolic(inputs):
    def placeholder(tensor):
        if tensor is None:
            return None
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        return keras.KerasTensor(tuple(tensor.shape), dtype)

    return tree.map_structure(placeholder, inputs)


def is_differentiated(variables):
    return False


def fetch(value):
    return keras.ops.convert_to_numpy(value)


def is_writer(model):
    return True


def in_one_process(model, function, variables=()):
    return function()
