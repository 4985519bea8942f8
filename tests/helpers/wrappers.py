"""PolyakModels of several kinds, averaged but not trained, and their files."""

import json

import h5py
import keras
import numpy as np
from keras import layers

from polyak_model import PolyakModel

INPUTS = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
TARGETS = np.random.default_rng(1).normal(size=(16, 2)).astype("float32")
# Of an average without rules.
DESCRIPTION = {
    "format": 2,
    "version": "1",
    "run": "a",
    "compensated": False,
    "weights": [],
    "excluded": [],
}
RULE = {"class_name": "ExponentialAverage", "config": {"decay": 0.5}}


def make_sequential():
    """Makes a net with BatchNormalization and dropout."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, activation="relu", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, seed=0),
            layers.Dense(2),
        ]
    )


def make_functional():
    """Makes a net with a skip connection."""
    inputs = keras.Input((6,))
    hidden = layers.Dense(6, activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(2)(hidden + inputs))


def make_nested():
    """Makes a net with another inside."""
    inner = keras.Sequential([layers.Dense(4), layers.Dense(6)])
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(2)(inner(inputs)))


@keras.saving.register_keras_serializable(package="tests")
class Shadow(keras.Model):
    """A net whose class has the name of the group in which Keras saves the state of averaging."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


def make_shadow():
    """Makes a net of the class Shadow."""
    model = Shadow()
    model(INPUTS)
    return model


KINDS = {
    "sequential": make_sequential,
    "functional": make_functional,
    "nested": make_nested,
    "shadow": make_shadow,
}


def make_wrapper(kind, average=0.5, **options):
    """Makes a compiled PolyakModel whose average is far from its raw model after three steps."""
    keras.utils.set_random_seed(0)
    inner = KINDS[kind]()
    inner.compile("adam", "mse", metrics=["mae"], run_eagerly=True)
    inner.optimizer.build(inner.trainable_variables)
    model = PolyakModel(inner, average, **options)
    generator = np.random.default_rng(0)
    for _ in range(3):
        for variable in inner.weights:
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
        model.update_average()
    return model


def save_all(folder):
    """Saves a wrapper of each kind, whole and weights alone; returns the wrappers by kind."""
    wrappers = {kind: make_wrapper(kind) for kind in KINDS}
    for kind, model in wrappers.items():
        model.save(folder / f"{kind}.keras")
        model.save_weights(folder / f"{kind}.weights.h5")
    return wrappers


def describe(path, text=None):
    """Writes the description of an average into a `.weights.h5` file, or removes it."""
    with h5py.File(path, "r+") as file:
        variables = file["vars"]
        if "description" in variables:
            del variables["description"]
        if text is not None:
            text = text if isinstance(text, bytes) else json.dumps(text).encode()
            variables["description"] = np.frombuffer(text, "uint8")
