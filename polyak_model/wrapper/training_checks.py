"""What can be wrapped and compiled: checks of models and optimizers, before anything changes.

What a backend cannot train where it is placed is checked by `polyak_model.backend.check_*`.
"""

import keras

from polyak_model.average.average import is_average_model
from polyak_model.backend.common import optimizers_in_step, optimizers_of
from polyak_model.inference.routed_model import RoutedModel


def check_model(model):
    """Raises `TypeError` or `ValueError` unless `model` can be wrapped.

    Args:
        model: The argument of `PolyakModel`.
    """
    advice = "Pass a keras.Model, e.g. PolyakModel(keras.Sequential([...]))."
    if isinstance(model, type):
        raise TypeError(
            f"`model` must be an instance of keras.Model. Received: the class {model.__name__}. "
            f"Pass an instance: PolyakModel({model.__name__}(...))."
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r}. {advice}")
    if isinstance(model, RoutedModel):
        raise TypeError(
            "`model` is a PolyakModel already, and an average of an average is rarely intended. "
            f"Received: model=<PolyakModel '{model.name}'>. Wrap model.raw_model instead, or "
            "change its rule."
        )
    if is_average_model(model):
        raise TypeError(
            "`model` is the average model of a PolyakModel, which no optimizer trains. Received: "
            f"model=<{type(model).__name__} '{model.name}'>. To go on from the average, call "
            "apply_average() and wrap model.raw_model."
        )
    if model.compiled:
        check_optimizers(optimizers_of(model))


def check_counts_steps(model):
    """Raises `ValueError` if no optimizer counts the steps that a model takes.

    Args:
        model: A `keras.Model`.
    """
    if not optimizers_in_step(model):
        raise ValueError(
            f"The average moves once per optimizer step, and {type(model).__name__} has no "
            "optimizer that counts its steps. Received: a `train_step` that changes weights by "
            "itself. Keep an optimizer in an attribute of the model; or train in a loop of your "
            "own, and call model.update_average() after each step."
        )


def check_clone_function(clone_function):
    """Raises `ValueError` unless `clone_function` is None or a function.

    Args:
        clone_function: The argument of `PolyakModel`.
    """
    is_function = callable(clone_function) and not isinstance(clone_function, keras.Model)
    if clone_function is not None and not is_function:
        raise ValueError(
            "`clone_function` must be a function without arguments that returns a new "
            f"keras.Model. Received: clone_function={clone_function!r}."
        )


def check_optimizers(arguments):
    """Raises `ValueError` if an optimizer averages the weights by itself.

    Args:
        arguments: An optimizer, its name or its config, or a nested structure
            that may contain several.
    """
    for name, settings in _describe_optimizers(arguments):
        if settings.get("use_ema"):
            momentum = settings.get("ema_momentum", 0.99)
            raise ValueError(
                "`optimizer` must not average by itself inside a PolyakModel. Received: "
                f"{name}(use_ema=True, ema_momentum={momentum}). Remove use_ema=True from the "
                f"optimizer and keep PolyakModel(model, average={momentum}), or keep the optimizer "
                "and remove PolyakModel."
            )
        if name.lower() == "schedulefreeadamw":
            raise ValueError(
                "`optimizer` must not average by itself inside a PolyakModel. Received: "
                "ScheduleFreeAdamW, which keeps the iterates in its own state and sets the weights "
                "to an interpolation of the newest iterate and their mean, so that the weights are "
                "not iterates. Use keras.optimizers.AdamW and keep PolyakModel, or keep the "
                "optimizer and remove PolyakModel."
            )


def _describe_optimizers(value):
    """Yields the class name and the settings of everything that may be an optimizer."""
    if isinstance(value, keras.optimizers.Optimizer):
        for kind in type(value).__mro__:
            yield kind.__name__, vars(value)
        yield from _describe_optimizers(getattr(value, "inner_optimizer", None))
        yield from _describe_optimizers(getattr(value, "optimizers", None))
    elif isinstance(value, dict):
        if isinstance(value.get("class_name"), str):
            yield value["class_name"], value.get("config") or {}
        yield from _describe_optimizers(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _describe_optimizers(part)
    elif isinstance(value, str):
        yield value, {}
