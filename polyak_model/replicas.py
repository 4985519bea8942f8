"""Training on several devices: what cannot work is refused before anything changes."""

import keras
from keras import tree

from polyak_model import backend


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
