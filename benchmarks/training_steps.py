"""Trainings to time on all backends: models, variants of averaging, and alternation."""

import importlib
import importlib.util
import os
import shutil
import tempfile
import time
import typing
import weakref

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from polyak_model import AverageMonitor, AverageSnapshots, ExponentialAverage, PolyakModel

BACKEND = keras.backend.backend()
TITLE = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[BACKEND]
TITLE += f" {importlib.import_module(BACKEND).__version__}"
DECAY = 0.999
ROUTES = ("average", "raw", "ensemble")
UNTIMED = 2  # Calls before the rounds: the first compiles, and the second may still allocate.


def make_mlp(width, depth=7, inputs=784):
    """Makes a dense net; width 1,226 with 8 matrices has ten million parameters."""
    hidden = [layers.Dense(width, activation="relu", use_bias=False) for _ in range(depth)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(10, use_bias=False)])


def make_narrow():
    """Makes 151 dense layers, 150 of width 32, with 302 small variables."""
    hidden = [layers.Dense(32, activation="relu") for _ in range(150)]
    return keras.Sequential([keras.Input((32,)), *hidden, layers.Dense(10)])


def make_transformer(width=128, blocks=4, words=1000, length=64):
    """Makes a small transformer encoder on token ids."""
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(words, width)(inputs)
    for _ in range(blocks):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, width // 4)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(width)(layers.Dense(4 * width, "relu")(x)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def make_efficientnet():
    """Makes an untrained EfficientNetB0 with 314 weights."""
    return keras.applications.EfficientNetB0(
        weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
    )


# Name: function that makes the model, batch size.
MODELS = {
    "tiny": (lambda: make_mlp(16, depth=1), 32),
    "narrow": (make_narrow, 8),
    "transformer": (make_transformer, 8),
    "efficientnet": (make_efficientnet, 8),
    "mlp-10M": (lambda: make_mlp(1226), 32),
    "mlp-100M": (lambda: make_mlp(4000), 32),
}


class HostAverage(keras.callbacks.Callback):
    """The common hand-written callback: the average is a list of NumPy arrays."""

    def on_train_begin(self, logs=None):
        self.average = self.model.get_weights()

    def on_train_batch_end(self, batch, logs=None):
        for i, w in enumerate(self.model.get_weights()):
            self.average[i] = DECAY * self.average[i] + (1 - DECAY) * w


class Snapshots(AverageSnapshots):
    """Snapshots in a folder that is removed with this callback."""

    def __init__(self):
        super().__init__(tempfile.mkdtemp())
        # A thread may still write, since not every loop here ends its training.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def bare(make, compile_model):
    model = make()
    compile_model(model)
    return model


def keras_ema(make, compile_model):
    model = make()
    compile_model(model, use_ema=True, ema_momentum=DECAY)
    return model


def wrapped(average=DECAY, **kwargs):
    """Returns a variant that wraps the model with these arguments."""

    def build(make, compile_model):
        model = PolyakModel(make(), average, **kwargs)
        compile_model(model)
        return model

    return build


class Variant(typing.NamedTuple):
    """Builds a compiled model, and a callback that averages or watches it."""

    build: typing.Callable
    callback: typing.Callable = keras.callbacks.Callback


VARIANTS = {
    "bare": Variant(bare),
    "PolyakModel": Variant(wrapped()),
    "two averages": Variant(wrapped({"short": 0.99, "long": DECAY})),
    "three averages": Variant(wrapped({"short": 0.9, "middle": 0.99, "long": DECAY})),
    "compensated": Variant(wrapped(compensated=True)),
    "update_every=16": Variant(wrapped(ExponentialAverage(DECAY, update_every=16))),
    "device=CPU:0": Variant(wrapped(device="CPU:0")),
    "report of three routes": Variant(wrapped(report=ROUTES)),
    "snapshots": Variant(wrapped(), Snapshots),
    "monitor": Variant(wrapped(), lambda: AverageMonitor(every=1)),
    "Keras use_ema": Variant(keras_ema),
    "host callback": Variant(bare, HostAverage),
}


def add_installed(peers):
    """Returns `VARIANTS` with those peers whose packages, of the same name, are installed."""
    modules = {name: name.replace("-", "_") for name in peers}
    return VARIANTS | {n: peers[n] for n in peers if importlib.util.find_spec(modules[n])}


def prepare_training(variant, make, batch_size, **settings):
    """Builds what a variant trains.

    Args:
        variant: A `Variant`.
        make: `() -> keras.Model`.
        batch_size: Int.
        **settings: Keyword arguments of `compile`.

    Returns:
        A tuple of the model, the callback, and a batch of random inputs and labels.
    """
    keras.utils.set_random_seed(0)

    def compile_model(model, **optimizer):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-4, **optimizer), loss, **settings)

    model = variant.build(make, compile_model)
    # The input of the inner model, since a wrapper has none before it is called.
    (specification,) = getattr(model, "raw_model", model).inputs
    return model, variant.callback(), draw_batches(specification, batch_size)


def draw_batches(specification, *sizes):
    """Returns random inputs and labels, of shapes that begin with these sizes."""
    generator = np.random.default_rng(0)
    draw = generator.random((*sizes, *specification.shape[1:]))
    whole = 100 if specification.dtype.startswith("int") else 1
    return (draw * whole).astype(specification.dtype), generator.integers(0, 10, sizes)


def begin_training(callback, model, steps):
    """Tells a callback what `fit` tells it before the first of so many steps."""
    callback.set_params({"epochs": 1, "steps": steps})
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_begin(0)


def take_turns(steps, rounds, seed):
    """Times functions in alternation, in an order shuffled in each round.

    In a fixed order, a function would always find the cache left by the same
    predecessor: after the floor, which evicts it, a tiny step takes 3 % longer.

    Args:
        steps: Dict from names to functions without arguments.
        rounds: Int, calls of each function after its first `UNTIMED`.
        seed: Int, seed of the order.

    Returns:
        A dict from a name to a dict of `first`, the seconds of the first call,
        and `steps`, a list of seconds.
    """
    times = {name: {"first": timed(step), "steps": []} for name, step in steps.items()}
    for step in steps.values():
        timed(step)
    names, generator = list(steps), np.random.default_rng(seed)
    for _ in range(rounds):
        for i in generator.permutation(len(names)):
            times[names[i]]["steps"].append(timed(steps[names[i]]))
    return times


def timed(step):
    """Returns the seconds that a call takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
