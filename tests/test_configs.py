import keras
import numpy as np
import pytest
from keras import layers

from polyak_model import PolyakModel


def twice(x):
    return 2 * x


class Halved(keras.initializers.Initializer):
    """An initializer that is not registered with Keras."""

    def __call__(self, shape, dtype=None, **kwargs):
        return keras.ops.full(shape, 0.5, dtype)


def make_own():
    offset = 3.0
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Lambda(lambda x: keras.ops.relu(x) + offset),
            layers.Lambda(lambda x: twice(x) - offset),
            layers.Dense(2, activation=twice, kernel_initializer=Halved()),
        ]
    )


def test_functions_and_classes_of_ones_own_need_no_registration():
    model = PolyakModel(make_own())
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(model(x), model.raw_model(x))


def test_lambda_layers_of_one_name_that_cannot_be_told_apart_are_refused_with_the_way_out():
    def make():
        nested = keras.Sequential([layers.Lambda(lambda x: keras.ops.relu(x), name="same")])
        return keras.Sequential(
            [keras.Input((3,)), nested, layers.Lambda(lambda x: keras.ops.abs(x), name="same")]
        )

    with pytest.raises(ValueError, match="`clone_function`"):
        PolyakModel(make())
    assert PolyakModel(make(), clone_function=make).average_step == 0


class Opaque:
    """A loss that has no config."""

    def __call__(self, y, p):
        return keras.ops.mean((y - p) ** 2)


@pytest.mark.parametrize("loss", [Opaque(), lambda y, p: keras.ops.mean((y - p) ** 2)])
def test_what_a_model_was_compiled_with_needs_no_config(loss):
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    inner.compile("sgd", loss)
    model = PolyakModel(inner)
    assert inner.compiled
    model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0)
    assert model.average_step == 1
