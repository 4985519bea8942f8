"""What people do to a wrapped model before, between and after fits."""

import itertools

import closed_forms
import keras
import numpy as np
import pytest
from keras import layers
from kinds import (
    RULE,
    Kind,
    Trained,
    assert_close,
    assert_identical,
    assert_same_state,
    check_all_but_saving,
    check_average,
)
from model_zoo import LABELS, X, classifier, dense
from models import Recorder, compile_classifier, make_classifier

from polyak_model import PolyakModel


def fit(model, raw):
    recorder = Recorder(raw)
    model.fit(X, LABELS, batch_size=8, verbose=0, callbacks=[recorder])
    return recorder.iterates()


def train_while_freezing(wrap):
    """Fits with the first layer frozen, then unfrozen, then the last frozen."""
    keras.utils.set_random_seed(5)
    raw = classifier(dense(), layers.BatchNormalization(), dense())
    model = PolyakModel(raw, RULE) if wrap else raw
    iterates = []
    for frozen in (raw.layers[0], None, raw.layers[-1]):
        for layer in raw.layers:
            layer.trainable = layer is not frozen
        compile_classifier(model)
        iterates.append(fit(model, raw))
    return model, iterates


def test_the_average_follows_while_layers_are_frozen_and_unfrozen_between_fits():
    _, bare = train_while_freezing(wrap=False)
    model, iterates = train_while_freezing(wrap=True)
    assert_identical(bare, iterates)
    check_average(model, list(itertools.chain(*iterates)))
    # Freezing froze: the first kernel in the first fit, the last one in the third.
    first, _, third = iterates
    np.testing.assert_array_equal(first[0][0], first[-1][0])
    np.testing.assert_array_equal(third[0][-2], third[-1][-2])
    assert not np.array_equal(iterates[1][0][0], iterates[1][-1][0])


def test_weights_loaded_from_a_file_after_wrapping_are_where_averaging_starts(tmp_path):
    compile_classifier(make_classifier(seed=2)).save_weights(tmp_path / "pretrained.weights.h5")
    rule = closed_forms.RULES["biased"]
    raw = compile_classifier(make_classifier())
    model = PolyakModel(raw, rule)
    raw.load_weights(tmp_path / "pretrained.weights.h5")
    start = make_classifier(seed=2).get_weights()
    assert_identical(start, model.average_model.get_weights())
    assert_identical(raw.predict(X, verbose=0), model.predict(X, verbose=0))
    iterates = fit(model, raw)
    expected = closed_forms.average(rule, start, iterates)
    assert_close(expected, model.average_model.get_weights())


def test_weights_set_in_the_raw_model_after_fitting_leave_the_average_as_it_is():
    model = Trained(Kind(lambda: classifier(dense()), X, LABELS), wrap=True).model
    average, step = model.average_model.get_weights(), model.average_step
    other = [2 * w for w in model.raw_model.get_weights()]
    model.raw_model.set_weights(other)
    assert_identical(average, model.average_model.get_weights())
    assert_identical(other, model.raw_model.get_weights())
    assert model.average_step == step == 4


def test_the_weights_of_the_wrapper_make_a_round_trip():
    kind = Kind(lambda: classifier(dense(), layers.BatchNormalization()), X, LABELS)
    model = Trained(kind, wrap=True).model
    weights = model.get_weights()
    model.set_weights(weights)
    assert_identical(weights, model.get_weights())
    other = PolyakModel(kind.make(), RULE)
    other.set_weights(weights)
    assert_same_state(model, other)


def test_a_wrapper_that_is_given_weights_goes_on_as_the_first_does():
    kind = Kind(lambda: classifier(dense()), X, LABELS)
    model = Trained(kind, wrap=True).model
    other = PolyakModel(kind.make(), RULE)
    other.set_weights(model.get_weights())
    for each in (model, other):
        compile_classifier(each, keras.optimizers.SGD(0.1))
        each.fit(X, LABELS, batch_size=8, shuffle=False, verbose=0)
    assert_same_state(model, other)


def make_adapters():
    model = classifier(dense(), dense())
    model.layers[0].enable_lora(2)
    model.layers[1].enable_lora(2)
    return compile_classifier(model)


def test_lora_that_was_enabled_before_wrapping_is_averaged_and_merged_when_saved(tmp_path):
    kind = Kind(make_adapters, X, LABELS)
    bare, model = check_all_but_saving(kind)
    # Keras merges the two factors into the kernel when it saves, of a bare model too.
    bare.save(tmp_path / "bare.keras")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = keras.models.load_model(tmp_path / "bare.keras")
    assert_identical(expected.get_weights(), loaded.raw_model.get_weights())
    assert not np.array_equal(bare.layers[0].get_weights()[0], expected.get_weights()[0])
    for route in ("average", "raw"):
        assert_close(
            model.predict(X, using=route, verbose=0), loaded.predict(X, using=route, verbose=0)
        )


class Scaled(layers.Layer):
    """A layer whose constructor takes a function, so that Keras makes no config of it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.inner = layers.Dense(4)

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.function(self.inner(inputs))


def make_without_config():
    return classifier(Scaled(lambda x: 3 * keras.ops.tanh(x)))


@pytest.mark.parametrize("arguments", [{}, {"clone_function": make_without_config}])
def test_a_model_without_config_trains_and_keeps_its_weights(arguments, tmp_path):
    kind = Kind(make_without_config, X, LABELS, arguments=arguments)
    bare, model = check_all_but_saving(kind)
    # Keras saves no such model whole, wrapped or bare.
    for each in (bare, model):
        with pytest.raises(NotImplementedError, match="get_config"):
            each.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = PolyakModel(make_without_config(), RULE, **arguments)
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert_same_state(model, loaded)
