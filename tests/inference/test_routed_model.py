import keras
import numpy as np
import pytest
from frameworks import BACKEND
from models import compile_classifier, make_classifier, trained

from polyak_model import PolyakModel

ROUTES = ("average", "raw", "ensemble")


def test_using_holds_for_one_call(batches):
    x = batches[0]
    model = trained(batches)
    average = model.predict(x, verbose=0)
    raw = model.predict(x, using="raw", verbose=0)
    np.testing.assert_array_equal(raw, model.raw_model.predict(x, verbose=0))
    np.testing.assert_array_equal(average, model.average_model.predict(x, verbose=0))
    np.testing.assert_array_equal(model.predict(x, verbose=0), average)
    assert not np.array_equal(raw, average)


def test_using_holds_for_one_call_even_when_the_call_fails(batches):
    model = trained(batches)
    with pytest.raises(ValueError, match="expected axis -1 of input shape"):
        model.predict(np.ones((2, 5), "float32"), using="raw", verbose=0)
    assert not np.array_equal(
        model.predict(batches[0], verbose=0), model.raw_model.predict(batches[0], verbose=0)
    )


def test_the_ensemble_predicts_the_mean(batches):
    x = batches[0]
    model = trained(batches)
    answers = [model.predict_on_batch(x, using=route) for route in ("raw", "average")]
    np.testing.assert_allclose(
        model.predict_on_batch(x, using="ensemble"), np.mean(answers, axis=0), rtol=1e-6
    )


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch traces nothing")
def test_switching_routes_traces_each_route_once(batches):
    traces = []

    class Traced(keras.layers.Layer):
        def call(self, inputs):
            traces.append(self)
            return inputs

    def make():
        return keras.Sequential([keras.Input((6,)), Traced(), make_classifier()])

    def ask_every_route():
        for route in ROUTES:
            model.predict(batches[0], using=route, verbose=0)
            model.evaluate(*batches, using=route, verbose=0)

    model = PolyakModel(compile_classifier(make()), clone_function=make)
    ask_every_route()
    once = len(traces)
    ask_every_route()
    assert once >= 6
    assert len(traces) == once


def test_compiling_again_traces_again(batches):
    model = trained(batches)
    before = model.evaluate(*batches, verbose=0, return_dict=True)
    model.compile("sgd", "mse", metrics=["accuracy"])
    y = np.eye(3)[batches[1]]
    after = model.evaluate(batches[0], y, verbose=0, return_dict=True)
    assert before["loss"] != pytest.approx(after["loss"])


def test_a_list_of_results_begins_with_those_of_the_default_route(batches):
    model = trained(batches, report=ROUTES)
    logs = model.evaluate(*batches, verbose=0, return_dict=True)
    values = model.evaluate(*batches, verbose=0)
    assert values[:2] == [logs["loss"], logs["accuracy"]]
    assert sorted(values) == sorted(logs.values())
    assert model.test_on_batch(*batches)[:2] == pytest.approx(values[:2], rel=1e-5)


def test_evaluating_another_route_leaves_the_metrics_of_training_alone(batches):
    model = trained(batches)
    model.reset_metrics()
    trained_on = model.train_on_batch(*batches, return_dict=True)
    model.evaluate(*batches, verbose=0)
    now = model.get_metrics_result()
    assert now.keys() == trained_on.keys()
    for name, value in trained_on.items():
        assert float(now[name]) == float(value)


def test_the_inference_attribute_changes_the_default_route(batches):
    model = trained(batches)
    model.inference = "raw"
    np.testing.assert_array_equal(
        model.predict(batches[0], verbose=0), model.raw_model.predict(batches[0], verbose=0)
    )
    assert model.evaluate(*batches, verbose=0) == model.evaluate(*batches, using="raw", verbose=0)


def test_the_raw_route_neither_waits_for_the_average_nor_moves_it():
    x = np.ones((4, 3), "float32")
    model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
    before = model.average_model.get_weights()
    model.raw_model.set_weights([w + 1 for w in before])
    expected = keras.ops.convert_to_numpy(model.raw_model(x))
    np.testing.assert_array_equal(model.predict_on_batch(x, using="raw"), expected)
    for average, w in zip(model.shadow.first.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(average, w)
    np.testing.assert_array_equal(model.predict_on_batch(x, using="average"), expected)
