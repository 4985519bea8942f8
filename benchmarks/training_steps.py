"""Training steps to time: models, variants of averaging, and alternation."""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from polyak_model import ExponentialAverage, PolyakModel

DECAY = 0.999
ROUTES = ("average", "raw", "ensemble")


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


class HostAverage:
    """The common hand-written callback: the average is a list of NumPy arrays."""

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
    """Returns a variant that wraps the model with these arguments."""

    def build(make, compile_model):
        model = PolyakModel(make(), average, **kwargs)
        compile_model(model)
        return model

    return build


VARIANTS = {
    "bare": bare,
    "PolyakModel": wrapped(),
    "two averages": wrapped({"short": 0.99, "long": DECAY}),
    "three averages": wrapped({"short": 0.9, "middle": 0.99, "long": DECAY}),
    "compensated": wrapped(compensated=True),
    "update_every=16": wrapped(ExponentialAverage(DECAY, update_every=16)),
    "device=CPU:0": wrapped(device="CPU:0"),
    "report of three routes": wrapped(report=ROUTES),
    "Keras use_ema": keras_ema,
    "host callback": bare,
}


def take_turns(steps, rounds, seed):
    """Times functions in alternation, in an order shuffled in each round.

    In a fixed order, a function would always find the cache left by the same
    predecessor: after the floor, which evicts it, a tiny step takes 3 % longer.

    Args:
        steps: Dict from names to functions without arguments.
        rounds: Int, calls of each function after its first two.
        seed: Int, seed of the order.

    Returns:
        A dict from a name to a dict of `first`, the seconds of the first call,
        and `steps`, a list of seconds.
    """
    times = {name: {"first": timed(step), "steps": []} for name, step in steps.items()}
    for step in steps.values():
        timed(step)  # The second call may still allocate.
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


def prepare(name, make, batch_size, jit, steps_per_execution=1):
    """Returns a function that runs training steps as `fit` does and waits for them.

    Args:
        name: One of `VARIANTS`.
        make: `() -> keras.Model`.
        batch_size: Int.
        jit: Bool. Whether to compile with XLA.
        steps_per_execution: Int, training steps per call. Defaults to 1.
    """
    import tensorflow as tf  # PyTorch's benchmark uses the models and the turns alone.

    keras.utils.set_random_seed(0)

    def compile_model(model, **kwargs):
        model.compile(
            keras.optimizers.SGD(1e-4, **kwargs),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit,
            steps_per_execution=steps_per_execution,
        )

    model = VARIANTS[name](make, compile_model)
    after = HostAverage(model) if name == "host callback" else lambda: None
    # The input of the inner model, since a wrapper has none before it is called.
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
    import tensorflow as tf

    average = tf.Variable(tf.zeros(parameters))
    w = tf.Variable(tf.ones(parameters))

    @tf.function
    def add():
        handle = average.handle
        tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=-1e-3, delta=w.read_value())
        return w[0]

    return lambda: float(add())
