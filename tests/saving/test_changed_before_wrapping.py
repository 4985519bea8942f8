"""Models with LoRA, or quantized, are saved and loaded as bare Keras saves and loads them."""

import keras
import numpy as np
import pytest
from keras import layers

from polyak_model import PolyakModel

X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")
Y = np.zeros((8, 6, 1), "float32")


def make_plain(attention=True):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 4))
    if attention:
        x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Dense(8, "relu", name="hidden")(x)
    return keras.Model(inputs, layers.Dense(1)(x))


@keras.saving.register_keras_serializable(package="tests")
def make_lora():
    """Makes a model with LoRA in attention, which is in no config, and in a Dense layer."""
    model = make_plain()
    model.get_layer("attention").query_dense.enable_lora(2)
    model.get_layer("hidden").enable_lora(2)
    return model


def make_quantized(mode):
    # Keras itself cannot load quantized attention.
    model = make_plain(attention=False)
    for layer in model.layers[1:]:
        layer.quantize(mode)
    return model


def train(make, eagerly=True, **options):
    # Tracing attention takes longer than so short a training.
    model = PolyakModel(make(), 0.5, **options)
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eagerly)
    model.fit(X, Y, batch_size=4, verbose=0)
    return model


def assert_same_predictions(loaded, model):
    assert loaded.average_step == model.average_step == 2
    for route in ("average", "raw"):
        np.testing.assert_array_equal(
            loaded.predict(X, using=route, verbose=0), model.predict(X, using=route, verbose=0)
        )


OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"compensated": True}, {"clone_function": make_lora}],
    ids=["default", "compensated", "clone_function"],
)


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@OPTIONS
def test_a_model_with_lora_in_attention_loads_and_trains_on(policy, options, tmp_path):
    keras.config.set_dtype_policy(policy)
    model = train(make_lora, eagerly=bool(options), **options)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_predictions(loaded, model)
    for pair in loaded.shadow.first.pairing.averaged:
        np.testing.assert_array_equal(keras.ops.cast(pair.target, pair.average.dtype), pair.average)
    assert loaded.get_config()["clone_function"] == model.get_config()["clone_function"]
    loaded.fit(X, Y, batch_size=4, verbose=0)
    assert loaded.average_step == 4


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("make", [make_lora, make_plain])
def test_weights_saved_with_lora_load_into_a_model_with_lora_or_without(
    make, compensated, tmp_path
):
    model = train(make_lora, compensated=compensated)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = PolyakModel(make(), 0.5, compensated=compensated)
    fresh.load_weights(tmp_path / "model.weights.h5")
    fresh.compile(run_eagerly=True)
    assert_same_predictions(fresh, model)


def test_weights_saved_without_lora_load_into_a_model_with_lora(tmp_path):
    model = train(make_plain, compensated=True)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = PolyakModel(make_lora(), 0.5, compensated=True)
    fresh.load_weights(tmp_path / "model.weights.h5")
    fresh.compile(run_eagerly=True)
    assert_same_predictions(fresh, model)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_a_quantized_model_is_averaged_and_loads(mode, tmp_path):
    model = train(lambda: make_quantized(mode), eagerly=False)
    model.save(tmp_path / "model.keras")
    assert_same_predictions(keras.models.load_model(tmp_path / "model.keras"), model)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = PolyakModel(make_quantized(mode), 0.5)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_same_predictions(fresh, model)


@pytest.mark.parametrize("part", ["raw_model", "average_model"])
def test_a_larger_model_whose_part_was_quantized_after_wrapping_is_not_saved(part, tmp_path):
    model = PolyakModel(make_plain(attention=False))
    outer = keras.Sequential([keras.Input((6, 4)), model])
    getattr(model, part).get_layer("hidden").quantize("int8")
    with pytest.raises(ValueError, match="must keep the weights .* clone_model"):
        outer.save(tmp_path / "outer.keras")
