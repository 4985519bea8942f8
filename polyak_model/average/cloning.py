"""An unshared copy of a model: paired variables, none of them shared."""

import contextlib
import os
import random
import tempfile
import warnings

import keras

from polyak_model.average.configs import recreate


def clone_model(model, clone_function=None):
    """Makes a model of the same architecture that shares no variable with `model`.

    The clone is uncompiled. When `model` is built, the clone is built too, but
    its weights are fresh.

    Args:
        model: A `keras.Model`.
        clone_function: `() -> keras.Model`, for a model Keras cannot clone.
            Defaults to None: through the model's `get_config`.

    Returns:
        A `keras.Model`.

    Raises:
        TypeError: If `clone_function` returns no `keras.Model`.
        ValueError: If Keras cannot clone the model, or the clone shares
            variables with it.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> clone = clone_model(model)
    >>> clone.count_params() == model.count_params(), clone.weights[0] is model.weights[0]
    (True, False)
    """
    with _unchanged_random_state():
        clone = clone_function() if clone_function else recreate(model)
    if not isinstance(clone, keras.Model):
        raise TypeError(
            "`clone_function` must return a keras.Model, a fresh one of the same architecture as "
            f"`model`. Received: {clone!r}, from clone_function={clone_function!r}."
        )
    check_disjoint(model, clone)
    return clone


@contextlib.contextmanager
def _unchanged_random_state():
    # Keras draws the default seeds of layers and initializers from Python's generator: without
    # this, whatever the user creates after wrapping would differ from the unwrapped run.
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def has_weights(model):
    """Tells whether a model has created all its weights.

    Keras calls a subclassed model built after `build`, even if its layers are
    not; and never one whose training step calls its parts alone (a GAN), even
    if they all are.

    Args:
        model: A `keras.Model`.
    """
    layers_built = all(layer.built for layer in model._flatten_layers(include_self=False))
    if model.built:
        return bool(model.weights) or layers_built
    builds_itself = type(model).build is not keras.Model.build
    return bool(model.weights) and layers_built and not builds_itself


def build_on(model, inputs, batch=None):
    """Creates the weights of a model from what it takes.

    Args:
        model: A `keras.Model`.
        inputs: A `keras.KerasTensor`, or a nested structure of them.
        batch: Values of these shapes, for a model that only runs eagerly; or
            None.
    """
    if batch is None:
        model(inputs)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # There is a second way.
            model(inputs)
    except Exception:
        model(batch)


def build_like(model, clone):
    """Builds the layers of a clone that are built in the model.

    A config holds no shapes of parts that were built by hand.

    Args:
        model: A `keras.Model`.
        clone: Its clone.
    """
    for layer, copy in _pair_parts(model, clone):
        if layer.built and not copy.built and layer.get_build_config():
            copy.build_from_config(layer.get_build_config())


def _pair_parts(model, clone):
    # A clone of one's own making need not have the same layers; then there is nothing to pair.
    layers, copies = _parts(model), _parts(clone)
    alike = [type(layer) for layer in layers] == [type(copy) for copy in copies]
    return list(zip(layers, copies, strict=True)) if alike else []


def _parts(model):
    # A Sequential gains its input layer when it is built.
    kind = keras.layers.InputLayer
    return [layer for layer in model._flatten_layers() if not isinstance(layer, kind)]


def check_disjoint(model, clone):
    """Raises `ValueError` if the two models share a variable.

    Args:
        model: A `keras.Model`.
        clone: A `keras.Model`.
    """
    owned = {id(variable) for variable in model.variables}
    for variable in clone.variables:
        if id(variable) in owned:
            raise ValueError(
                f"The clone of the model '{model.name}' shares the variable '{variable.path}' with "
                "it, so the average would overwrite what is trained. Build every layer afresh in "
                "`clone_function` (or in the model's `from_config`) instead of reusing live ones."
            )


def pair_weights(model, clone):
    """Pairs the weights of a model with those of its clone.

    Args:
        model: A built `keras.Model`.
        clone: A built `keras.Model`.

    Returns:
        A tuple of pairs `(weight of model, weight of clone)`, in the order of
        `model.weights`.

    Raises:
        ValueError: If the architectures differ; it names the first variable that
            does.
    """
    pairs = tuple(zip(model.weights, clone.weights, strict=False))
    for weight, copy in pairs:
        expected = f"shape {tuple(weight.shape)}, dtype {weight.dtype}"
        received = f"shape {tuple(copy.shape)}, dtype {copy.dtype}"
        if expected != received:
            raise ValueError(
                "The clone must have the architecture of the model. The first variable that "
                f"differs is '{weight.path}' of {expected}. Received in the clone: '{copy.path}' "
                f"of {received}. Make `clone_function` return the same architecture."
            )
    if len(model.weights) != len(clone.weights):
        longer = max(model, clone, key=lambda candidate: len(candidate.weights))
        extra = longer.weights[len(pairs)]
        raise ValueError(
            f"The clone must have the architecture of the model '{model.name}', which has "
            f"{len(model.weights)} weights. Received a clone with {len(clone.weights)}; the first "
            f"variable without a partner is '{extra.path}' of shape {tuple(extra.shape)}. Make "
            "`clone_function` return the same architecture."
        )
    return pairs


def copy_outside_weights(model, clone):
    """Copies what layers hold outside their weights, as a file saved and loaded carries it.

    These are the tables of lookup layers, and what a Normalization layer
    derives from its weights.

    Args:
        model: A `keras.Model`.
        clone: Its clone, with the same weights.
    """
    for layer, copy in _pair_parts(model, clone):
        if hasattr(layer, "save_assets") and not _is_empty_table(layer):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                if os.listdir(folder):
                    copy.load_assets(folder)
        if isinstance(copy, keras.layers.Normalization) and copy.built:
            copy.finalize_state()


def has_empty_table(model):
    """Tells whether a lookup layer of a model has yet to be adapted, so that it cannot answer.

    Args:
        model: A `keras.Model`.
    """
    return any(_is_empty_table(layer) for layer in model._flatten_layers())


def _is_empty_table(layer):
    # Keras saves the table of a layer that was never adapted, but cannot load it.
    kinds = (keras.layers.StringLookup, keras.layers.IntegerLookup, keras.layers.TextVectorization)
    return isinstance(layer, kinds) and not layer.get_vocabulary(include_special_tokens=False)


def untrained_weights(model):
    """Returns the weights of a model that no optimizer would train, frozen or not.

    Args:
        model: A `keras.Model`.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    >>> model.trainable = False
    >>> [weight.name for weight in untrained_weights(model)]
    ['moving_mean', 'moving_variance']
    """
    # A layer that is frozen marks all its weights untrainable, so `weight.trainable` does not
    # tell a moving mean from a frozen kernel; where the layer tracks them does.
    return [v for layer in model._flatten_layers() for v in layer._non_trainable_variables]


def seed_states(model):
    """Returns the variables of a model's random generators, which Keras leaves out of files.

    Args:
        model: A `keras.Model`.

    Example:

    >>> model = keras.Sequential([keras.layers.Dropout(0.5, seed=3)])
    >>> [tuple(map(int, state.numpy())) for state in seed_states(model)]
    [(3, 0)]
    """
    generators = [g for layer in model._flatten_layers() for g in layer._seed_generators]
    return list({id(generator): generator.state for generator in generators}.values())
