"""The steps that Keras compiles, which on JAX take and return the state of their model."""

import contextlib

from keras import ops, tree
from keras.distribution import distribution
from keras.src.backend import compute_output_spec

from polyak_model.backend.common import may_skip_steps, stepping_optimizers, symbolic
from polyak_model.backend.jax.exclusive import exclusive_call, interruptible, sync
from polyak_model.backend.jax.interrupts import results_kept
from polyak_model.backend.jax.packing import (
    Packed,
    PackingTrainFunction,
    is_destroyed,
    run_packed,
    unpacked,
)
from polyak_model.backend.jax.state import groups_of, run_stateless, values_of
from polyak_model.backend.jax.tracing import double_precision
from polyak_model.backend.keras_internals import BuildHook, CompileHook, loss_tracker

__all__ = [
    "BuildHook",
    "EvaluationStep",
    "PredictionStep",
    "Trainer",
    "TrainingStep",
    "build_by_step",
    "call_step",
    "exclusive_call",
    "interruptible",
    "may_skip_steps",
    "optimizer_step",
    "rehearse",
    "score",
    "sync",
]


class TrainingStep:
    def train_step(self, state, data):
        groups = groups_of(self, "train_step")

        def step(state):
            return run_stateless(lambda: self._train_batch(data), groups, state)

        return run_packed(step, groups, state) if isinstance(state[1], Packed) else step(state)

    def make_train_function(self, force=False):
        before = self.train_function
        with _as_a_new_function(self, "train_step"), results_kept(self):
            super().make_train_function(force)
        if self.train_function is not before and self._may_pack():
            self.train_function = PackingTrainFunction(self, self.train_function)

    def _may_pack(self):
        # Under a distribution Keras compiles a step for one array and sharding per variable.
        return self.jit_compile and not self.run_eagerly and distribution() is None

    def train_on_batch(self, *args, **kwargs):
        with unpacked():
            return super().train_on_batch(*args, **kwargs)

    def jax_state_sync(self):
        # A step that fails after it was started leaves nothing to unpack; its error is raised.
        if not is_destroyed(getattr(self, "_jax_state", None)):
            super().jax_state_sync()

    def _purge_model_variables(self, **groups):
        # Emptied, variables would stay so if the first step fails. A step frees what it is given.
        pass


class EvaluationStep:
    def test_step(self, state, data):
        groups = groups_of(self, "test_step")
        return run_stateless(lambda: self._test_batch(data), groups, state)

    def make_test_function(self, force=False):
        with _as_a_new_function(self, "test_step"):
            super().make_test_function(force)

    def jax_state_sync(self):
        # Otherwise, putting values of 64 bits on several devices truncates them.
        with double_precision():
            super().jax_state_sync()


class PredictionStep:
    def predict_step(self, state, data):
        groups = groups_of(self, "predict_step")
        outputs, (_, state) = run_stateless(lambda: self._predict_batch(data), groups, state)
        return outputs, state


class Trainer(TrainingStep, EvaluationStep, PredictionStep, BuildHook, CompileHook):
    def stateless_update_average(self, trainable_variables, non_trainable_variables):
        """Takes one step of averaging, for training loops that `jax.jit` compiles.

        Call it right after the optimizer's step. It is `update_average` as a
        function of the state.

        Args:
            trainable_variables: List of the new values of
                `model.trainable_variables`.
            non_trainable_variables: List of the values of
                `model.non_trainable_variables`, averages included.

        Returns:
            List of the new values of `model.non_trainable_variables`.

        Raises:
            ValueError: If the model is not built.

        Example:

        >>> import jax, keras
        >>> from polyak_model import PolyakModel
        >>> model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> update = jax.jit(model.stateless_update_average)
        >>> weights = [variable.value for variable in model.trainable_variables]
        >>> state = [variable.value for variable in model.non_trainable_variables]
        >>> state = update(weights, state)
        >>> for variable, value in zip(model.non_trainable_variables, state):
        ...     variable.assign(value)
        >>> model.average_step
        1
        """
        groups = groups_of(self, "predict_step")
        state = trainable_variables, non_trainable_variables
        return run_stateless(self.update_average, groups, state)[1][1]


@contextlib.contextmanager
def _as_a_new_function(model, name):
    # JAX compiles equal functions once, and what the same method does may have changed.
    method = getattr(model, name)
    vars(model)[name] = lambda *args: method(*args)
    try:
        yield
    finally:
        del vars(model)[name]


def call_step(model, name, data):
    groups = groups_of(model, name)
    outputs, state = getattr(model, name)(values_of(groups), data)
    if name == "predict_step":
        groups, state = groups[1:], (state,)
    for group, values in zip(groups, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)
    return outputs


def optimizer_step(model):
    return sum(ops.cast(optimizer.iterations, "int32") for optimizer in stepping_optimizers(model))


def score(model, x, y, sample_weight, outputs):
    loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=False)
    batch_size = next(leaf for leaf in tree.flatten(x) if leaf is not None).shape[0]
    loss_tracker(model).update_state(loss, sample_weight=batch_size)
    return model.compute_metrics(x, y, outputs, sample_weight=sample_weight)


def build_by_step(model, batch):
    raise ValueError(
        "Keras cannot train a model on JAX whose weights are created by its first training step. "
        f"Received: {type(model).__name__}, which has no `call` and is not built. Build its parts "
        "first, e.g. in its __init__."
    )


def rehearse(function, batch, variables):
    compute_output_spec(function, symbolic(batch))
