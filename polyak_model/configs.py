"""A fresh model from the config of another, functions of the user's own included."""

import collections
import types

import keras


def recreate(model):
    """Makes a fresh, uncompiled model from the config of another.

    Args:
        model: A `keras.Model`.

    Returns:
        A `keras.Model` with weights of its own.

    Raises:
        ValueError: If Keras cannot.
    """
    lambdas = _lambda_functions(model)
    try:
        config = keras.saving.serialize_keras_object(model)
        return keras.saving.deserialize_keras_object(
            _for_cloning(config, lambdas),
            custom_objects={**_custom_objects(model), **lambdas},
            # The config was made in this process, so a lambda in it is the user's own code.
            safe_mode=False,
        )
    except Exception as error:
        raise ValueError(
            f"Keras cannot clone the model '{model.name}' of class {type(model).__name__}: "
            f"{error}\nGive the class a `get_config()` that holds all its constructor arguments, "
            "or pass `clone_function`, a function without arguments that returns a fresh model of "
            "the same architecture: PolyakModel(model, clone_function=make_model)."
        ) from error


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


def _for_cloning(config, lambdas):
    # Without what the models were compiled with, and with the live functions of Lambda layers.
    if isinstance(config, (list, tuple)):
        return type(config)(_for_cloning(item, lambdas) for item in config)
    if not isinstance(config, dict):
        return config
    config = {k: _for_cloning(v, lambdas) for k, v in config.items() if k != "compile_config"}
    if config.get("class_name") == "Lambda":
        key = f"function of {config['config'].get('name')}"
        if key in lambdas:
            config["config"]["function"] = {
                "module": None,
                "class_name": "function",
                "config": key,
                "registered_name": key,
            }
    return config
