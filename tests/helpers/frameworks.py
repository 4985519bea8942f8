"""What tests need of the current backend of Keras."""

import functools

import keras
import pytest

BACKEND = keras.backend.backend()
# How people train.
MAIN_MODE = {"tensorflow": "graph", "jax": "xla", "torch": "eager"}[BACKEND]
# What XLA does unless it is told otherwise, as it is by tests/conftest.py.
SHIPPED = {"xla_backend_optimization_level": 3}


def compile_as_shipped(monkeypatch):
    """Lets Keras, and calls of `jax.jit`, compile on JAX as users do, until that is undone."""
    import jax
    from keras.src.backend.jax import trainer

    assert trainer.jit is jax.jit
    jit = functools.partial(jax.jit, compiler_options=SHIPPED)
    for module in (jax, trainer):
        monkeypatch.setattr(module, "jit", jit)


def in_modes(argument, values, elsewhere):
    """Parametrizes a test by values as people train, and by some of them in the other modes.

    Args:
        argument: Name of the argument of the test.
        values: Dict from names to values of it.
        elsewhere: Names of the values that are tested in every mode.
    """
    cases = [(name, MAIN_MODE) for name in values]
    others = [mode for mode in ("eager", "graph", "xla") if mode != MAIN_MODE]
    cases += [(name, mode) for name in elsewhere for mode in others]
    return pytest.mark.parametrize(
        (argument, "mode"),
        [pytest.param(values[name], mode, id=f"{name}-{mode}") for name, mode in cases],
        indirect=["mode"],
    )


def compiled(function, variables, run_eagerly=False, jit_compile=False):
    """Compiles a function that assigns to variables as `compile` compiles a training step.

    Args:
        function: A function without arguments; its result is dropped.
        variables: All variables that it reads or assigns to.
        run_eagerly: As in `keras.Model.compile`.
        jit_compile: As in `keras.Model.compile`.
    """
    if run_eagerly or BACKEND == "torch":
        return function
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=jit_compile)
    import jax

    def stateless(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
            function()
        return [scope.get_current_value(variable) for variable in variables]

    stateless = jax.jit(stateless)

    def call():
        for variable, value in zip(variables, stateless([v.value for v in variables]), strict=True):
            variable.assign(value)

    return call


def gradients_of(loss, model):
    """Returns the gradients of a loss, in a training loop of one's own.

    Args:
        loss: `() ->` a scalar. What it assigns to variables lasts.
        model: The model whose trainable variables and state it uses.
    """
    weights = model.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        return tape.gradient(value, weights)
    if BACKEND == "torch":
        import torch

        return torch.autograd.grad(loss(), [weight.value for weight in weights])
    import jax

    state = model.non_trainable_variables

    def stateless(values):
        pairs = [*zip(weights, values, strict=True), *((v, v.value) for v in state)]
        with keras.StatelessScope(state_mapping=pairs) as scope:
            return loss(), [scope.get_current_value(variable) for variable in state]

    gradients, changed = jax.grad(stateless, has_aux=True)([weight.value for weight in weights])
    for variable, value in zip(state, changed, strict=True):
        variable.assign(value)
    return gradients


def call_at_each_run(function):
    """Calls a function of Python whenever the current operations are executed."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.py_function(function, [], [])
    elif BACKEND == "jax":
        import jax

        jax.debug.callback(function)
    else:
        function()
