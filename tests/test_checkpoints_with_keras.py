"""Keras loads the files that `average_files` writes, and they predict as the mean does."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from polyak_model.checkpoints import average_files
from polyak_model.errors import InputError
from polyak_model.weight_files.reader import open_weights


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


class Adversarial(keras.Model):
    """Two nets with optimizers in attributes, a dict and a nested list, and a layer so named."""

    def __init__(self):
        super().__init__()
        self.generator = keras.layers.Dense(2)
        self.dense_optimizer = keras.layers.Dense(2)
        self.g_opt = keras.optimizers.Adam(name="whatever")
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9)
        self.others = {
            "d": keras.optimizers.SGD(0.1),
            "more": [keras.optimizers.RMSprop(schedule), keras.optimizers.Adafactor()],
        }

    def call(self, inputs):
        return self.dense_optimizer(self.generator(inputs))

    def optimizers(self):
        return [self.g_opt, self.others["d"], *self.others["more"]]


def make_adversarial(seed):
    keras.utils.set_random_seed(seed)
    model = Adversarial()
    model(np.ones((1, 3)))
    model.compile("adam", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    for optimizer in model.optimizers():
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(seed)
    return model


def test_files_of_a_model_with_several_optimizers_are_averaged_without_their_state(tmp_path):
    models = [make_adversarial(seed) for seed in (1, 3)]
    paths = []
    for n, model in enumerate(models):
        paths.append(tmp_path / f"{n}.weights.h5")
        model.save_weights(paths[-1])
    result = average_files(paths, tmp_path / "average.weights.h5")
    assert len(result.averaged) == len(models[0].weights)
    assert result.copied == []
    with open_weights(tmp_path / "average.weights.h5") as average:
        assert sorted(average.variables) == sorted(result.averaged)
    # Keras warns that the optimizers have no state, and loads the weights.
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        models[0].load_weights(tmp_path / "average.weights.h5")
    loaded = read_weights(tmp_path / "average.weights.h5")
    for weight, expected in zip(models[0].weights, loaded, strict=True):
        np.testing.assert_array_equal(weight.numpy(), expected)


def read_weights(path):
    with open_weights(path) as weights:
        groups = ("generator", "dense_optimizer")
        return [weights.variables[f"{g}/vars/{n}"].read() for g in groups for n in range(2)]


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_models_that_keras_quantized_are_refused(tmp_path, mode):
    paths = []
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.layers[0].quantize(mode)
        paths.append(tmp_path / f"{seed}.keras")
        model.save(paths[-1])
    with pytest.raises(InputError, match="'layers/dense/vars/0' is quantized to int8"):
        average_files(paths, tmp_path / "out.keras")
    assert not (tmp_path / "out.keras").exists()
