"""Trainings of many kinds, on each of which averages of the weights can be compared."""

import functools
import math
from dataclasses import dataclass

import batch_normalization
import diffusion
import keras
import mnist
import numpy as np
from keras import layers
from sklearn.datasets import load_diabetes

from polyak_model.cli.demo.images import split

WIDTHS = (64, 32)  # Of the hidden layers of dense nets.


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        model: A compiled model.
        arguments: Dict, the arguments of its `fit`.
        steps: Int, the number of optimizer steps.
        held_out: Tuple, inputs and targets to score on.
    """

    model: keras.Model
    arguments: dict
    steps: int
    held_out: tuple


def _arrays(model, training, held_out, epochs, batch_size=mnist.BATCH_SIZE):
    x, y = training
    arguments = {"x": x, "y": y, "epochs": epochs, "batch_size": batch_size}
    return Training(model, arguments, epochs * math.ceil(len(x) / batch_size), held_out)


def dense(
    seed, images, epochs, rate=0.05, schedule="constant", share=0.0, batch_size=32, init=None
):
    """A dense net on MNIST images, trained with SGD and momentum.

    With `init`, a seed, only the initial weights and the order of the images differ.
    """
    training, held_out = mnist.load(seed, share, images)
    steps = epochs * math.ceil(len(training[0]) / batch_size)
    model = mnist.build_model(schedule, rate, steps, seed if init is None else init, WIDTHS)
    return _arrays(model, training, held_out, epochs, batch_size)


def normalized(seed, images, epochs, rate=0.1):
    """A dense net with BatchNormalization, trained with SGD without momentum."""
    training, held_out = mnist.load(seed, size=images)
    return _arrays(batch_normalization.build_model(rate, seed), training, held_out, epochs)


def fine_tuned(seed, images, epochs, rate=0.01):
    """A dense net that has learned the digits 0 to 4, on an eighth of the images of all."""
    (x, y), held_out = mnist.load(seed, size=images)
    model = mnist.build_model("constant", 0.05, None, seed, WIDTHS)
    small = y < mnist.CLASSES // 2
    model.fit(x[small], y[small], epochs=5, verbose=0)
    model.optimizer = None  # Without the momentum of the first training.
    loss = "sparse_categorical_crossentropy"
    optimizer = keras.optimizers.SGD(rate, momentum=mnist.MOMENTUM)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    few = len(x) // 8
    return _arrays(model, (x[:few], y[:few]), held_out, epochs)


def regression(seed, images, epochs, rate=1e-3):
    """A dense net on the diabetes data of scikit-learn, trained with Adam."""
    x, y = load_diabetes(return_X_y=True)
    training, held_out = split(x / x.std(0), (y - y.mean()) / y.std(), seed)
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    units = [layers.Dense(64, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input(x.shape[1:]), *units, layers.Dense(1)])
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    return _arrays(model, training, held_out, epochs, batch_size=16)


def generative(seed, images, steps, rate=1e-3):
    """A diffusion model of 8x8 digits, trained with Adam on digits with fresh noise."""
    training, held_out = diffusion.load(seed)
    x, y = diffusion.training_pairs(training, steps, seed)
    arguments = {"x": x, "y": y, "batch_size": diffusion.BATCH_SIZE, "shuffle": False}
    model = diffusion.build_model(rate, seed)
    return Training(model, arguments, steps, diffusion.held_out_pairs(held_out))


# Each a function of a seed and of the number of MNIST images, None for all 5,000.
SETTINGS = {
    "short": functools.partial(dense, epochs=2),
    "long": functools.partial(dense, epochs=24),
    "short, noisy labels": functools.partial(dense, epochs=2, share=0.4),
    "long, noisy labels": functools.partial(dense, epochs=8, share=0.4),
    "cosine": functools.partial(dense, epochs=5, schedule="cosine"),
    "small batches": functools.partial(dense, epochs=1, rate=0.00625, batch_size=4),
    "large batches": functools.partial(dense, epochs=30, rate=0.2, batch_size=500),
    "BatchNormalization": functools.partial(normalized, epochs=3),
    "fine-tuning": functools.partial(fine_tuned, epochs=5),
    "regression": functools.partial(regression, epochs=20),
    "short diffusion": functools.partial(generative, steps=500),
    "long diffusion": functools.partial(generative, steps=2_000),
}


def negative_log_likelihood(loss, has_classes):
    """Returns a loss as a negative log-likelihood, up to a constant for squared errors.

    For a squared error it is `log(loss) / 2`, that of a normal distribution whose
    variance is the squared error.
    """
    return loss if has_classes else np.log(loss) / 2
