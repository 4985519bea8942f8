"""The steps that Keras compiles, and what they need: counters of optimizers, metrics."""

import contextlib

import keras
import tensorflow as tf
from keras import tree

from polyak_model.backend import keras_internals
from polyak_model.backend.common import may_skip_steps, stepping_optimizers
from polyak_model.backend.keras_internals import CompileHook, loss_tracker
from polyak_model.backend.tensorflow.tracing import outside_trace

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
    def train_step(self, data):
        return self._train_batch(data)


class EvaluationStep:
    def test_step(self, data):
        return self._test_batch(data)


class PredictionStep:
    def predict_step(self, data):
        return self._predict_batch(data)


class BuildHook(keras_internals.BuildHook):
    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        super()._maybe_symbolic_build(iterator, data_batch)
        # TensorFlow traces a step twice if its first trace creates variables.
        batch = _batch_specifications(iterator)
        if batch is not None and self._may_build_before_tracing():
            self._build_on_batch(batch)


class Trainer(TrainingStep, EvaluationStep, PredictionStep, BuildHook, CompileHook):
    pass


def _batch_specifications(iterator):
    """Returns the `tf.TensorSpec` of each tensor in a batch, or None if one is not known."""
    batch = getattr(getattr(iterator, "_distributed_dataset", None), "element_spec", None)
    known = (
        isinstance(leaf, tf.TensorSpec) and leaf.shape.rank is not None
        for leaf in tree.flatten(batch)
    )
    return batch if all(known) else None


def call_step(model, name, data):
    return getattr(model, name)(data)


def optimizer_step(model):
    counts = [optimizer.iterations for optimizer in stepping_optimizers(model)]
    return tf.add_n([tf.cast(tf.convert_to_tensor(count), "int64") for count in counts])


def score(model, x, y, sample_weight, outputs):
    loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=False)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        # Keras divides losses by the number of replicas, because it sums their gradients.
        loss = loss * tf.cast(replicas, loss.dtype)
    batch_size = tf.shape(next(leaf for leaf in tree.flatten(x) if leaf is not None))[0]
    loss_tracker(model).update_state(loss, sample_weight=batch_size)
    return model.compute_metrics(x, y, outputs, sample_weight=sample_weight)


def _specification(leaf):
    if leaf is None or isinstance(leaf, tf.TensorSpec):
        return leaf
    return tf.type_spec_from_value(tf.convert_to_tensor(leaf))


def build_by_step(model, batch):
    specifications = tree.map_structure(_specification, batch)

    def step(batch):
        model.train_step(batch)

    # `tf.init_scope` would leave the trace, too, but it disables gradients.
    function = tf.function(step, autograph=False)
    outside_trace(lambda: function.get_concrete_function(specifications))


def rehearse(function, batch, variables):
    def call(batch):
        function(batch)

    state = [(variable, tf.convert_to_tensor(variable)) for variable in variables]
    with keras.StatelessScope(state_mapping=state):
        specifications = tree.map_structure(_specification, batch)
        tf.function(call, autograph=False).get_concrete_function(specifications)


def exclusive_call(model, route):
    return contextlib.nullcontext()


def interruptible(model, callbacks):
    return callbacks


def sync(model):
    pass  # Variables always contain the current state.
