"""What Keras cannot train under a strategy of TensorFlow."""

import keras
from keras import tree

from polyak_model.backend.tensorflow.strategies import (
    current_strategy,
    local_replicas,
    strategy_of,
    strategy_of_optimizer,
    waits_for_replicas,
)


def check_placement(model, device):
    own, current = strategy_of(model), current_strategy()
    if current is not None and own is not current:
        made = "without a strategy" if own is None else f"under another one, {_name(own)}"
        raise ValueError(
            "The model and its average must be created under the same strategy. Received: the "
            f"model '{model.name}', created {made}, inside the scope of {_name(current)}. Create "
            "the model inside `with strategy.scope():` too."
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
    strategy = strategy_of(model)
    if strategy is None:
        return
    for optimizer in _optimizers(arguments):
        _check_strategy_of_optimizer(model, optimizer)
    # A condition is Python's in eager mode, and replicas do not wait for each other under XLA.
    in_graph = not run_eagerly and jit_compile is not True
    steps = _accumulation_steps(arguments)
    if steps and in_graph and waits_for_replicas(strategy):
        raise ValueError(
            f"Keras cannot accumulate gradients under {_name(strategy)}: the optimizer would step "
            "inside a condition, where replicas cannot wait for each other. Expected: an "
            f"optimizer without accumulation. Received: gradient_accumulation_steps={steps}. Leave "
            "it out and use larger batches, or compile with run_eagerly=True, or train without "
            "the strategy."
        )
    if steps_per_execution != 1 and not run_eagerly and local_replicas(strategy) > 1:
        raise ValueError(
            "Keras cannot take several steps per execution on several devices: its loop over the "
            "batches of a strategy fails in TensorFlow. Expected: steps_per_execution=1. "
            f"Received: steps_per_execution={steps_per_execution!r} under {_name(strategy)} with "
            f"{local_replicas(strategy)} devices. Leave it out."
        )


def _optimizers(arguments):
    kind = keras.optimizers.Optimizer
    return [value for value in tree.flatten(arguments) if isinstance(value, kind)]


def _check_strategy_of_optimizer(model, optimizer):
    expected, received = strategy_of(model), strategy_of_optimizer(optimizer)
    if expected is not received:
        raise ValueError(
            "`optimizer` must be created under the strategy of the model. Received: "
            f"{type(optimizer).__name__}, created under {_name(received)}, for the model "
            f"'{model.name}', created under {_name(expected)}. Create it inside "
            "`with strategy.scope():`, or pass its name as a string."
        )


def _accumulation_steps(arguments):
    for optimizer in _optimizers(arguments):
        for part in (optimizer, getattr(optimizer, "inner_optimizer", optimizer)):
            if part.gradient_accumulation_steps:
                return part.gradient_accumulation_steps
    return None


def check_method(model, method):
    strategy = strategy_of(model)
    if strategy and strategy.num_replicas_in_sync > local_replicas(strategy):
        raise ValueError(
            f"Keras 3 cannot run `{method}()` under a strategy of several processes: it fails to "
            f"reduce their logs. Received: the model '{model.name}', created under "
            f"{_name(strategy)}. Write the training loop yourself, with strategy.run(...) and "
            "model.update_average() after the optimizer's step; `predict` works with every route."
        )


def _name(strategy):
    return "no strategy" if strategy is None else type(strategy).__name__
