"""What may be wrapped: checks of models and optimizers, before anything changes."""

import keras
from keras import tree

from polyak_model.routed import RoutedModel


def check_model(model):
    """Raises `TypeError` or `ValueError` unless `model` can be wrapped.

    Args:
        model: Anything.
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
            "`model` is a PolyakModel already, and an average of an average is rarely what is "
            "meant. Received: model=<PolyakModel "
            f"'{model.name}'>. Wrap model.raw_model instead, or change its rule."
        )
    if model.compiled:
        refuse_second_average(model.optimizer)


def check_clone_function(clone_function):
    """Raises `ValueError` unless `clone_function` is None or a function.

    Args:
        clone_function: Anything.
    """
    is_function = callable(clone_function) and not isinstance(clone_function, keras.Model)
    if clone_function is not None and not is_function:
        raise ValueError(
            "`clone_function` must be a function without arguments that returns a fresh "
            f"keras.Model. Received: clone_function={clone_function!r}."
        )


def refuse_second_average(arguments):
    """Raises `ValueError` if an optimizer averages by itself.

    Args:
        arguments: An optimizer, or a nested structure that may hold several.
    """
    for optimizer in tree.flatten(arguments):
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if isinstance(inner, keras.optimizers.Optimizer) and inner.use_ema:
            raise ValueError(
                "`optimizer` must not average by itself inside a PolyakModel. Received: "
                f"{type(inner).__name__}(use_ema=True, ema_momentum={inner.ema_momentum}). Remove "
                "use_ema=True from the optimizer and keep PolyakModel(model, "
                f"average={inner.ema_momentum}), or keep the optimizer and remove PolyakModel."
            )
