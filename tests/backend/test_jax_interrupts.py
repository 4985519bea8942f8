"""Ctrl-C while a model computes on JAX, which destroys the state that a step is given."""

import os
import signal

import keras
import numpy as np
import pytest
from frameworks import BACKEND, call_at_each_run
from keras import layers
from models import assert_identical

from polyak_model import PolyakModel

if BACKEND == "jax":
    from polyak_model.backend.jax import interrupts, packing

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")
X, Y = np.ones((64, 6), "float32"), np.ones((64, 1), "float32")
CALLS = {
    "fit": lambda model: model.fit(X, Y, batch_size=4, verbose=0),
    "train_on_batch": lambda model: model.train_on_batch(X, Y),
    "evaluate": lambda model: model.evaluate(X, Y, batch_size=4, verbose=0),
    "evaluate in one pass": lambda model: model.evaluate(X, Y, batch_size=4, verbose=0),
    "predict": lambda model: model.predict(X, batch_size=4, verbose=0),
    "predict by the raw model": lambda model: model.predict(X, 4, 0, using="raw"),
}


class Interrupting(layers.Layer):
    """Presses Ctrl-C while a compiled step runs, once so many runs have passed."""

    def __init__(self):
        super().__init__()
        self.left = [-1]

    def call(self, inputs):
        call_at_each_run(self._run)
        return inputs

    def _run(self):
        self.left[0] -= 1
        if self.left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_loses_nothing(name, python_handles_interrupts, monkeypatch):
    monkeypatch.setattr(packing, "FEW", 2)
    layer = Interrupting()
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(4), layer, layers.Dense(1)])
    model = PolyakModel(inner, 0.9)
    model.compile("adam", "mse")
    if name == "evaluate in one pass":
        model.report = ("average", "raw", "ensemble")
    clone = next(each for each in model.average_model.layers if isinstance(each, Interrupting))
    call = CALLS[name]
    for each in (CALLS["fit"], call):
        each(model)  # What interrupts the first call, which compiles, may lose.
    steps = model.average_step
    before = [np.array(variable) for variable in model.variables]
    layer.left[0] = clone.left[0] = 1 if name == "train_on_batch" else 3
    with pytest.raises(KeyboardInterrupt):
        call(model)
    layer.left[0] = clone.left[0] = -1
    after = [np.array(variable) for variable in model.variables]
    if name in ("fit", "train_on_batch"):
        assert model.average_step == int(model.optimizer.iterations) > steps
    else:
        assert_identical(before, after)
    model.fit(X, Y, batch_size=4, verbose=0)
    assert np.isfinite(model.evaluate(X, Y, verbose=0)).all()


def test_the_error_of_a_step_that_has_destroyed_its_state_is_raised(monkeypatch):
    calls = []

    def failing(model, step):
        def call(state, data):
            calls.append(step(state, data))
            if len(calls) == 3:
                raise OSError("the disk is full")
            return calls[-1]

        return call

    monkeypatch.setattr(packing, "FEW", 2)
    monkeypatch.setattr(interrupts, "_keeping", failing)
    model = PolyakModel(keras.Sequential([keras.Input((6,)), layers.Dense(1)]), 0.9)
    model.compile("sgd", "mse")
    with pytest.raises(OSError, match="the disk is full"):
        model.fit(X, Y, batch_size=4, verbose=0)
