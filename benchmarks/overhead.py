"""What averaging adds to a training step.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --models narrow mlp-10M --jit --json overhead.json

Every variant trains a model of its own on the same batch, from memory. They take
turns, step by step, in one process, so that whatever else the machine does hits
all alike. For each the table shows the median of its paired differences to the
bare model in the same round, with the half-width of their middle half; that as a
share of the bare step; and as a multiple of the floor, an in-place
`average += c * w` over as many parameters in one buffer, in turns with the rest.
The first step, which traces and compiles, is timed by itself.
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from polyak_model import ExponentialAverage, PolyakModel
from polyak_model.commands.text_tables import format_table

DECAY = 0.999
ROUTES = ("average", "raw", "ensemble")


def make_mlp(width, depth=7, inputs=784):
    """Makes a dense net; with a width of 1,226 and 8 matrices, ten million parameters."""
    hidden = [layers.Dense(width, activation="relu", use_bias=False) for _ in range(depth)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(10, use_bias=False)])


def make_narrow():
    """Makes 150 dense layers of width 32 and one more: 302 small variables."""
    hidden = [layers.Dense(32, activation="relu") for _ in range(150)]
    return keras.Sequential([keras.Input((32,)), *hidden, layers.Dense(10)])


def make_transformer(width=128, blocks=4, words=1000, length=64):
    """Makes a small transformer over words."""
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(words, width)(inputs)
    for _ in range(blocks):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, width // 4)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(width)(layers.Dense(4 * width, "relu")(x)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def make_efficientnet():
    """Makes EfficientNetB0, 314 weights, untrained."""
    return keras.applications.EfficientNetB0(
        weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
    )


# Name: how to make it, and the size of a batch.
MODELS = {
    "tiny": (lambda: make_mlp(16, depth=1), 32),
    "narrow": (make_narrow, 8),
    "transformer": (make_transformer, 8),
    "efficientnet": (make_efficientnet, 8),
    "mlp-10M": (lambda: make_mlp(1226), 32),
    "mlp-100M": (lambda: make_mlp(4000), 32),
}


class HostAverage:
    """The callback that people paste: the average is a list of NumPy arrays."""

    def __init__(self, model):
        self.model = model
        self.average = model.get_weights()

    def __call__(self):
        for i, w in enumerate(self.model.get_weights()):
            self.average[i] = DECAY * self.average[i] + (1 - DECAY) * w


def bare(make, compile_model):
    model = make()
    compile_model(model)
    return model


def keras_ema(make, compile_model):
    model = make()
    compile_model(model, use_ema=True, ema_momentum=DECAY)
    return model


def wrapped(average=DECAY, **kwargs):
    """Returns a variant: the model wrapped with these arguments."""

    def build(make, compile_model):
        model = PolyakModel(make(), average, **kwargs)
        compile_model(model)
        return model

    return build


VARIANTS = {
    "bare": bare,
    "PolyakModel": wrapped(),
    "compensated": wrapped(compensated=True),
    "update_every=16": wrapped(ExponentialAverage(DECAY, update_every=16)),
    "device=CPU:0": wrapped(device="CPU:0"),
    "report of three routes": wrapped(report=ROUTES),
    "Keras use_ema": keras_ema,
    "host callback": bare,
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = [name for name in MODELS if name != "mlp-100M"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=defaults)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=100, help="steps of each variant")
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    parser.add_argument("--json", metavar="PATH", help="where to write all times, in seconds")
    options = parser.parse_args(arguments)
    variants = list(dict.fromkeys(["bare", *options.variants]))
    times = {}
    for name in options.models:
        print(f"{name}: {len(variants)} variants", file=sys.stderr, flush=True)
        times[name] = measure(*MODELS[name], variants, options.rounds, options.jit)
        keras.utils.clear_session()
    print(f"{'XLA' if options.jit else 'plain graph'}, {options.rounds} rounds\n")
    header = ["model", "variant", "extra, ms", "of bare", "of floor", "first step, s", "of bare"]
    print(format_table(header, [row for name in times for row in rows(name, times[name])], left=2))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(times, file)
    return times


def measure(make, batch_size, variants, rounds, jit):
    """Times the steps of all variants in turns.

    Returns:
        A dict from a variant, or `floor`, to `first`, seconds, and `steps`, a
        list of seconds.
    """
    steps = {name: prepare(name, make, batch_size, jit) for name in variants}
    steps["floor"] = prepare_floor(make().count_params())
    times = {name: {"first": timed(step), "steps": []} for name, step in steps.items()}
    for step in steps.values():
        timed(step)  # The second one may still allocate.
    for _ in range(rounds):
        for name, step in steps.items():
            times[name]["steps"].append(timed(step))
    return times


def timed(step):
    """Returns how many seconds a call takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def prepare(name, make, batch_size, jit):
    """Returns a function that takes one training step, as `fit` does, and waits for it."""
    keras.utils.set_random_seed(0)

    def compile_model(model, **kwargs):
        optimizer = keras.optimizers.SGD(1e-4, **kwargs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, jit_compile=jit)

    model = VARIANTS[name](make, compile_model)
    after = HostAverage(model) if name == "host callback" else lambda: None
    # An inner model's input, since a wrapper tells its own only once it is called.
    specification = getattr(model, "raw_model", model).inputs[0]
    generator = np.random.default_rng(0)
    draw = generator.random((batch_size, *specification.shape[1:]))
    whole = 100 if specification.dtype.startswith("int") else 1
    batch = (draw * whole).astype(specification.dtype), generator.integers(0, 10, batch_size)
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    model.make_train_function()

    def step():
        logs = model.train_function(iterator)
        # Some versions of Keras wrap what they return.
        float(getattr(logs, "get_value", lambda: logs)()["loss"])
        after()

    return step


def prepare_floor(parameters):
    """Returns a function that reads two buffers and writes one of them, in place."""
    average = tf.Variable(tf.zeros(parameters))
    w = tf.Variable(tf.ones(parameters))

    @tf.function
    def add():
        handle = average.handle
        tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=-1e-3, delta=w.read_value())
        return w[0]

    return lambda: float(add())


def rows(model, times):
    """Yields the cells of each variant of a model."""
    bare_steps, floor = times["bare"]["steps"], statistics.median(times["floor"]["steps"])
    bare_median, bare_first = statistics.median(bare_steps), times["bare"]["first"]
    for name, own in times.items():
        first = [f"{own['first']:.2f}", f"{own['first'] / bare_first:.2f}"]
        if name in ("bare", "floor"):
            middle = statistics.median(own["steps"])
            cell = f"({1e3 * middle:.2f})"
        else:
            extra = [a - b for a, b in zip(own["steps"], bare_steps, strict=True)]
            low, middle, high = statistics.quantiles(extra, n=4)
            cell = f"{1e3 * middle:.2f} ± {1e3 * (high - low) / 2:.2f}"
        yield [model, name, cell, f"{middle / bare_median:.3f}", f"{middle / floor:.2f}", *first]


if __name__ == "__main__":
    main()
