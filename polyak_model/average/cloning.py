"""An unshared copy of a model."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable

import keras

from polyak_model import backend
from polyak_model.average.clone_check import check_disjoint, have_same_weights
from polyak_model.average.copier import CannotCopyError, Copier
from polyak_model.backend import structure
from polyak_model.backend.keras_internals import (
    build_on_placeholders,
    flatten_layers,
    trusting_files,
)


def clone_model(
    model: keras.Model, clone_function: Callable[[], keras.Model] | None = None
) -> keras.Model:
    """Copies a model, so that the copy shares nothing with it that training changes.

    The copy is made from the live objects, not from their configs: it has equal
    weights, paths, attributes and closures, and needs no `get_config`. It is
    uncompiled. Functions, initializers, regularizers and constraints are
    shared. Copying draws no random numbers and leaves `model` as it is.

    Args:
        model: A `keras.Model`, built or not, compiled or not.
        clone_function: `() -> keras.Model`, a fresh model of the same
            architecture, for a model that cannot be copied. Defaults to None.

    Returns:
        A `keras.Model`.

    Raises:
        TypeError: If `clone_function` returns no `keras.Model`.
        ValueError: If the model cannot be copied, or what `clone_function`
            returns shares variables with it.

    Example:

    >>> student = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> teacher = clone_model(student)
    >>> student.set_weights([weight + 1 for weight in student.get_weights()])
    >>> teacher.layers[0].bias.numpy().tolist()
    [0.0, 0.0]
    """
    if clone_function is None:
        return copy_model(model)
    with backend.unchanged_generators():
        clone = clone_function()
    if not isinstance(clone, keras.Model):
        raise TypeError(
            "`clone_function` must return a keras.Model, a fresh one of the same architecture as "
            f"`model`. Received: {clone!r}, from clone_function={clone_function!r}."
        )
    check_disjoint(model, clone)
    return clone


def copy_model(model, shared=()):
    """Copies a model, see `clone_model`, that shares some variables with its copy.

    Args:
        model: A `keras.Model`.
        shared: Variables of `model`. Defaults to none.
    """
    return _copy(Copier(structure.kept(shared)), model)


def matching(model, clone_function):
    """Makes a clone function return clones of a model that was loaded from a file.

    The config in a file lacks what was done to parts of layers, such as LoRA
    inside of attention, so the loaded model lacks it, too, and the clones of
    `clone_function` may not.

    Args:
        model: A `keras.Model`.
        clone_function: `() -> keras.Model`.

    Returns:
        A function that returns a copy of `model` where what `clone_function`
        returns has other weights.
    """

    def clone():
        made = clone_function()
        if not isinstance(made, keras.Model) or not has_weights(model):
            return made
        return made if have_same_weights(model, made) else copy_model(model)

    return clone


def complete_clone(model, clone, shared=()):
    """Makes the clone of a model that was not built then a copy of what it is now.

    Args:
        model: A built `keras.Model`.
        clone: Its clone, of the same class. It stays the same object, compiled
            or not.
        shared: Variables of `model` that they share. Defaults to none.
    """
    for name in filter(backend.is_bookkeeping, list(vars(clone))):
        del vars(clone)[name]  # It refers to layers that are about to be replaced.
    copier = Copier([(model, clone), *structure.kept(shared)])
    copier.later(structure.fill_model, model, clone, copier)
    _copy(copier, model)


def copy_unshared(value, model=None, clone=None):
    """Copies what a model is compiled with, so that another can be compiled with it.

    Metrics and losses are copied with their state and need no `get_config`.
    Where they refer to layers of `model`, their copies refer to those of
    `clone`. Optimizers become a plain `keras.optimizers.SGD`, which holds no
    state, except in closures, which may read the learning rate.

    Args:
        value: A nested structure of anything.
        model: A `keras.Model`. Defaults to None.
        clone: Its clone. Defaults to None.

    Returns:
        The same structure.

    Raises:
        ValueError: If a part cannot be copied.

    Example:

    >>> metric = keras.metrics.Mean()
    >>> copy = copy_unshared({"metrics": [metric, "mae"]})
    >>> copy["metrics"][0] is metric, copy["metrics"][1]
    (False, 'mae')
    """
    known = [] if model is None else [(model, clone), *_pair_parts(model, clone)]
    # Keras counts the names that it makes up.
    return _copy(Copier(known, lambda: keras.optimizers.SGD(name="sgd")), value)


def copy_outside_weights(model, clone):
    """Copies what layers that are adapted hold outside their weights.

    These are the tables of lookup layers, which `adapt` makes anew, and what a
    Normalization layer derives from its weights.

    Args:
        model: A `keras.Model`.
        clone: Its clone, with the same weights.
    """
    for layer, copy in pair_layers(model, clone):
        if hasattr(layer, "save_assets") and not _is_empty_table(layer):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    layer.save_assets(folder)
                except (AttributeError, TypeError, ValueError):
                    continue  # A tokenizer that is about to be loaded has no vocabulary to save.
                if os.listdir(folder):
                    with trusting_files():  # They were written above.
                        copy.load_assets(folder)
        if isinstance(copy, keras.layers.Normalization) and copy.built:
            copy.finalize_state()


def _is_empty_table(layer):
    # Keras saves the table of a layer that was never adapted, but cannot load it.
    kinds = (keras.layers.StringLookup, keras.layers.IntegerLookup, keras.layers.TextVectorization)
    return isinstance(layer, kinds) and not layer.get_vocabulary(include_special_tokens=False)


def pair_layers(model, clone):
    """Returns pairs of each layer of a model and its copy, a list, empty for other layers.

    Args:
        model: A `keras.Model`.
        clone: Its clone.
    """
    layers, copies = _layers(model), _layers(clone)
    # A clone that a `clone_function` made need not have the same layers.
    alike = [type(layer) for layer in layers] == [type(copy) for copy in copies]
    return list(zip(layers, copies, strict=True)) if alike else []


def _layers(model):
    # A Sequential gains its input layer when it is built.
    return [x for x in flatten_layers(model) if not isinstance(x, keras.layers.InputLayer)]


def _pair_parts(model, clone):
    for layer, copy in pair_layers(model, clone):
        yield layer, copy
        yield from zip(structure.parts(layer), structure.parts(copy), strict=False)


def has_weights(model):
    """Returns whether a model has created all its weights.

    Keras calls a subclassed model built after `build`, even if its layers are
    not; and it never calls a model built whose training step calls only its
    parts (a GAN), even if they all are.

    Args:
        model: A `keras.Model`.
    """
    layers_built = all(layer.built for layer in flatten_layers(model, include_self=False))
    if model.built:
        return bool(model.weights) or layers_built
    builds_itself = type(model).build is not keras.Model.build
    return bool(model.weights) and layers_built and not builds_itself


def build_on(model, inputs, batch=None):
    """Creates the weights of a model.

    Args:
        model: A `keras.Model`.
        inputs: What it takes, a `keras.KerasTensor` or a nested structure of
            them.
        batch: Values of these shapes, for a model that only runs eagerly; or
            None.
    """
    ways = [lambda: model(inputs), lambda: build_on_placeholders(model, inputs)]
    if batch is not None:
        ways.append(lambda: model(batch))
    for way in ways[:-1]:
        # Layers of the user's own may fail in any way on symbolic tensors.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            way()
            return
    ways[-1]()


def _copy(copier, value):
    try:
        return copier.run(value)
    except CannotCopyError as error:
        name = f"The model '{value.name}'" if isinstance(value, keras.Model) else "The value"
        raise ValueError(
            f"{name} cannot be copied. {error} Pass `clone_function`, a function without arguments "
            "that returns a fresh model of the same architecture: "
            "PolyakModel(model, clone_function=make_model)."
        ) from error
