"""The steps that Keras calls, and what they need: counters of optimizers, metrics."""

import contextlib
import functools

import torch
from keras import tree
from keras.src.backend import compute_output_spec

from polyak_model.backend.common import may_skip_steps, stepping_optimizers, symbolic
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
    # Of a compiled step, only that of the raw model is compiled, see `call_step`.
    @torch.compiler.disable
    def train_step(self, data):
        return self._train_batch(data)


class EvaluationStep:
    @torch.compiler.disable
    def test_step(self, data):
        return self._test_batch(data)


class PredictionStep:
    @torch.compiler.disable
    def predict_step(self, data):
        return self._predict_batch(data)


class Trainer(TrainingStep, EvaluationStep, PredictionStep, BuildHook, CompileHook):
    def _symbolic_build(self, iterator=None, data_batch=None):
        super()._symbolic_build(iterator, data_batch)
        # Modules find the parameters that were created since they were built.
        self.raw_model._post_build()
        self._post_build()

    def state_dict(self, *args, **kwargs):
        self._track_variables()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        self._track_variables()
        return super().load_state_dict(*args, **kwargs)


def call_step(model, name, data):
    step = getattr(model, name)
    if model.jit_compile and name == "train_step":
        step = functools.partial(_compiled(step.__func__), model)
    return step(data)


@functools.cache
def _compiled(step):
    return torch.compile(step)


def optimizer_step(model):
    # Numbers, since the variables are changed in place.
    return sum(int(optimizer.iterations) for optimizer in stepping_optimizers(model))


def score(model, x, y, sample_weight, outputs):
    loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=False)
    batch_size = next(leaf for leaf in tree.flatten(x) if leaf is not None).shape[0]
    loss_tracker(model).update_state(loss, sample_weight=batch_size)
    return model.compute_metrics(x, y, outputs, sample_weight=sample_weight)


def build_by_step(model, batch):
    raise ValueError(
        "Keras cannot train a model on PyTorch whose weights are created by its first training "
        f"step. Received: {type(model).__name__}, which has no `call` and is not built. Build its "
        "parts first, e.g. in its __init__."
    )


def rehearse(function, batch, variables):
    compute_output_spec(function, symbolic(batch))


def exclusive_call(model, route):
    return contextlib.nullcontext()


def interruptible(model, callbacks):
    return callbacks


def sync(model):
    pass  # Variables always contain the current state.
