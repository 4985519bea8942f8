"""Methods of a model's class, such as a `fit` that prepares data, applied to another model."""

import inspect

import keras


def has_own(model, name):
    """Returns whether the class of a model overrides a method of `keras.Model`."""
    return getattr(type(model), name) is not getattr(keras.Model, name)


def may_call(model, name):
    """Returns whether a method of a model's class may call the one of `keras.Model`.

    Args:
        model: A `keras.Model`.
        name: The name of the method.

    Example:

    >>> class Alone(keras.Sequential):
    ...     def fit(self, x):
    ...         return None
    >>> may_call(Alone(), "fit"), may_call(keras.Sequential(), "fit")
    (False, True)
    """
    kinds = type(model).__mro__
    own = [vars(kind) for kind in kinds[: kinds.index(keras.Model)]]
    method = next((methods[name] for methods in own if name in methods), None)
    if not inspect.isfunction(method):
        return True
    used, new = set(), _names(method)
    while new:
        used |= new
        called = [methods[each] for methods in own for each in new if each in methods]
        new = set().union(*map(_names, called)) - used
    return name in used


def _names(value):
    """Returns the names that a function or its code uses, with those of functions inside."""
    code = getattr(inspect.unwrap(value), "__code__", value) if callable(value) else value
    if not inspect.iscode(code):
        return set()
    return {*code.co_names, *(name for each in code.co_consts for name in _names(each))}


def redirected(model, name, target):
    """Returns a method of a model whose `super()` calls another function.

    The tasks of KerasHub override `fit`, `evaluate` and `predict` to prepare
    data, and leave the rest to `keras.Model`. With `target` a method of the
    wrapper, the wrapper does the rest.

    Args:
        model: A `keras.Model`.
        name: The name of a method of `keras.Model`.
        target: What takes the place of that method.

    Returns:
        `target` itself where the class of the model does not override it.

    Example:

    >>> class Scaled(keras.Sequential):
    ...     def predict(self, x, **kwargs):
    ...         return super().predict(x / 255, **kwargs)
    >>> redirected(Scaled(), "predict", lambda x: x)(510)
    2.0
    """
    if not has_own(model, name):
        return target
    # `super()` looks for methods in the order of the classes, where this one comes just before
    # `keras.Model`.
    last = type("Redirected", (keras.Model,), {name: _ignoring_self(target)})
    view = object.__new__(type(type(model).__name__, (type(model), last), {}))
    object.__setattr__(view, "__dict__", vars(model))
    return getattr(view, name)


def _ignoring_self(function):
    return lambda self, *args, **kwargs: function(*args, **kwargs)


def given(name, *args, **kwargs):
    """Returns the arguments of a method of `keras.Model` that differ from their defaults, by name.

    A method of the user's own may lack the others.

    Args:
        name: The name of the method.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Example:

    >>> given("predict", [1.0], None, "auto", steps=2)
    {'x': [1.0], 'steps': 2}
    """
    parameters = list(inspect.signature(getattr(keras.Model, name)).parameters.values())[1:]
    named = {each.name: value for each, value in zip(parameters, args, strict=False)}
    plain = (type(None), bool, int, float, str)
    defaults = {each.name: each.default for each in parameters if isinstance(each.default, plain)}
    return {
        key: value
        for key, value in {**named, **kwargs}.items()
        if key not in defaults or not (isinstance(value, plain) and value == defaults[key])
    }
