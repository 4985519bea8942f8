"""A fresh model from the config of another, functions of the user's own included."""

import collections
import contextlib
import types

import keras
from keras.src.models import Functional


def recreate(model):
    """Makes a fresh, uncompiled model from the config of another.

    Args:
        model: A `keras.Model`.

    Returns:
        A `keras.Model` with weights of its own.

    Raises:
        ValueError: If Keras cannot.
    """
    known = {**_custom_objects(model), **_lambda_functions(model)}
    try:
        if _shares_across_models(model):
            # Keras writes such a layer into the config of each nested model, as two.
            return keras.models.clone_model(
                model, clone_function=lambda layer: _recreate(layer, known), recursive=True
            )
        return _recreate(model, known)
    except Exception as error:
        raise ValueError(
            f"Keras cannot clone the model '{model.name}' of class {type(model).__name__}: "
            f"{error}\nGive the class a `get_config()` that holds all its constructor arguments, "
            "or pass `clone_function`, a function without arguments that returns a fresh model of "
            "the same architecture: PolyakModel(model, clone_function=make_model)."
        ) from error


def _recreate(layer, known):
    with _uncompiled(layer):
        config = keras.saving.serialize_keras_object(layer)
    return keras.saving.deserialize_keras_object(
        _for_cloning(config, known),
        custom_objects=known,
        # The config was made in this process, so a lambda in it is the user's own code.
        safe_mode=False,
    )


@contextlib.contextmanager
def _uncompiled(layer):
    # What a model was compiled with need not have a config, and its clone is not compiled.
    parts = layer._flatten_layers() if isinstance(layer, keras.Layer) else ()  # `a + b` is none.
    compiled = [part for part in parts if getattr(part, "compiled", False)]
    for part in compiled:
        part.compiled = False
    try:
        yield
    finally:
        for part in compiled:
            part.compiled = True


def _shares_across_models(model):
    # Only models that Keras itself puts together: others build what they share in `from_config`.
    plain = (keras.Sequential, Functional)
    owners = {id(part): part for part in model._flatten_layers() if type(part) in plain}
    if id(model) not in owners:
        return False
    owned = collections.Counter(id(layer) for owner in owners.values() for layer in owner.layers)
    return max(owned.values(), default=0) > 1


def _custom_objects(model):
    # Classes and functions of the user's own that are not registered with Keras, by name.
    found = {}
    for layer in model._flatten_layers():
        for value in (layer, *vars(layer).values()):
            if isinstance(value, types.FunctionType):
                found[value.__name__] = value
            elif hasattr(value, "get_config"):
                found[type(value).__name__] = type(value)
    return {k: v for k, v in found.items() if v.__module__.partition(".")[0] != "keras"}


def _lambda_functions(model):
    # Keras copies the code of a lambda without the variables it refers to.
    kind = keras.layers.Lambda
    layers = {id(layer): layer for layer in model._flatten_layers() if isinstance(layer, kind)}
    names = collections.Counter(layer.name for layer in layers.values())
    return {
        f"function of {layer.name}": layer.function
        for layer in layers.values()
        if names[layer.name] == 1
    }


def _for_cloning(config, known):
    # With the live functions of Lambda layers.
    if isinstance(config, (list, tuple)):
        return type(config)(_for_cloning(item, known) for item in config)
    if not isinstance(config, dict):
        return config
    config = {k: _for_cloning(v, known) for k, v in config.items()}
    if config.get("class_name") == "Lambda":
        key = f"function of {config['config'].get('name')}"
        if key in known:
            config["config"]["function"] = {
                "module": None,
                "class_name": "function",
                "config": key,
                "registered_name": key,
            }
    return config
