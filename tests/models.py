"""Small models that the tests train."""

import itertools

import keras
from keras import layers

from polyak_model import PolyakModel

CROSSENTROPY = "sparse_categorical_crossentropy"


def make_classifier(seed=1):
    """Makes a net with BatchNormalization, dropout and a penalty."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(momentum=0.9),
            layers.Dropout(0.3),
            layers.Dense(3, activation="softmax"),
        ]
    )


@keras.saving.register_keras_serializable(package="tests")
class LazyClassifier(keras.Model):
    """A subclassed net, built when it first sees data."""

    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.hidden = layers.Dense(width, activation="relu")
        self.norm = layers.BatchNormalization(momentum=0.9)
        self.outputs_layer = layers.Dense(3, activation="softmax")

    def call(self, inputs, training=None):
        return self.outputs_layer(self.norm(self.hidden(inputs), training=training))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class Recorder(keras.callbacks.Callback):
    """Records the raw weights after each batch, and the optimizer's step."""

    def __init__(self, raw):
        super().__init__()
        self.raw = raw
        self.weights = []
        self.steps = [self.step()]

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.raw.get_weights())
        self.steps.append(self.step())

    def step(self):
        """Returns the steps that the optimizer, or the one inside it, has taken."""
        optimizer = self.raw.optimizer
        return int(getattr(optimizer, "inner_optimizer", optimizer).iterations)

    def iterates(self):
        """Returns the weights after each batch at which the optimizer took a step."""
        advances = [after > before for before, after in itertools.pairwise(self.steps)]
        return list(itertools.compress(self.weights, advances))


def compile_classifier(model, optimizer="adam", **kwargs):
    """Compiles with cross-entropy and accuracy, and returns the model."""
    model.compile(optimizer, CROSSENTROPY, metrics=["accuracy"], **kwargs)
    return model


def trained(batches, average=0.9, epochs=1, **kwargs):
    """Wraps the classifier, fits it and returns the wrapper."""
    model = PolyakModel(compile_classifier(make_classifier()), average, **kwargs)
    model.fit(*batches, batch_size=4, epochs=epochs, verbose=0)
    return model
