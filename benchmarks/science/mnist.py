"""Shared parts of the MNIST experiments: images, labels, the net, seeds, means and errors."""

import argparse
import functools
import json
import math
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from polyak_model.cli.demo.images import load_images, split

CLASSES = 10
BATCH_SIZE = 32
MOMENTUM = 0.9
METRICS = {"accuracy": "accuracy, %", "loss": "NLL"}


@functools.cache
def images():
    """Returns 5,000 MNIST images and their labels."""
    return load_images()


def load(seed, share=0.0, size=None):
    """Splits the images and randomizes a fraction of the training labels.

    Args:
        seed: Int, seed of the split and of the random labels.
        share: Float in [0, 1], fraction of the training labels. Held-out labels
            stay true.
        size: Int, number of images, training and held-out. Defaults to None: all.

    Returns:
        Tuple of the training `(x, y)` and the held-out `(x, y)`, a fifth of all.
    """
    x, y = images()
    # The images are sorted by class: regular spacing takes equally many of each.
    chosen = np.arange(len(x)) if size is None else np.arange(size) * len(x) // size
    (x, y), held_out = split(x[chosen], y[chosen], seed)
    return (x, random_labels(y, share, seed)), held_out


def random_labels(y, share, seed, classes=CLASSES):
    """Replaces a fraction of the labels by uniformly random ones.

    With ten classes, a tenth of the random labels is correct by chance.

    Args:
        y: Integer labels.
        share: Float in [0, 1].
        seed: Int.
        classes: Int, number of classes.

    Returns:
        An array of labels; `y` does not change.

    Reference:
        Zhang et al. 2017, Understanding deep learning requires rethinking
        generalization, section 2.1 (partially corrupted labels).
    """
    # `split` uses the seed alone, so this is an independent stream.
    generator = np.random.default_rng([seed, 1])
    hit = generator.permutation(len(y))[: round(share * len(y))]
    labels = y.copy()
    labels[hit] = generator.integers(classes, size=len(hit))
    return labels


def steps_per_epoch(examples):
    """Returns the number of optimizer steps per epoch."""
    return math.ceil(examples / BATCH_SIZE)


def build_model(schedule, rate, steps, seed, widths=(256, 128)):
    """Seeds Keras, then builds and compiles a small dense net; equal seeds give equal iterates.

    Args:
        schedule: `"constant"`, or `"cosine"` from `rate` to 0.
        rate: Float, the learning rate of SGD with momentum at the first step.
        steps: Int, optimizer steps until the cosine reaches 0.
        seed: Int, seed of the initial weights and the order of the examples.
        widths: Ints, the units of the hidden layers. Defaults to `(256, 128)`.

    Returns:
        A compiled `keras.Sequential`.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten()])
    for units in widths:
        model.add(layers.Dense(units, activation="relu"))
    model.add(layers.Dense(CLASSES, activation="softmax"))
    if schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(
        optimizer=keras.optimizers.SGD(rate, momentum=MOMENTUM),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # For such a small net, compiling with XLA takes longer than it saves.
        jit_compile=False,
    )
    return model


def mean_and_error(values):
    """Returns the mean over the first axis and its standard error.

        std(values, ddof=1) / sqrt(n)

    Args:
        values: Array-like; its first axis has length n, at least 2.
    """
    values = np.asarray(values, dtype="float64")
    return values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(values))


def metrics(logs, prefix=""):
    """Returns accuracy in per cent and negative log-likelihood from Keras logs.

    Args:
        logs: Dict from names to numbers or lists of numbers.
        prefix: Prefix of the names of the metrics. Defaults to `""`.

    Returns:
        List of the two.
    """
    return [100 * np.asarray(logs[f"{prefix}accuracy"]), np.asarray(logs[f"{prefix}loss"])]


def estimates(scores, sign="-"):
    """Formats means over seeds with their standard errors.

    Args:
        scores: Array of shape (seeds, 2): accuracy in per cent and negative
            log-likelihood.
        sign: `"+"` also shows the sign of positive means. Defaults to `"-"`.

    Returns:
        List of two strings.

    Example:

    >>> estimates([[94.0, 0.2], [96.0, 0.3]])
    ['95.00 ± 1.00', '0.2500 ± 0.0500']
    """
    columns = zip(*mean_and_error(scores), (2, 4), strict=True)
    return [f"{mean:{sign}.{n}f} ± {error:.{n}f}" for mean, error, n in columns]


def parser(description, seeds, plot):
    """Returns an argument parser with the options that the experiments share.

    Args:
        description: Description of the experiment.
        seeds: Int, default number of seeds.
        plot: Default path of the plot.
    """
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--seed", type=int, default=0, help="first seed")
    options.add_argument("--seeds", type=_several, default=seeds, help="consecutive seeds")
    options.add_argument("--images", type=int, help="number of images; default: all 5,000")
    options.add_argument("--plot", default=plot, metavar="PATH")
    options.add_argument("--json", metavar="PATH", help="write the scores of every run here")
    return options


def _several(text):
    if (seeds := int(text)) < 2:
        raise argparse.ArgumentTypeError("a standard error needs at least 2 seeds")
    return seeds


def with_progress(runs):
    """Yields each of the runs and prints progress to the standard error stream."""
    runs = list(runs)
    begin = time.monotonic()
    for done, run in enumerate(runs, start=1):
        yield run
        seconds = time.monotonic() - begin
        left = seconds / done * (len(runs) - done)
        print(f"{done}/{len(runs)}: {seconds:.0f} s, {left:.0f} s left", file=sys.stderr)


def write_json(path, content):
    """Writes JSON into a file, unless `path` is None."""
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
