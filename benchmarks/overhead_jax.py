"""Overhead of averaging per training step on JAX, inside `fit`, beside Keras and Optax.

    KERAS_BACKEND=jax python benchmarks/overhead_jax.py
    KERAS_BACKEND=jax python benchmarks/overhead_jax.py --models narrow --json overhead.json

Each variant trains a separate model in one `fit` of its own, in a thread of its own. A
callback holds each `fit` at the beginning of a batch until it is its turn, in an order
shuffled in each round, so that other load on the machine affects all of them alike. The
time of a step ends when its loss is known; all results of one compiled step are ready
at once. `use_ema` is Keras's, which fails in a second `fit` on JAX. `optax` is a jitted
`optax.incremental_update` of the trainable weights after each step, if Optax is
installed. For each variant, the table shows the median of its paired differences to the
bare model in the same round ± half their interquartile range, and that median relative
to the bare step. The first rounds, which compile, do not count.
"""

import argparse
import importlib.util
import json
import random
import statistics
import threading
import time

import jax
import keras
import numpy as np
from training_steps import DECAY, MODELS

from polyak_model import PolyakModel
from polyak_model.cli.tables import format_table

DECAYS = (DECAY, 0.99, 0.9999)
# Name: how many averages a PolyakModel keeps.
VARIANTS = {"bare": 0, "PolyakModel": 1, "two averages": 2, "three averages": 3, "use_ema": 0}
if importlib.util.find_spec("optax"):
    VARIANTS["optax"] = 0
_COMPILING = 2  # Rounds.


class Turn(keras.callbacks.Callback):
    """Holds a `fit` at each batch until it is called; calls `after` with the trained weights."""

    def __init__(self, after=None):
        super().__init__()
        self.after = after
        self.seconds = []
        self._may_begin, self._has_ended = threading.Event(), threading.Event()

    def __call__(self):
        self._may_begin.set()
        if not self._has_ended.wait(timeout=600):
            raise RuntimeError("A variant has failed; see its error above.")
        self._has_ended.clear()

    def on_train_batch_begin(self, batch, logs=None):
        self._may_begin.wait()
        self._may_begin.clear()
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if self.after is not None:
            self.after(list(self._model._jax_state["trainable_variables"]))
        float(logs["loss"])
        self.seconds.append(time.perf_counter() - self._begin)
        self._has_ended.set()


def main(arguments=None):
    options = parse(arguments)
    times = {name: measure(*MODELS[name], options.rounds) for name in options.models}
    print(f"JAX {jax.__version__}, Keras {keras.__version__}, {options.rounds} rounds\n")
    header = ["model", "variant", "extra, ms", "/ bare"]
    print(format_table(header, [row for name in times for row in rows(name, times[name])], left=2))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(times, file)
    return times


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["narrow", "mlp-10M"])
    parser.add_argument("--rounds", type=int, default=100, help="number of steps of each variant")
    parser.add_argument("--json", metavar="PATH", help="write all measurements here")
    return parser.parse_args(arguments)


def measure(make, batch_size, rounds):
    """Times the steps of all variants of a model in alternation, in seconds."""
    turns, threads = {}, []
    for name in VARIANTS:
        turns[name], fit = prepare(name, make, batch_size, rounds + _COMPILING)
        threads.append(threading.Thread(target=fit, daemon=True))
    for thread in threads:
        thread.start()
    order = random.Random(0)
    for _ in range(rounds + _COMPILING):
        for name in order.sample(list(turns), len(turns)):
            turns[name]()
    for thread in threads:
        thread.join()
    return {name: turn.seconds[_COMPILING:] for name, turn in turns.items()}


def prepare(name, make, batch_size, steps):
    """Returns the `Turn` of a variant, and a function that fits its model."""
    keras.utils.set_random_seed(0)
    model = inner = make()
    if VARIANTS[name]:
        averages = {f"average_{i}": decay for i, decay in enumerate(DECAYS[: VARIANTS[name]])}
        model = PolyakModel(inner, averages)
    settings = {"use_ema": True, "ema_momentum": DECAY} if name == "use_ema" else {}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-4, **settings), loss)
    turn = Turn(average_by_optax(inner) if name == "optax" else None)
    generator = np.random.default_rng(0)
    x = generator.random((batch_size, *inner.inputs[0].shape[1:]), dtype="float32")
    y = generator.integers(0, 10, batch_size)
    x, y = (np.concatenate([array] * steps) for array in (x, y))
    return turn, lambda: model.fit(x, y, batch_size=batch_size, verbose=0, callbacks=[turn])


def average_by_optax(model):
    """Returns a function that averages the weights that it is given."""
    import optax

    update = jax.jit(lambda w, a: optax.incremental_update(w, a, 1 - DECAY), donate_argnums=1)
    averages = [jax.numpy.copy(weight.value) for weight in model.trainable_variables]

    def after(weights):
        averages[:] = jax.block_until_ready(update(weights, averages))

    return after


def rows(model, times):
    """Yields the table row of each variant of a model."""
    bare = statistics.median(times["bare"])
    yield [model, "bare", f"({1e3 * bare:.2f})", "1.000"]
    for name in list(times)[1:]:
        differences = [own - other for own, other in zip(times[name], times["bare"], strict=True)]
        low, middle, high = statistics.quantiles(differences, n=4)
        extra = f"{1e3 * middle:.2f} ± {1e3 * (high - low) / 2:.2f}"
        yield [model, name, extra, f"{1 + middle / bare:.3f}"]


if __name__ == "__main__":
    main()
