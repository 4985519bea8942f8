"""Small models that the tests train."""

import itertools

import closed_forms
import keras
import numpy as np
from frameworks import BACKEND
from keras import layers

from polyak_model import PolyakModel, UniformAverage

CROSSENTROPY = "sparse_categorical_crossentropy"
# Inputs and targets of the classifiers.
EXAMPLES = (np.zeros((2, 6), "float32"), np.zeros(2, "int64"))


def make_classifier(seed=1):
    """Makes a net with BatchNormalization, dropout and a penalty."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(momentum=0.9),
            # Without a seed, PyTorch drops out by a global generator, which no file keeps.
            layers.Dropout(0.3, seed=seed),
            layers.Dense(3, activation="softmax"),
        ]
    )


def make_net_of_every_size():
    """Makes a net of 64 variables of one entry, then six of up to 150,000."""
    units = [1] * 32 + [300, 300, 500]
    return keras.Sequential([keras.Input((1,)), *map(layers.Dense, units)])


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
    """Records the raw weights after each batch, whether the optimizer took a step, and the logs.

    One recorder may follow several fits, with other optimizers.
    """

    def __init__(self, raw):
        super().__init__()
        self.raw = raw
        self.weights = []
        self.advances = []
        self.logs = []

    def on_train_batch_begin(self, batch, logs=None):
        self.before = self.step()

    def on_train_batch_end(self, batch, logs=None):
        assert self.model  # On JAX, to read it writes the state of `fit` to its variables.
        self.weights.append(self.raw.get_weights())
        self.advances.append(self.step() > self.before)
        self.logs.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))

    def step(self):
        """Returns the steps that the optimizer, or the one inside it, has taken."""
        assert self.model
        optimizer = self.raw.optimizer
        return int(getattr(optimizer, "inner_optimizer", optimizer).iterations)

    def iterates(self):
        """Returns the weights after each batch at which the optimizer took a step."""
        return list(itertools.compress(self.weights, self.advances))


def compile_classifier(model, optimizer="adam", **kwargs):
    """Compiles with cross-entropy and accuracy, and returns the model."""
    model.compile(optimizer, CROSSENTROPY, metrics=["accuracy"], **kwargs)
    return model


def trained(batches, average=0.9, epochs=1, **kwargs):
    """Wraps the classifier, fits it and returns the wrapper."""
    model = PolyakModel(compile_classifier(make_classifier()), average, **kwargs)
    model.fit(*batches, batch_size=4, epochs=epochs, verbose=0)
    return model


def with_momentum():
    """Makes an optimizer that has state, as Adam has, and far fewer operations to trace."""
    return keras.optimizers.SGD(0.05, momentum=0.9)


def make_compiled(optimizer=None, **kwargs):
    """Makes the classifier and compiles it, by default with momentum."""
    return compile_classifier(make_classifier(), optimizer or with_momentum(), **kwargs)


def assert_identical(expected, received):
    """Compares lists of arrays bit for bit."""
    assert len(expected) == len(received)
    for one, other in zip(expected, received, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(expected, received, ulps):
    """Compares to `ulps` float32 roundings of the largest weight of each tensor."""
    assert len(expected) == len(received)
    for one, other in zip(expected, received, strict=True):
        scale = np.finfo("float32").eps * np.abs(one).max(initial=0)
        np.testing.assert_allclose(other, one, rtol=0, atol=ulps * scale)


def create_state(model, data):
    """Creates the state that a bare model lacks before its first step, as the wrapper does.

    On TensorFlow, variables that a step creates make Keras trace it twice,
    which takes most of the time of a short training. Law 10 in
    tests/test_laws.py is about models to which nobody did this.

    Args:
        model: A compiled `keras.Model`.
        data: A batch of inputs and targets, a tuple of nested structures of arrays.
    """
    if BACKEND == "tensorflow" and not model.run_eagerly:
        model._symbolic_build(data_batch=data)


def assert_trains_as_bare(fit, make=make_compiled, rule=None, data=EXAMPLES):
    """Trains a model bare and wrapped, and compares: laws 10 and 1.

    Iterates, logs and the optimizer's variables must agree bit for bit, and the
    average must be that of the iterates. The wrapper answers through the raw
    model, so that validation logs agree, too.

    Args:
        fit: Callable from a model and a `Recorder`, a callback that it must
            pass on, that trains the model.
        make: `() -> keras.Model`, compiled and built.
        rule: A `Rule`. Defaults to the uniform average.
        data: A batch of inputs and targets like those that it is trained on.

    Returns:
        The wrapper.
    """
    rule = rule or UniformAverage()
    recorders = []
    for wrap in (False, True):
        keras.utils.set_random_seed(5)
        inner = make()
        start = inner.get_weights()
        model = PolyakModel(inner, rule, inference="raw") if wrap else inner
        if not wrap:
            create_state(inner, data)
        recorders.append(Recorder(inner))
        fit(model, recorders[-1])
    bare, wrapped = recorders
    assert bare.logs == wrapped.logs
    assert len(bare.weights) == len(wrapped.weights)
    for one, other in zip(bare.weights, wrapped.weights, strict=True):
        assert_identical(one, other)
    assert_identical(bare.raw.get_weights(), wrapped.raw.get_weights())
    assert_identical(*([v.numpy() for v in r.raw.optimizer.variables] for r in recorders))
    iterates = wrapped.iterates()
    assert model.average_step == len(iterates) > 1
    assert any(not np.array_equal(*pair) for pair in zip(iterates[-2], iterates[-1], strict=True))
    expected = closed_forms.average(rule, start, iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=4)
    return model
