"""What the measurements on MNIST share: images, labels, the net, seeds, means and their errors."""

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
    """Returns 5,000 images of MNIST and their labels."""
    return load_images()


def load(seed, share=0.0, size=None):
    """Splits the images, and makes a share of the training labels random.

    Args:
        seed: Int, of the split and of the random labels.
        share: Float in [0, 1], of the training labels; those held out stay true.
        size: Int, how many images, training and held out together. Defaults to
            None: all.

    Returns:
        Tuple of the training `(x, y)` and of the held-out `(x, y)`, a fifth of all.
    """
    x, y = images()
    # The images are sorted by class: a regular choice has equally many of each.
    chosen = np.arange(len(x)) if size is None else np.arange(size) * len(x) // size
    (x, y), held_out = split(x[chosen], y[chosen], seed)
    return (x, random_labels(y, share, seed)), held_out


def random_labels(y, share, seed, classes=CLASSES):
    """Draws a share of the labels anew, uniformly from all classes.

    A tenth of the labels drawn from ten classes happens to be right.

    Args:
        y: Integer labels.
        share: Float in [0, 1].
        seed: Int.
        classes: Int, how many there are.

    Returns:
        An array of labels; `y` itself stays.

    Reference:
        Zhang et al. 2017, Understanding deep learning requires rethinking
        generalization, section 2.1 (partially corrupted labels).
    """
    # `split` draws from the seed alone: a stream of its own.
    generator = np.random.default_rng([seed, 1])
    hit = generator.permutation(len(y))[: round(share * len(y))]
    labels = y.copy()
    labels[hit] = generator.integers(classes, size=len(hit))
    return labels


def steps_per_epoch(examples):
    """Returns the optimizer steps of an epoch over so many examples."""
    return math.ceil(examples / BATCH_SIZE)


def build_model(schedule, rate, steps, seed):
    """Builds and compiles a small dense net, after seeding Keras: equal seeds, equal iterates.

    Args:
        schedule: `"constant"`, or `"cosine"`: from `rate` down to 0.
        rate: Float, the learning rate of SGD with momentum at the first step.
        steps: Int, optimizer steps until the cosine is at 0.
        seed: Int, of the initial weights and the order of the examples.

    Returns:
        A compiled `keras.Sequential`.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten()])
    for units in (256, 128):
        model.add(layers.Dense(units, activation="relu"))
    model.add(layers.Dense(CLASSES, activation="softmax"))
    if schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(
        optimizer=keras.optimizers.SGD(rate, momentum=MOMENTUM),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # Compiling with XLA takes longer than it saves on so small a net.
        jit_compile=False,
    )
    return model


def mean_and_error(values):
    """Returns the mean over the first axis and its standard error.

        std(values, ddof=1) / sqrt(n)

    Args:
        values: Array-like of n or more dimensions, n at least 2.
    """
    values = np.asarray(values, dtype="float64")
    return values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(values))


def metrics(logs, prefix=""):
    """Picks accuracy in per cent and negative log-likelihood from logs of Keras.

    Args:
        logs: Dict from names to numbers or lists of numbers.
        prefix: What the names of the metrics begin with. Defaults to nothing.

    Returns:
        List of the two.
    """
    return [100 * np.asarray(logs[f"{prefix}accuracy"]), np.asarray(logs[f"{prefix}loss"])]


def estimates(scores, sign="-"):
    """Writes means over seeds with their standard errors.

    Args:
        scores: Array of shape (seeds, 2): accuracy in per cent and negative
            log-likelihood.
        sign: `"+"` shows the sign of positive means, too. Defaults to `"-"`.

    Returns:
        List of two strings.

    Example:

    >>> estimates([[94.0, 0.2], [96.0, 0.3]])
    ['95.00 ± 1.00', '0.2500 ± 0.0500']
    """
    columns = zip(*mean_and_error(scores), (2, 4), strict=True)
    return [f"{mean:{sign}.{n}f} ± {error:.{n}f}" for mean, error, n in columns]


def parser(description, seeds, plot):
    """Returns an argument parser with the options that both measurements have.

    Args:
        description: What the measurement does.
        seeds: Int, how many seeds by default.
        plot: Name of the picture by default.
    """
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--seed", type=int, default=0, help="the first one")
    options.add_argument("--seeds", type=_several, default=seeds, help="how many, from there on")
    options.add_argument("--images", type=int, help="how many of the 5,000; default: all")
    options.add_argument("--plot", default=plot, metavar="PATH")
    options.add_argument("--json", metavar="PATH", help="where to write every run's numbers")
    return options


def _several(text):
    if (seeds := int(text)) < 2:
        raise argparse.ArgumentTypeError("a standard error needs at least 2 seeds")
    return seeds


def with_progress(runs):
    """Yields each of the runs, and tells on the standard error stream how far they are."""
    runs = list(runs)
    begin = time.monotonic()
    for done, run in enumerate(runs, start=1):
        yield run
        seconds = time.monotonic() - begin
        left = seconds / done * (len(runs) - done)
        print(f"{done}/{len(runs)}: {seconds:.0f} s, {left:.0f} s left", file=sys.stderr)


def write_json(path, content):
    """Writes numbers into a file, unless `path` is None."""
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
