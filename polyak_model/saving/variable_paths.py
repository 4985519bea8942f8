"""The paths that Keras gives the variables of a model in a weight file."""

import contextlib
import functools
import pathlib
import tempfile

import keras

from polyak_model.backend.keras_internals import flatten_layers
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.training_state import find_training_state, is_inside

NUMBER = "polyak_model_layer"


def find_saved_values(model):
    """Finds everything that Keras saves of a model's layers, without writing it.

    Keras writes a file in which each layer leaves its number alone.

    Args:
        model: A built `keras.Model`.

    Returns:
        Tuple of a dict from the path in a file of weights to the variable or
        array that Keras saves there; and a dict from the path of each group to
        its attributes.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
    >>> values, groups = find_saved_values(model)
    >>> {path: variable.name for path, variable in values.items()}
    {'layers/dense/vars/0': 'kernel', 'layers/dense/vars/1': 'bias'}
    >>> groups["layers/dense/vars"]
    {'name': 'dense'}
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "paths.weights.h5")
        stored = save_numbers(flatten_layers(model), lambda: keras.Model.save_weights(model, path))
        with open_weights(path) as file:
            state = set.union(*find_training_state(file))
            values = {}
            for name, variable in file.variables.items():
                group, _, key = name.rpartition("/")
                if key == NUMBER:
                    values |= {f"{group}/{k}": v for k, v in stored[int(variable.read())].items()}
                elif not is_inside(name, state):
                    values[name] = variable.read()
            groups = {n: a for n, a in file.attributes.items() if n and not is_inside(n, state)}
    return values, groups


def save_numbers(layers, save):
    """Lets Keras write a file in which each layer leaves its number alone.

    Args:
        layers: A list of layers, and of optimizers.
        save: `() -> None`, which lets Keras save a model.

    Returns:
        A list with what each of them would have saved, a dict. Its number is in
        the file as `NUMBER`, in the group of these variables.
    """
    stored = [{} for _ in layers]
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(_recording(layer, number, stored[number]))
        save()
    return stored


@contextlib.contextmanager
def _recording(layer, number, stored):
    """While open, a layer saves its number, and what it would save is in `stored`."""
    save = layer.save_own_variables

    @functools.wraps(save)
    def record(store):
        save(stored)
        if stored:
            store[NUMBER] = keras.ops.convert_to_numpy(number)

    with replaced_method(layer, "save_own_variables", record):
        yield


@contextlib.contextmanager
def replaced_method(layer, name, method):
    """While open, a layer has another method of its own.

    Args:
        layer: A `keras.Layer`.
        name: The name of the method.
        method: A function of the arguments without the layer.
    """
    before = vars(layer).get(name)
    object.__setattr__(layer, name, method)
    try:
        yield
    finally:
        object.__delattr__(layer, name)
        if before is not None:
            object.__setattr__(layer, name, before)
