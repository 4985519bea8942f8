import keras
import numpy as np
import pytest
from frameworks import BACKEND, call_at_each_run, in_modes
from models import CROSSENTROPY, LazyClassifier, compile_classifier, make_classifier, trained

from polyak_model import PolyakModel
from polyak_model.inference.routes import check_report

ROUTES = ("average", "raw", "ensemble")


def test_the_default_route_is_reported_first_and_once():
    assert check_report(None, "raw", ["average"]) == ("raw",)
    assert check_report(["raw", "ensemble", "raw"], "average", ["average"]) == (
        "average",
        "raw",
        "ensemble",
    )
    assert check_report(ROUTES, "ensemble", ["average"]) == ("ensemble", "average", "raw")


def average_by_hand(model):
    """Moves the raw model and its average apart, without a step that takes long to compile."""
    for seed in (2, 3):
        model.raw_model.set_weights(make_classifier(seed).get_weights())
        model.update_average()


@in_modes("inference", {route: route for route in ROUTES}, elsewhere=["ensemble"])
def test_one_pass_reports_what_one_evaluation_of_each_route_does(inference, mode, batches):
    model = PolyakModel(
        compile_classifier(make_classifier(), **mode), 0.5, inference=inference, report=ROUTES
    )
    average_by_hand(model)
    logs = model.evaluate(*batches, batch_size=16, verbose=0, return_dict=True)
    assert len(logs) == 6
    assert len({logs[name] for name in logs if name.endswith("loss")}) == 3
    for route in ROUTES:
        prefix = "" if route == inference else f"{route}_"
        alone = model.evaluate(*batches, batch_size=16, verbose=0, using=route, return_dict=True)
        for name, value in alone.items():
            assert logs[prefix + name] == pytest.approx(value, rel=1e-6)


def test_the_raw_route_scores_exactly_as_the_raw_model_does(mode, batches):
    inner = compile_classifier(make_classifier(), **mode)
    model = PolyakModel(inner, 0.5, report=ROUTES)
    average_by_hand(model)
    logs = model.evaluate(*batches, batch_size=16, verbose=0, return_dict=True)
    bare = inner.evaluate(*batches, batch_size=16, verbose=0, return_dict=True)
    alone = model.evaluate(*batches, batch_size=16, verbose=0, using="raw", return_dict=True)
    assert alone == bare
    assert {"loss": logs["raw_loss"], "accuracy": logs["raw_accuracy"]} == pytest.approx(bare)


def test_the_loss_of_the_average_holds_the_penalty_of_its_own_weights(batches):
    model = trained(batches, epochs=3, report=ROUTES)
    logs = model.evaluate(*batches, verbose=0, return_dict=True)
    x, y = batches
    kernels = {}
    for route, of in (("average", model.average_model), ("raw", model.raw_model)):
        answer = model.predict(x, using=route, verbose=0)
        kernels[route] = 0.01 * np.square(of.get_weights()[0]).sum()
        expected = -np.log(answer[np.arange(len(y)), y]).mean() + kernels[route]
        name = "loss" if route == "average" else "raw_loss"
        assert logs[name] == pytest.approx(expected, rel=1e-5)
    answer = model.predict(x, using="ensemble", verbose=0)
    expected = -np.log(answer[np.arange(len(y)), y]).mean() + np.mean(list(kernels.values()))
    assert logs["ensemble_loss"] == pytest.approx(expected, rel=1e-5)
    assert kernels["average"] != pytest.approx(kernels["raw"], rel=1e-4)


class Counting(keras.layers.Layer):
    """Counts the forward passes of a running graph."""

    passes = 0

    def call(self, inputs):
        def count():
            Counting.passes += 1

        call_at_each_run(count)
        return inputs


@pytest.mark.tensorflow
def test_three_routes_take_two_forward_passes_per_batch(batches):
    inner = keras.Sequential(
        [keras.Input((6,)), Counting(), keras.layers.Dense(3, activation="softmax")]
    )
    model = PolyakModel(compile_classifier(inner), report=ROUTES)
    for report, passes in ((ROUTES, 2), (("raw",), 2), (("ensemble",), 2), (None, 1)):
        model.report = report
        model.evaluate(*batches, batch_size=16, verbose=0)
        Counting.passes = 0
        model.evaluate(*batches, batch_size=16, verbose=0)
        assert Counting.passes == passes * 4


def test_sample_weights_reach_every_route(batches):
    x, y = batches
    weights = np.linspace(0, 1, len(x)).astype("float32")
    model = trained(batches, report=ROUTES)
    logs = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    for route in ROUTES:
        alone = model.evaluate(
            x, y, sample_weight=weights, verbose=0, using=route, return_dict=True
        )
        prefix = "" if route == "average" else f"{route}_"
        assert logs[f"{prefix}loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_metrics_that_were_passed_as_objects_are_not_shared_between_routes(batches):
    metric = keras.metrics.SparseCategoricalAccuracy(name="hits")
    model = PolyakModel(make_classifier(), report=ROUTES)
    model.compile("sgd", CROSSENTROPY, metrics=[metric], weighted_metrics=["accuracy"])
    model.fit(*batches, verbose=0)
    logs = model.evaluate(*batches, verbose=0, return_dict=True)
    for route in ("average", "raw"):
        answer = model.predict(batches[0], using=route, verbose=0).argmax(-1)
        name = "hits" if route == "average" else "raw_hits"
        assert logs[name] == pytest.approx((answer == batches[1]).mean())


class Shouting(LazyClassifier):
    """A model with a test step of its own."""

    def test_step(self, *arguments):
        result = super().test_step(*arguments)
        if BACKEND == "jax":
            logs, state = result
            return {"shout": 10 * logs["loss"]}, state
        return {"shout": 10 * result["loss"]}


def test_a_test_step_of_ones_own_runs_on_each_model(batches):
    model = PolyakModel(compile_classifier(Shouting()), 0.5, report=("raw",))
    model.fit(*batches, batch_size=4, verbose=0)
    logs = model.evaluate(*batches, verbose=0, return_dict=True)
    assert set(logs) == {"shout", "raw_shout"}
    bare = float(model.raw_model.evaluate(*batches, verbose=0, return_dict=True)["shout"])
    assert float(logs["raw_shout"]) == pytest.approx(bare)
    assert float(logs["shout"]) != pytest.approx(bare)


def test_the_ensemble_refuses_a_test_step_of_ones_own(batches):
    model = PolyakModel(compile_classifier(Shouting()), report=("ensemble",))
    with pytest.raises(ValueError, match="cannot be evaluated: Shouting has a `test_step`"):
        model.evaluate(*batches, verbose=0)
    assert model.predict(batches[0], using="ensemble", verbose=0).shape == (64, 3)
