"""One kind of model, and what must hold whenever such a model is wrapped."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import closed_forms
import keras
import numpy as np
import pytest
from frameworks import BACKEND
from keras import tree
from keras_files import contents_of
from models import Recorder, create_state

from polyak_model import ExponentialAverage, PolyakModel
from polyak_model.saving.staging import stage

RULE = ExponentialAverage(0.8)


@dataclasses.dataclass
class Kind:
    """A model to make, and what it is trained on.

    Args:
        make: `() -> keras.Model`, compiled.
        x: Inputs, arrays or tensors.
        y: Targets, or None where `x` is a dataset.
        prepare: `keras.Model -> None`, called between wrapping and fitting.
        arguments: Arguments of `PolyakModel` beside the rule.
        batch_size: Examples in a batch.
        shuffle: Bool. Whether `fit` shuffles.
        adds_losses: Bool. Whether layers add losses when they are called.
    """

    make: Callable
    x: Any
    y: Any
    prepare: Callable = lambda model: None
    arguments: dict = dataclasses.field(default_factory=dict)
    batch_size: int = 8
    shuffle: bool = True
    adds_losses: bool = False


class Trained:
    """A model that was fitted, wrapped or bare, and everything seen on the way."""

    def __init__(self, kind, wrap):
        keras.utils.clear_session(free_memory=False)  # The logs name outputs after their layers.
        keras.utils.set_random_seed(5)
        self.raw = kind.make()
        self.model = PolyakModel(self.raw, RULE, **kind.arguments) if wrap else self.raw
        kind.prepare(self.raw)
        if not wrap and kind.y is not None:
            data = (kind.x, kind.y)
            create_state(self.raw, tree.map_structure(lambda array: array[: kind.batch_size], data))
        self.recorder = Recorder(self.raw)
        self.logs = []
        page = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: self.logs.append(dict(logs))
        )
        self.model.fit(
            kind.x,
            kind.y,
            batch_size=kind.batch_size,
            shuffle=kind.shuffle,
            verbose=0,
            callbacks=[self.recorder, page],
        )
        self.iterates = self.recorder.iterates()


def check_kind(kind, tmp_path):
    """Wraps, fits, evaluates, predicts, saves and loads, and compares with the oracle.

    Args:
        kind: A `Kind`.
        tmp_path: A folder.

    Returns:
        The fitted `PolyakModel`.
    """
    _, model = check_all_but_saving(kind)
    check_saving(model, kind, tmp_path)
    return model


def check_all_but_saving(kind):
    """Wraps, fits, evaluates and predicts, and compares with the oracle.

    Args:
        kind: A `Kind`.

    Returns:
        The bare model and the `PolyakModel`, both fitted.
    """
    bare, wrapped = Trained(kind, wrap=False), Trained(kind, wrap=True)
    check_training(bare, wrapped)
    check_average(wrapped.model, wrapped.iterates)
    check_evaluation(wrapped.model, kind)
    check_predictions(wrapped.model, kind)
    return bare.raw, wrapped.model


def check_large_kind(kind, tmp_path):
    """Does the same for models that take long to trace, with one pass through all routes.

    Args:
        kind: A `Kind`.
        tmp_path: A folder.
    """
    bare, wrapped = Trained(kind, wrap=False), Trained(kind, wrap=True)
    model = wrapped.model
    check_training(bare, wrapped)
    check_average(model, wrapped.iterates)
    model.report = ("average", "raw", "ensemble")
    logs = model.evaluate(kind.x, kind.y, verbose=0, return_dict=True)
    assert len({float(logs[name]) for name in ("loss", "raw_loss", "ensemble_loss")}) == 3
    answers = [
        keras.ops.convert_to_numpy(each(kind.x, training=False))
        for each in (model.raw_model, model.average_model)
    ]
    ensemble = model.predict(kind.x, verbose=0, using="ensemble")
    np.testing.assert_allclose(ensemble, sum(answers) / 2, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    assert_same_state(model, keras.models.load_model(tmp_path / "model.keras"))


def check_training(bare, wrapped):
    """Law 10: the same iterates, logs and state of the optimizer, bit for bit."""
    assert len(bare.logs) == len(bare.iterates) > 1
    assert bare.logs == wrapped.logs
    assert len(bare.iterates) == len(wrapped.iterates)
    for one, other in zip(bare.iterates, wrapped.iterates, strict=True):
        assert_identical(one, other)
    assert_identical(bare.raw.optimizer.variables, wrapped.raw.optimizer.variables)


def check_average(model, iterates):
    """Laws 1 and 8: floats are averaged, everything else is copied."""
    weights = model.average_model.weights
    assert model.average_step == len(iterates)
    # No rule that is debiased gives the weights before the first step a share.
    expected = closed_forms.average(RULE, iterates[0], iterates)
    moved = False
    for weight, mean, last in zip(weights, expected, iterates[-1], strict=True):
        received = keras.ops.convert_to_numpy(weight)
        if keras.backend.is_float_dtype(weight.dtype):
            ulps = 4 * np.finfo(weight.dtype).eps * np.abs(mean).max(initial=0)
            np.testing.assert_allclose(received, mean, rtol=0, atol=ulps, err_msg=weight.path)
            moved = moved or not np.array_equal(received, last)
        else:
            np.testing.assert_array_equal(received, last, err_msg=weight.path)
    assert moved


def check_evaluation(model, kind):
    """Each route reports what its model does when it is evaluated alone."""

    def evaluate(each):
        reset_states(model)
        return each.evaluate(
            kind.x, kind.y, batch_size=kind.batch_size, verbose=0, return_dict=True
        )

    model.report = ("average", "raw", "ensemble")
    logs = evaluate(model)
    # Keras recognizes added losses by `id`. On JAX an eager step reuses those of the last batch,
    # and a bare model loses or repeats one in about one batch of a hundred.
    traced = kind.adds_losses and BACKEND == "jax"
    with eagerly(*[] if traced else (model.raw_model, model.average_model)):
        raw, alone = evaluate(model.raw_model), evaluate(model.average_model)
    assert {name: logs[f"raw_{name}"] for name in raw} == pytest.approx(raw, rel=1e-6)
    alone["loss"] += penalty_of_average(model)
    assert {name: logs[name] for name in alone} == pytest.approx(alone, rel=1e-6)
    assert logs["loss"] != logs["raw_loss"]
    assert np.isfinite([logs[f"ensemble_{name}"] for name in raw]).all()


def penalty_of_average(model):
    """Returns the penalty of the average, which its untrainable weights leave out."""
    pairs = zip(model.raw_model.weights, model.average_model.weights, strict=True)
    return sum(float(w.regularizer(mean)) for w, mean in pairs if w.regularizer and w.trainable)


def check_predictions(model, kind):
    """Each route answers what its model does; the ensemble answers with the mean."""

    def predict(each, **using):
        reset_states(model)
        return each.predict(kind.x, batch_size=kind.batch_size, verbose=0, **using)

    ensemble = predict(model, using="ensemble")
    with eagerly(model.raw_model, model.average_model):
        raw, average = predict(model, using="raw"), predict(model, using="average")
        assert_identical(predict(model.raw_model), raw)
        assert_identical(predict(model.average_model), average)
    mean = tree.map_structure(lambda one, other: (one + other) / 2, raw, average)
    # TensorFlow fuses the two passes, and the mean, otherwise than each pass alone.
    assert_close(mean, ensemble)
    assert not all(map(np.array_equal, tree.flatten(raw), tree.flatten(average)))


@contextlib.contextmanager
def eagerly(*models):
    """Lets models evaluate and predict without tracing, which takes longer than a few batches do.

    What was traced of the wrapper before is what these answers are compared with.

    Args:
        *models: Models that did neither before.
    """
    before = [model.run_eagerly for model in models]
    for model in models:
        model.run_eagerly = True
    yield
    for model, run_eagerly in zip(models, before, strict=True):
        model.run_eagerly = run_eagerly
        model.make_test_function(force=True)
        model.make_predict_function(force=True)


def check_saving(model, kind, tmp_path):
    """The loaded wrapper has the same weights and gives the same answers."""
    model.save(tmp_path / "model.keras")
    # AverageCheckpoint writes the same file in the background.
    stage(model, ".keras").write(tmp_path / "staged.keras")
    assert contents_of(tmp_path / "staged.keras") == contents_of(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_state(model, loaded)
    # Both models take part in the answer of the ensemble.
    answers = []
    for each in (model, loaded):
        reset_states(each)
        answers.append(
            each.predict(kind.x, batch_size=kind.batch_size, verbose=0, using="ensemble")
        )
    # A saved config is JSON, which has no tuples: any Keras model answers with lists once loaded.
    assert_identical(*map(tree.flatten, answers))


def reset_states(model):
    """Empties the states of recurrent layers that carry them from batch to batch."""
    for each in (model.raw_model, model.average_model):
        for layer in each.layers:
            if getattr(layer, "stateful", False):
                layer.reset_state()


def assert_same_state(model, other):
    """Compares the weights of both models, and the step, of two wrappers."""
    assert_identical(model.raw_model.weights, other.raw_model.weights)
    assert_identical(model.average_model.weights, other.average_model.weights)
    assert model.average_step == other.average_step > 0


def assert_close(expected, received):
    """Compares nested structures of outputs to a few float32 roundings of the largest."""
    for one, other in zip(tree.flatten(expected), tree.flatten(received), strict=True):
        roundings = 8 * np.finfo("float32").eps * np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=0, atol=roundings)


def assert_identical(expected, received):
    """Compares nested structures of arrays or variables bit for bit."""
    tree.assert_same_structure(
        *(tree.map_structure(lambda leaf: 0, each) for each in (expected, received))
    )
    pairs = list(zip(tree.flatten(expected), tree.flatten(received), strict=True))
    assert pairs
    for one, other in pairs:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
