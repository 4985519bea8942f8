"""Checks that the config of a model names only objects of Keras.

Keras's `safe_mode` refuses lambdas, but before 3.9 it imports any module that a
config names; so configs are checked before Keras reads them.
"""

from polyak_model.errors import InputError

_MODULES = {
    "activations",
    "constraints",
    "dtype_policies",
    "initializers",
    "layers",
    "losses",
    "metrics",
    "models",
    "ops",
    "optimizers",
    "quantizers",
    "random",
    "regularizers",
}
_FUNCTIONS = ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")
# The code of these layers is not in Keras but in the file or in another one.
_FOREIGN = {"FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper"}
_VALUES = {
    "__bytes__",
    "__ellipsis__",
    "__keras_tensor__",
    "__numpy__",
    "__slice__",
    "__tensor__",
}


def check_config(config, path, is_function):
    """Checks that a model can be created from code of Keras alone.

    Args:
        config: The contents of config.json, a dict.
        path: The path of its file, for errors.
        is_function: Function of a module of Keras, such as `"losses"`, and a
            name; returns whether the module has a function of that name.

    Raises:
        InputError: If the config names anything else.

    Example:

    >>> layer = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1}}
    >>> check_config(layer, "model.keras", is_function=None)
    >>> check_config({**layer, "module": "os"}, "model.keras", is_function=None)
    Traceback (most recent call last):
    ...
    polyak_model.errors.InputError: Cannot use 'model.keras': it needs 'Dense' of 'os', which \
is not part of Keras, and no other code is run. Use polyak_model.soups.greedy_soup in a \
program that imports what the model needs.
    """
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            # In the order of the file.
            pending.extend(reversed(value.values()))
            if "class_name" in value:
                _check_object(value, path, is_function)
        elif isinstance(value, list):
            pending.extend(reversed(value))


def _check_object(config, path, is_function):
    kind, module, name = (config.get(key) for key in ("class_name", "module", "config"))
    if kind == "__lambda__" or (isinstance(kind, str) and kind in _FOREIGN):
        found = "a lambda" if kind == "__lambda__" else f"a layer {kind}"
        raise _refusal(path, f"{found}, whose code is not in Keras")
    if kind == "function":
        known = isinstance(name, str) and _is_known_function(module, name, is_function)
        kind = name
    else:
        known = kind in _VALUES if module is None else _is_known_class(module, kind)
    if not known:
        origin = f" of {module!r}" if module else ""
        raise _refusal(path, f"{kind!r}{origin}, which is not part of Keras")


def _is_known_class(module, name):
    # Keras accepts a function of that name in place of a class.
    if not isinstance(module, str) or not isinstance(name, str) or not name[:1].isupper():
        return False
    # Of its optimizers on PyTorch, Keras writes the private module.
    inner = module.removeprefix("keras.src.backend.torch.").removeprefix("keras.src.")
    home = inner.removeprefix("keras.").partition(".")[0]
    return module == "keras" or (module.startswith("keras.") and home in _MODULES)


def _is_known_function(module, name, is_function):
    homes = _FUNCTIONS if module == "builtins" else ()
    if isinstance(module, str) and module.startswith("keras."):
        homes = {*_FUNCTIONS, "ops"} & {module.removeprefix("keras.")}
    return any(is_function(home, name) for home in homes)


def _refusal(path, needed):
    return InputError(
        f"Cannot use {str(path)!r}: it needs {needed}, and no other code is run. Use "
        "polyak_model.soups.greedy_soup in a program that imports what the model needs."
    )
