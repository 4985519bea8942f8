"""A `fit`, `evaluate` or `predict` of a class of one's own acts as on the bare model."""

import keras
import numpy as np
import pytest
from keras import layers

from polyak_model import PolyakModel

X = np.random.default_rng(0).integers(0, 256, size=(8, 3))
Y = X[:, :1] / 255


class ScaledModel(keras.Model):
    """Takes bytes, in methods that lack most arguments of Keras."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1, kernel_initializer="ones")

    def call(self, inputs):
        return self.dense(inputs)

    def fit(self, x, y, scale=255, **kwargs):
        return super().fit(x / scale, y, **kwargs)

    def evaluate(self, x, y, scale=255, **kwargs):
        scale = 1 if "_use_cached_eval_dataset" in kwargs else scale
        return super().evaluate(x / scale, y, **kwargs)

    def predict(self, x, scale=255, **kwargs):
        return super().predict(x / scale, **kwargs)

    def train_on_batch(self, x, y, **kwargs):
        return super().train_on_batch(x / 255, y, **kwargs)

    def test_on_batch(self, x, y, **kwargs):
        return super().test_on_batch(x / 255, y, **kwargs)

    def predict_on_batch(self, x):
        return super().predict_on_batch(x / 255)


def make_pair():
    """Makes a bare model and a wrapped one of a decay that equals the raw model's weights."""
    bare, inner = ScaledModel(), ScaledModel()
    for model in (bare, inner):
        model.compile("sgd", "mse")
    return bare, PolyakModel(inner, 0.0, report=("average", "raw"))


def train(model, **options):
    data = {"batch_size": 4, "shuffle": False, "verbose": 0, "validation_data": (X / 255, Y)}
    return model.fit(X, Y, **data, **options).history


@pytest.mark.parametrize("options", [{}, {"scale": 100}], ids=["default", "an argument of its own"])
def test_a_fit_of_its_own_trains_and_is_averaged(options):
    bare, model = make_pair()
    expected, received = train(bare, **options), train(model, **options)
    np.testing.assert_array_equal(model.raw_model.dense.kernel, bare.dense.kernel)
    np.testing.assert_array_equal(model.average_model.dense.kernel, bare.dense.kernel)
    assert model.average_step == 2
    assert {name: received[name] for name in expected} == expected
    assert received["val_raw_loss"] == expected["val_loss"]


@pytest.mark.parametrize("using", ["average", "raw", "ensemble"])
def test_every_route_evaluates_and_predicts_as_the_bare_model_does(using):
    bare, model = make_pair()
    assert model.evaluate(X, Y, verbose=0, using=using) == bare.evaluate(X, Y, verbose=0)
    assert model.test_on_batch(X, Y, using=using) == bare.test_on_batch(X, Y)
    expected = bare.predict(X, verbose=0)
    np.testing.assert_array_equal(model.predict(X, verbose=0, using=using), expected)
    np.testing.assert_array_equal(model.predict_on_batch(X, using=using), expected)


def test_train_on_batch_of_its_own_is_averaged():
    bare, model = make_pair()
    assert model.train_on_batch(X, Y) == bare.train_on_batch(X, Y)
    assert model.average_step == 1
    np.testing.assert_array_equal(model.average_model.dense.kernel, bare.dense.kernel)


class OwnLoop(ScaledModel):
    def fit(self, x, y):
        return [self.train_step((x / 255, y)) for _ in range(2)]


class SometimesOwnLoop(OwnLoop):
    def fit(self, x, y, by_keras=False):
        return ScaledModel.fit(self, x, y) if by_keras else super().fit(x, y)


class CallsByAnother(ScaledModel):
    def fit(self, x, y, **kwargs):
        return self.train_fully(x, y, **kwargs)

    def train_fully(self, *args, **kwargs):
        def train():
            return super(ScaledModel, self).fit(*args, **kwargs)

        return train()


def wrap_compiled(make):
    inner = make()
    inner(X / 255)
    inner.compile("sgd", "mse")
    return PolyakModel(inner)


def test_a_fit_that_never_calls_that_of_keras_is_refused_before_it_trains():
    model = wrap_compiled(OwnLoop)
    before = model.raw_model.get_weights()
    with pytest.raises(
        ValueError, match=r"`OwnLoop.fit` must .*never calls it.*update_average\(\)"
    ):
        model.fit(X, Y)
    np.testing.assert_array_equal(before[0], model.raw_model.get_weights()[0])


def test_a_fit_that_did_not_call_that_of_keras_is_refused():
    model = wrap_compiled(SometimesOwnLoop)
    with pytest.raises(ValueError, match=r"`SometimesOwnLoop.fit` must .*returned without calling"):
        model.fit(X, Y)


def test_a_fit_that_calls_that_of_keras_in_another_method_trains():
    model = wrap_compiled(CallsByAnother)
    model.fit(X / 255, Y, batch_size=4, verbose=0)
    assert model.average_step == 2
