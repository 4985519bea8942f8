"""Keras loads the files that `average_files` writes, and they predict as the mean does."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from polyak_model.checkpoints import average_files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three epochs of a model as both kinds of file, with the weights of each."""
    folder = tmp_path_factory.mktemp("trained")
    keras.utils.set_random_seed(0)
    lookup = keras.layers.StringLookup(vocabulary=["a", "b"])
    words = keras.Input((1,), dtype="string")
    numbers = keras.Input((4,))
    joined = keras.layers.Concatenate()(
        [keras.layers.Flatten()(keras.layers.Embedding(3, 2)(lookup(words))), numbers]
    )
    hidden = keras.layers.Dropout(0.1)(keras.layers.BatchNormalization()(joined))
    outputs = keras.layers.Dense(2, dtype="float32")(keras.layers.Dense(3, "relu")(hidden))
    model = keras.Model([words, numbers], outputs)
    model.compile("adam", "mse", metrics=["mae"])
    x = [tf.constant([["a"], ["b"], ["c"], ["a"]]), tf.random.uniform((4, 4))]
    y = np.random.rand(4, 2)
    weights = []
    for epoch in range(3):
        model.fit(x, y, verbose=0)
        model.save(folder / f"{epoch}.keras")
        model.save_weights(folder / f"{epoch}.weights.h5")
        weights.append(model.get_weights())
    return folder, model, x, weights


def expected(weights, shares):
    return [
        sum(share * w.astype("float64") for share, w in zip(shares, ws, strict=True))
        for ws in zip(*weights, strict=True)
    ]


def check_weights(model, weights, shares):
    for name, received, wanted in zip(
        [v.path for v in model.weights], model.get_weights(), expected(weights, shares), strict=True
    ):
        if "seed" not in name:
            np.testing.assert_allclose(received, wanted, rtol=1.2e-7, atol=0, err_msg=name)


@pytest.mark.parametrize("shares", [[1 / 3] * 3, [1 / 6, 2 / 6, 3 / 6]])
def test_keras_loads_the_model_without_a_warning_and_it_predicts_like_the_mean(trained, shares):
    folder, model, x, weights = trained
    average_files([folder / f"{n}.keras" for n in range(3)], folder / "average.keras", shares)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average = keras.models.load_model(folder / "average.keras")
        for compile_it in (True, False):
            keras.models.load_model(folder / "average.keras", compile=compile_it)
    check_weights(average, weights, shares)
    model.set_weights(average.get_weights())
    np.testing.assert_array_equal(average(x), model(x))
    average.compile("adam", "mse")
    average.fit(x, np.zeros((4, 2)), verbose=0)


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_keras_loads_the_weights(trained, ending):
    folder, model, _, weights = trained
    paths = [folder / f"{n}{ending}" for n in range(3)]
    average_files(paths, folder / "average.weights.h5")
    fresh = keras.Model.from_config(model.get_config())
    fresh.load_weights(folder / "average.weights.h5")
    check_weights(fresh, weights, [1 / 3] * 3)


def test_refreshed_statistics_are_those_of_all_batches(trained):
    folder, *_ = trained
    average_files([folder / f"{n}.keras" for n in range(3)], folder / "average.keras")
    model = keras.models.load_model(folder / "average.keras")
    layer = next(x for x in model.layers if isinstance(x, keras.layers.BatchNormalization))
    inputs = keras.Model(model.inputs, layer.input)
    batches = [
        [tf.constant([["a"], ["b"]]), tf.random.stateless_normal((2, 4), [0, n])] for n in range(5)
    ]
    for i, batch in enumerate(batches):
        layer.momentum = i / (i + 1)
        model(batch, training=True)
    means = [np.mean(inputs(batch), axis=0) for batch in batches]
    variances = [np.var(inputs(batch), axis=0) for batch in batches]
    np.testing.assert_allclose(layer.moving_mean, np.mean(means, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        layer.moving_variance, np.mean(variances, axis=0), rtol=1e-5, atol=1e-6
    )
