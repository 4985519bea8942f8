import keras
import numpy as np
import pytest
from models import CROSSENTROPY, LazyClassifier, compile_classifier, make_classifier

from polyak_model import PolyakModel


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="`model` must be a keras.Model. Received: model='net'"):
        PolyakModel("net")


def test_a_class_in_place_of_a_model_is_refused():
    with pytest.raises(TypeError, match=r"Received: the class LazyClassifier. Pass an instance"):
        PolyakModel(LazyClassifier)


def test_wrapping_a_wrapper_is_refused():
    model = PolyakModel(make_classifier(), name="inside")
    with pytest.raises(TypeError, match=r"'inside'.*Wrap model.raw_model instead"):
        PolyakModel(model)


def test_an_optimizer_that_averages_is_refused_before_anything_changes():
    optimizer = keras.optimizers.Adam(use_ema=True, ema_momentum=0.95)
    message = r"Adam\(use_ema=True, ema_momentum=0.95\). Remove use_ema=True .* or keep the opt"
    model = PolyakModel(make_classifier())
    with pytest.raises(ValueError, match=message):
        model.compile(optimizer, CROSSENTROPY)
    assert not model.compiled
    assert not model.raw_model.compiled
    with pytest.raises(ValueError, match=message):
        PolyakModel(compile_classifier(make_classifier(), optimizer))
    with pytest.raises(ValueError, match=message):
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer), CROSSENTROPY)


def test_a_clone_function_that_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="`clone_function` must be a function without arguments"):
        PolyakModel(make_classifier(), clone_function=make_classifier())


def test_training_the_average_model_by_itself_warns_and_trains_no_weight():
    model = PolyakModel(make_classifier())
    average = compile_classifier(model.average_model)
    # Statistics of BatchNormalization follow the data, as in any model whose weights are frozen.
    averaged = [
        mine
        for raw, mine in zip(model.raw_model.weights, average.weights, strict=True)
        if raw.trainable
    ]
    before = [np.array(w) for w in averaged]
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        average.fit(np.ones((8, 6)), np.zeros(8, int), verbose=0)
    for weight, value in zip(averaged, before, strict=True):
        np.testing.assert_array_equal(np.array(weight), value)


def test_an_average_model_is_not_wrapped_again():
    model = PolyakModel(make_classifier())
    with pytest.raises(TypeError, match=r"no optimizer trains.*apply_average\(\)"):
        PolyakModel(model.average_model)
