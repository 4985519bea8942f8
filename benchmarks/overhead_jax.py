"""Training steps on JAX, for `overhead.py`.

Keras keeps the state of a training on JAX inside `fit`. So each variant trains in one
`fit` of its own, in a thread of its own, and a callback holds it at the beginning of a
batch until it is its turn. `Keras use_ema` fails in a second `fit` on JAX. `optax` is a
jitted `optax.incremental_update` of the trainable weights after each step, if Optax is
installed.

In each process a variant falls into one of a few levels, and stays there, because of
the threads of XLA: compare several processes, or set the environment variable
`XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`.
"""

import threading
import time

import jax
import keras
import numpy as np
from training_steps import (
    DECAY,
    UNTIMED,
    Variant,
    add_installed,
    bare,
    prepare_training,
    take_turns,
)


class Optax(keras.callbacks.Callback):
    """Averages the trainable weights with Optax."""

    def on_train_begin(self, logs=None):
        import optax

        def update(weights, average):
            return optax.incremental_update(weights, average, 1 - DECAY)

        self._update = jax.jit(update, donate_argnums=1)
        self.average = [jax.numpy.copy(w.value) for w in self.model.trainable_variables]

    def on_train_batch_end(self, batch, logs=None):
        # `self.model` would copy the state of the training to the variables.
        weights = list(self._model._jax_state["trainable_variables"])
        self.average = jax.block_until_ready(self._update(weights, self.average))


PEERS = {"optax": Variant(bare, Optax)}
VARIANTS = add_installed(PEERS)
del VARIANTS["device=CPU:0"]  # One compiled step cannot reach across devices.


class Turn(keras.callbacks.Callback):
    """Runs `fit` in a thread and holds it at each batch until it is called.

    Args:
        fit: `(callback) -> None`, calls `fit` with this callback as the last.
    """

    def __init__(self, fit):
        super().__init__()
        self.seconds = []
        self._fit, self._error = fit, None
        self._may_begin, self._has_ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            self._fit(self)
        except Exception as error:
            self._error = error
        self._has_ended.set()

    def __call__(self):
        if self._thread.ident is None:
            self._thread.start()
        self._may_begin.set()
        if not self._has_ended.wait(timeout=600) or self._error is not None:
            raise RuntimeError("The training of a variant has failed.") from self._error
        self._has_ended.clear()

    def on_train_batch_begin(self, batch, logs=None):
        if self.seconds:
            # Not at the end of the last batch: Keras fetches the next one in between.
            self._has_ended.set()
        self._may_begin.wait()
        self._may_begin.clear()
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # All results of a compiled step are ready at once.
        self.seconds.append(time.perf_counter() - self._begin)


def measure(make, batch_size, options):
    """Times the steps of all variants of a model, and the floor, in alternation.

    Returns:
        A dict from each variant, and `floor`, to a dict of `first`, the seconds of
        the first call, and `steps`, a list of seconds per training step.
    """
    k, calls = options.steps_per_execution, options.rounds + UNTIMED
    turns = {name: prepare(name, make, batch_size, k, calls) for name in options.variants}
    steps = {**turns, "floor": prepare_floor(make().count_params())}
    times = take_turns(steps, options.rounds, options.seed)
    for name, turn in turns.items():
        own = turn.seconds
        times[name] = {"first": own[0], "steps": [seconds / k for seconds in own[UNTIMED:]]}
    return times


def prepare(name, make, batch_size, steps_per_execution, calls):
    """Returns the `Turn` of a variant, which can be called so many times."""
    model, callback, batch = prepare_training(
        VARIANTS[name], make, batch_size, steps_per_execution=steps_per_execution
    )
    x, y = (np.concatenate([array] * calls * steps_per_execution) for array in batch)

    def fit(turn):
        model.fit(x, y, batch_size=batch_size, verbose=0, callbacks=[callback, turn])

    return Turn(fit)


def prepare_floor(parameters):
    """Returns a function that reads two buffers and writes one of them, in place."""
    add = jax.jit(lambda average, w: average + (1 - DECAY) * w, donate_argnums=0)
    buffers = [jax.numpy.zeros(parameters), jax.numpy.ones(parameters)]

    def step():
        buffers[0] = jax.block_until_ready(add(*buffers))

    return step
