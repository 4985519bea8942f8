"""Law 12: a call keeps nothing on the wrapper."""

import concurrent.futures
import itertools
import random
import threading

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from models import compile_classifier, make_classifier, trained

from polyak_model import PolyakModel, UniformAverage

ROUTES = ("average", "raw", "ensemble")


def in_threads(calls, workers=4):
    """Runs calls in several threads that start together, and returns their results in order."""
    barrier = threading.Barrier(min(workers, len(calls)), timeout=60)
    first = itertools.count()

    def run(call):
        if next(first) < barrier.parties:
            barrier.wait()
        return call()

    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        return [future.result() for future in [threads.submit(run, call) for call in calls]]


def calls_of(model, x, y):
    """Returns a call of each kind through each route, by name."""
    calls = {}
    for route in ROUTES:
        calls["predict", route] = lambda route=route: model.predict(x, using=route, verbose=0)
        calls["predict_on_batch", route] = lambda route=route: model.predict_on_batch(
            x, using=route
        )
    # Two evaluations of one bare model at once mix their metrics, so each route is evaluated once.
    for route in ROUTES:
        calls["evaluate", route] = lambda route=route: sorted(
            model.evaluate(x, y, using=route, verbose=0, return_dict=True).items()
        )
    calls["report", None] = lambda: sorted(
        model.evaluate(x, y, verbose=0, return_dict=True).items()
    )
    return calls


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_calls_through_different_routes_do_not_disturb_each_other(batches, run_eagerly):
    model = PolyakModel(
        compile_classifier(make_classifier(), run_eagerly=run_eagerly), 0.9, report=ROUTES
    )
    model.fit(*batches, batch_size=8, verbose=0)
    calls = calls_of(model, *batches)
    alone = {name: call() for name, call in calls.items()}
    names = list(calls)
    for seed in range(3):
        random.Random(seed).shuffle(names)
        received = in_threads([calls[name] for name in names])
        for name, result in zip(names, received, strict=True):
            np.testing.assert_equal(result, alone[name], err_msg=str(name))


def test_first_calls_may_be_made_at_once(batches):
    expected = {
        route: trained(batches).predict(batches[0], using=route, verbose=0) for route in ROUTES
    }
    model = trained(batches)
    received = in_threads(
        [lambda route=route: model.predict(batches[0], using=route, verbose=0) for route in ROUTES]
    )
    for route, result in zip(ROUTES, received, strict=True):
        np.testing.assert_array_equal(result, expected[route])


def test_penalties_of_the_average_do_not_leak_into_its_own_evaluation(batches):
    model = trained(batches)
    alone = model.average_model.evaluate(*batches, verbose=0)
    through_route = model.evaluate(*batches, using="average", verbose=0)
    assert through_route[0] > alone[0]
    assert model.average_model.evaluate(*batches, verbose=0) == alone
    assert not any(weight.trainable for weight in model.average_model.weights)


def fit_beside(action, batches, start_step=0):
    """Fits a model while another thread repeats an action; returns the history and the model."""
    keras.utils.set_random_seed(3)
    model = PolyakModel(compile_classifier(make_classifier()), UniformAverage(start_step))
    done = threading.Event()

    def repeat():
        while action and not done.is_set():
            action(model)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        beside = thread.submit(repeat)
        try:
            history = model.fit(*batches, batch_size=4, epochs=4, verbose=0).history
        finally:
            done.set()
        beside.result()
    return history, model


# What another thread draws from it changes the training of a bare model, too.
NEEDS_GENERATORS = pytest.mark.skipif(
    BACKEND == "torch", reason="all threads shuffle and drop out with one generator of PyTorch"
)


@NEEDS_GENERATORS
@pytest.mark.parametrize("start_step", [0, 10**6])
def test_predictions_beside_a_fit_leave_the_average_and_the_logs_alone(batches, start_step):
    def predict(model):
        model.predict(batches[0], verbose=0)
        model.predict(batches[0], using="ensemble", verbose=0)

    expected_history, expected = fit_beside(None, batches, start_step)
    history, model = fit_beside(predict, batches, start_step)
    assert history == expected_history
    for one, other in zip(
        expected.average_model.get_weights(), model.average_model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@NEEDS_GENERATORS
def test_evaluations_beside_a_fit_leave_its_logs_alone(batches):
    def evaluate(model):
        model.evaluate(*batches, using="average", verbose=0)

    assert fit_beside(evaluate, batches)[0] == fit_beside(None, batches)[0]


class Watching(keras.callbacks.Callback):
    """Records the model that Keras shows, and what it says of an evaluation."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after = stop_after
        self.models, self.results, self.batches = [], [], 0

    def on_test_batch_end(self, batch, logs=None):
        self.batches += 1
        self.models.append(self.model)
        self.results.append(self.model.get_metrics_result())
        self.model.stop_evaluating = self.batches == self.stop_after

    def on_predict_batch_end(self, batch, logs=None):
        self.batches += 1
        self.models.append(self.model)
        self.model.stop_predicting = self.batches == self.stop_after


@pytest.mark.parametrize("route", ROUTES)
def test_callbacks_see_the_wrapper_and_stop_their_own_call(batches, route):
    model = trained(batches)
    watching = Watching()
    logs = model.evaluate(
        *batches, batch_size=8, using=route, callbacks=[watching], verbose=0, return_dict=True
    )
    assert all(shown is model for shown in watching.models)
    assert {k: float(v) for k, v in watching.results[-1].items()} == pytest.approx(logs)
    for call in (
        lambda **kwargs: model.evaluate(*batches, **kwargs),
        lambda **kwargs: model.predict(batches[0], **kwargs),
    ):
        stopping = Watching(stop_after=2)
        call(batch_size=8, using=route, callbacks=[stopping], verbose=0)
        assert stopping.batches == 2
        assert not model.stop_evaluating
        assert not model.stop_predicting


def test_callbacks_of_a_fit_see_the_wrapper_in_its_validation(batches):
    model = PolyakModel(compile_classifier(make_classifier()), report=ROUTES)
    watching = Watching()
    history = model.fit(
        *batches, validation_data=batches, epochs=2, callbacks=[watching], verbose=0
    ).history
    assert all(shown is model for shown in watching.models)
    last = {f"val_{name}": float(value) for name, value in watching.results[-1].items()}
    assert last == pytest.approx({name: history[name][-1] for name in last})
    assert {"val_raw_accuracy", "val_ensemble_loss"} <= last.keys()


def test_a_fit_keeps_no_validation_data(batches):
    model = PolyakModel(compile_classifier(make_classifier()), inference="raw")
    model.fit(*batches, validation_data=batches, epochs=2, verbose=0)
    for each in (model, model.raw_model):
        assert getattr(each, "_eval_epoch_iterator", None) is None


class OwnPredict(keras.Model):
    """A model whose `predict` does something else."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)

    def predict(self, x, **kwargs):
        return super().predict(x, **kwargs) + 100

    def get_config(self):
        return {}


def test_a_predict_of_the_users_class_counts(batches):
    model = PolyakModel(OwnPredict())
    model.build((None, 6))
    for route, own in (("raw", model.raw_model), ("average", model.average_model)):
        received = model.predict(batches[0], using=route, verbose=0)
        np.testing.assert_array_equal(received, own.predict(batches[0], verbose=0))
        assert received.min() > 50
