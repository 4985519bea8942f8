"""Stochastic gradient descent on many replicas at once, averaged by this package.

Shared by the scripts in this folder. `polyak_model.backend.update` moves the averages
with the weights of `polyak_model` rules, in one compiled loop with the descent.
"""

import os
import sys
import types

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from polyak_model import backend

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def weights(rule, steps):
    """Returns the weight of the newest iterate at each of the first `steps` steps.

    Args:
        rule: A `polyak_model` rule.
        steps: Int.
    """
    step = np.arange(1, steps + 1)
    return np.where(rule.moves_at(step), rule.weight(step, rule.update_every), 0.0)


def trajectories(take_step, start, rules, steps, every, label=None):
    """Runs the descent and yields the iterate and its averages at regular steps.

    Args:
        take_step: Callable from the iterate and the step, an int64 tensor that
            starts at 1, to the next iterate.
        start: Array, the weights before the first step.
        rules: List of `polyak_model` rules, one per average.
        steps: Int, total number of steps, a multiple of `every`.
        every: Int, steps between two reports.
        label: String, name of this run in the progress line, or None for no
            progress line.

    Yields:
        Tuples of the step, the iterate and the list of the averages.
    """
    start = np.asarray(start, "float64")
    iterate = tf.Variable(start)
    averages = [tf.Variable(start) for _ in rules]

    @tf.function(jit_compile=True)
    def descend(first, schedule):
        for i in tf.range(tf.shape(schedule)[0]):
            iterate.assign(take_step(iterate.value(), first + tf.cast(i, "int64")))
            for j, average in enumerate(averages):
                pair = types.SimpleNamespace(target=average, raw=iterate, residual=None)
                backend.update([([pair], schedule[i, j])])

    schedule = np.stack([weights(rule, steps) for rule in rules], axis=1)
    descend = descend.get_concrete_function(
        tf.TensorSpec([], "int64"), tf.TensorSpec([every, len(rules)], "float64")
    )
    for done in range(0, steps, every):
        descend(tf.constant(done + 1, "int64"), tf.constant(schedule[done : done + every]))
        if label:
            end = "\n" if done + every == steps else ""
            print(f"\r{label}: step {done + every:,}", end=end, file=sys.stderr, flush=True)
        yield done + every, iterate.numpy(), [average.numpy() for average in averages]


def style(panel, title, xlabel):
    """Applies the common style to a panel.

    Args:
        panel: A matplotlib `Axes`.
        title: String.
        xlabel: String.
    """
    panel.set_title(title, loc="left", fontweight="bold")
    panel.set_xlabel(xlabel)
    panel.grid(axis="y", color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
