"""What may be wrapped: checks of models and optimizers, before anything changes."""

import keras
from keras import tree

from polyak_model import backend
from polyak_model.inference.routed_model import RoutedModel


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
        check_optimizers(model.optimizer)


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


def check_optimizers(arguments):
    """Raises `ValueError` if an optimizer averages by itself.

    Args:
        arguments: An optimizer, its name or its config, or a nested structure
            that may hold several.
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
                "ScheduleFreeAdamW, which keeps the iterates to itself and gives the model a "
                "mixture of the newest one and their mean, so that the weights are no iterates to "
                "average. Use keras.optimizers.AdamW and keep PolyakModel, or keep the optimizer "
                "and remove PolyakModel."
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


def check_placement(model, device):
    """Raises `ValueError` unless an average of the model can be placed.

    Args:
        model: A `keras.Model`.
        device: The device that was asked for, or None.
    """
    own, at_hand = backend.strategy_of(model), backend.strategy_at_hand()
    if at_hand is not None and own is not at_hand:
        made = "without a strategy" if own is None else f"under another one, {_name(own)}"
        raise ValueError(
            "The average lives where the raw model does, so both must be created under one "
            f"strategy. Received: the model '{model.name}', created {made}, inside the scope of "
            f"{_name(at_hand)}. Create the model inside `with strategy.scope():`, too."
        )
    if own is not None and device is not None:
        raise ValueError(
            "`device` must be None for a model created under a strategy, which keeps raw and "
            f"average weights on each of its devices. Received: device={device!r}, and the model "
            f"'{model.name}' created under {_name(own)}. Leave `device` out, or create the model "
            "outside of the strategy's scope."
        )


def check_compilation(
    model, arguments, run_eagerly=False, jit_compile="auto", steps_per_execution=1, **_
):
    """Raises `ValueError` if Keras cannot train a model so under its strategy.

    Args:
        model: A `keras.Model`.
        arguments: A nested structure that may hold optimizers.
        run_eagerly: As in `compile`, like the arguments after it.
    """
    strategy = backend.strategy_of(model)
    if strategy is None:
        return
    for optimizer in tree.flatten(arguments):
        if isinstance(optimizer, keras.optimizers.Optimizer):
            _check_strategy_of_optimizer(model, optimizer)
    # Eagerly a condition is Python's, and XLA reduces without waiting.
    graph = not run_eagerly and jit_compile is not True
    steps = _accumulation_steps(arguments)
    if steps and graph and backend.waits_for_replicas(strategy):
        raise ValueError(
            f"Keras cannot accumulate gradients under {_name(strategy)}: the optimizer would step "
            "inside a condition, where replicas cannot wait for each other. Expected: an "
            f"optimizer without accumulation. Received: gradient_accumulation_steps={steps}. Leave "
            "it out and use larger batches, or compile with run_eagerly=True, or train without "
            "the strategy."
        )
    if steps_per_execution != 1 and not run_eagerly and backend.local_replicas(strategy) > 1:
        raise ValueError(
            "Keras cannot take several steps per execution on several devices: its loop over the "
            "batches of a strategy fails in TensorFlow. Expected: steps_per_execution=1. "
            f"Received: steps_per_execution={steps_per_execution!r} under {_name(strategy)} of "
            f"{backend.local_replicas(strategy)} devices. Leave it out."
        )


def _check_strategy_of_optimizer(model, optimizer):
    expected, received = backend.strategy_of(model), backend.strategy_of_optimizer(optimizer)
    if expected is not received:
        raise ValueError(
            "`optimizer` must be created under the strategy of the model. Received: "
            f"{type(optimizer).__name__}, created under {_name(received)}, for the model "
            f"'{model.name}', created under {_name(expected)}. Create it inside "
            "`with strategy.scope():`, or pass its name as a string."
        )


def _accumulation_steps(arguments):
    for optimizer in tree.flatten(arguments):
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        for part in (optimizer, inner):
            if isinstance(part, keras.optimizers.Optimizer) and part.gradient_accumulation_steps:
                return part.gradient_accumulation_steps
    return None


def check_method(model, method):
    """Raises `ValueError` if Keras cannot run a method under the model's strategy.

    Args:
        model: A `keras.Model`.
        method: Name of a method that trains or evaluates.
    """
    strategy = backend.strategy_of(model)
    if strategy and strategy.num_replicas_in_sync > backend.local_replicas(strategy):
        raise ValueError(
            f"Keras 3 cannot run `{method}()` under a strategy of several processes: it fails to "
            f"reduce their logs. Received: the model '{model.name}', created under "
            f"{_name(strategy)}. Write the training loop yourself, with strategy.run(...) and "
            "model.update_average() after the optimizer's step; `predict` works with every route."
        )


def _name(strategy):
    return "no strategy" if strategy is None else type(strategy).__name__
