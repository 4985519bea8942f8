"""Models of which a part is frozen, and what must be shared of them."""

import inspect

import keras
import numpy as np
from keras import layers

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, size=32)


@keras.saving.register_keras_serializable(package="tests")
class Counter(layers.Layer):
    """Counts batches and subtracts a constant, frozen or not."""

    def build(self, input_shape):
        shape = input_shape[-1:]
        self.constant = self.add_weight(shape=shape, trainable=False, name="constant")
        self.count = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="count"
        )

    def call(self, inputs, training=None):
        if training:
            self.count.assign_add(1)
        return inputs - self.constant


def enable_lora_in(layer, rank):
    """Enables LoRA with an alpha that differs from the rank, where Keras has it (not in 3.8)."""
    has_alpha = "lora_alpha" in inspect.signature(layer.enable_lora).parameters
    layer.enable_lora(rank, **({"lora_alpha": 3} if has_alpha else {}))


def make_frozen(change=lambda model: None, compiled=True, mode=None):
    """Makes a classifier on a frozen body, with statistics of each kind.

    Args:
        change: Called with the model before it is compiled.
        compiled: Bool.
        mode: Arguments of `compile`. Defaults to None: eager execution, since
            tracing takes longer than these trainings.
    """
    keras.utils.set_random_seed(1)
    body = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Normalization(mean=np.ones(6), variance=np.full(6, 4.0), name="scale"),
            layers.Dense(8, activation="relu", kernel_regularizer="l2", name="hidden"),
            layers.BatchNormalization(momentum=0.9, name="frozen_norm"),
            Counter(name="counter"),
        ],
        name="body",
    )
    body.trainable = False
    model = keras.Sequential(
        [
            keras.Input((6,)),
            body,
            layers.Dense(5, kernel_regularizer="l2", name="middle"),
            layers.BatchNormalization(momentum=0.9, name="norm"),
            layers.Dropout(0.3, seed=1),
            layers.Dense(3, activation="softmax", name="head"),
        ]
    )
    change(model)
    if compiled:
        mode = {"run_eagerly": True} if mode is None else mode
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"], **mode)
    return model


def enable_lora(model):
    """Gives the layer in the middle factors of rank 2, with a scale other than 1."""
    enable_lora_in(model.get_layer("middle"), 2)


def freeze_kernel(model):
    """Freezes one kernel."""
    model.get_layer("middle").kernel.trainable = False


def quantize(model):
    """Makes the kernel in the middle one of 8-bit integers."""
    model.get_layer("middle").quantize("int8")


def quantize_with_lora(model):
    """Does the same, and adds factors."""
    quantize(model)
    enable_lora(model)


def keep(model):
    """Changes nothing."""


BODY = {
    "hidden/kernel",
    "hidden/bias",
    *(f"frozen_norm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")),
    "counter/constant",
}
# What is shared, by what was done to the model.
SHARED = {
    keep: BODY,
    enable_lora: BODY | {"middle/kernel"},
    freeze_kernel: BODY | {"middle/kernel"},
    quantize: BODY | {"middle/kernel", "middle/kernel_scale"},
    quantize_with_lora: BODY | {"middle/kernel", "middle/kernel_scale"},
}


def names_of(variables):
    """Returns the last two parts of the paths of variables, a set."""
    return {"/".join(variable.path.split("/")[-2:]) for variable in variables}


def values_of(variables):
    """Returns the values of variables, a list of arrays."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def all_values(model):
    """Returns the values of the weights of the raw model and of all averages, a list."""
    models = [model.raw_model, *model.average_models.values()]
    return values_of(weight for each in models for weight in each.weights)


def fit(model, **settings):
    """Trains for an epoch of four steps."""
    return model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, **settings)
