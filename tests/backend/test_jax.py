"""What is particular to JAX: functions of the state, compiled once for equal functions."""

import concurrent.futures
import importlib
import importlib.util
import threading

import keras
import numpy as np
import pytest
from closed_forms import average
from frameworks import BACKEND
from models import (
    CROSSENTROPY,
    assert_close,
    assert_identical,
    compile_classifier,
    make_classifier,
    trained,
)

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")


def values(variables):
    return [variable.value for variable in variables]


@pytest.mark.parametrize(("package", "version"), [("jax", "0.7.2"), ("keras", "3.11.0")])
def test_versions_that_cannot_train_are_refused(package, version, monkeypatch):
    import polyak_model.backend.jax

    monkeypatch.setattr(importlib.import_module(package), "__version__", version)
    message = f"On JAX polyak_model needs {package} .* or later. Received: {version}"
    with pytest.raises(ImportError, match=message):
        importlib.reload(polyak_model.backend.jax)


def test_a_device_of_its_own_for_the_average_is_refused():
    with pytest.raises(ValueError, match="`device` must be None on JAX.*use keras.distribution"):
        PolyakModel(make_classifier(), device="cpu:0")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_rule_set_between_fits_acts_although_equal_methods_share_a_trace(run_eagerly, batches):
    inner = compile_classifier(make_classifier(), run_eagerly=run_eagerly)
    model = PolyakModel(inner, ExponentialAverage(0.9))
    model.fit(*batches, batch_size=16, verbose=0)
    model.rule = ExponentialAverage(0.0)
    model.fit(*batches, batch_size=16, verbose=0)
    assert_identical(inner.get_weights(), model.average_model.get_weights())


def test_an_evaluation_after_compiling_again_has_the_new_loss(batches):
    model = PolyakModel(compile_classifier(make_classifier()))
    for loss in (CROSSENTROPY, keras.losses.SparseCategoricalCrossentropy(ignore_class=0)):
        model.compile("sgd", loss)
        received, _ = model.evaluate(*batches, verbose=0)
        bare = compile_classifier(make_classifier())
        bare.compile("sgd", loss)
        expected, _ = bare.evaluate(*batches, verbose=0)
        assert received == pytest.approx(expected, rel=1e-6)


def test_no_two_variables_hold_one_array_since_a_step_donates_its_arrays(batches):
    model = trained(batches, compensated=True)
    for change in (model.reset_average, model.apply_average, model.update_average):
        change()
        model.fit(*batches, batch_size=32, verbose=0)
        arrays = values([*model.variables, *model.optimizer.variables])
        assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


def test_weights_and_averages_are_current_in_the_middle_of_an_epoch(batches):
    found = []

    class Reader(keras.callbacks.Callback):
        # `self.model` would write the state to the variables by itself.
        def on_train_batch_end(self, batch, logs=None):
            found.append((model.average_step, model.average_model.get_weights()))
            iterates.append(model.raw_model.get_weights())

    model, iterates = PolyakModel(compile_classifier(make_classifier()), UniformAverage()), []
    start = model.raw_model.get_weights()
    model.fit(*batches, batch_size=16, verbose=0, callbacks=[Reader()])
    assert [step for step, _ in found] == [1, 2, 3, 4]
    for step, received in found:
        assert_close(average(model.rule, start, iterates[:step]), received, ulps=4)


@pytest.mark.parametrize("compensated", [False, True])
def test_a_stateless_loop_averages_as_fit_does(compensated, batches):
    import jax

    def make():
        inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, activation="softmax")])
        keras.utils.set_random_seed(2)
        inner.set_weights([np.random.normal(size=w.shape) for w in inner.get_weights()])
        compile_classifier(inner, keras.optimizers.SGD(0.1))
        return PolyakModel(inner, UniformAverage(), compensated=compensated)

    fitted, model = make(), make()
    fitted.fit(*batches, batch_size=16, shuffle=False, verbose=0)
    model.optimizer.build(model.trainable_variables)

    def loss_of(trainable, state, x, y):
        outputs, _ = model.raw_model.stateless_call(trainable, (), x, training=True)
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, outputs))

    @jax.jit
    def step(trainable, state, optimizer, x, y):
        gradients = jax.grad(loss_of)(trainable, state, x, y)
        trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
        return trainable, model.stateless_update_average(trainable, state), optimizer

    groups = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
    state = tuple(map(values, groups))
    for start in range(0, 64, 16):
        state = step(*state, *(array[start : start + 16] for array in batches))
    for group, changed in zip(groups, state, strict=True):
        for variable, value in zip(group, changed, strict=True):
            variable.assign(value)
    assert model.average_step == 4
    assert_close(fitted.average_model.get_weights(), model.average_model.get_weights(), ulps=4)


@pytest.mark.parametrize(
    ("format", "named"),
    [
        ("tf_saved_model", "requires the tensorflow module"),
        ("onnx", "requires the jax2onnx module"),
        ("litert", "requires TensorFlow or PyTorch backend"),
        ("torch", "requires PyTorch backend"),
    ],
)
def test_an_export_that_needs_another_package_is_refused_by_name(format, named, tmp_path):
    if any(map(importlib.util.find_spec, ("tensorflow", "jax2onnx"))):
        pytest.skip("The package is installed.")
    model = PolyakModel(make_classifier())
    with pytest.raises((ImportError, ValueError), match=named):
        model.export(tmp_path / "artifact", format=format, verbose=False)
    assert not any(tmp_path.iterdir())


def test_a_model_built_by_its_first_training_step_is_refused(batches):
    class Parts(keras.Model):
        def train_step(self, state, data):
            raise NotImplementedError

    model = PolyakModel(Parts())
    model.compile("sgd")
    with pytest.raises(ValueError, match="Build its parts first"):
        model.fit(*batches, verbose=0)


EVENTS = ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"]
EVENTS += ["on_test_begin", "on_test_end", "on_epoch_end", "on_train_end"]
USES = {
    "predict": lambda model, x, y: model.predict(x, verbose=0),
    "raw": lambda model, x, y: model.predict(x, using="raw", verbose=0),
    "evaluate": lambda model, x, y: model.evaluate(x, y, verbose=0, return_dict=True),
    "weights": lambda model, x, y: model.average_model.get_weights(),
    "step": lambda model, x, y: model.average_step,
}


class Waiting(keras.callbacks.Callback):
    """Waits for a thread that uses the model, and does the same once more itself."""

    def __init__(self, model, use):
        super().__init__()
        self.wrapper, self.use = model, use
        self.pairs = []
        for event in EVENTS:
            setattr(self, event, lambda *args, **kwargs: self.wait())

    def wait(self):
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            beside = thread.submit(self.use, self.wrapper).result(timeout=60)
        self.pairs.append((beside, self.use(self.wrapper)))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_callback_may_wait_for_a_thread_that_uses_the_model(use, batches):
    def fit(*callbacks):
        keras.utils.set_random_seed(3)
        model = PolyakModel(compile_classifier(make_classifier()), UniformAverage())
        waiting = [make(model, lambda model: use(model, *batches)) for make in callbacks]
        history = model.fit(
            *batches, batch_size=16, epochs=2, verbose=0, validation_data=batches, callbacks=waiting
        ).history
        return model, history, waiting

    expected, bare_history, _ = fit()
    model, history, (waiting,) = fit(Waiting)
    assert history == bare_history
    assert_identical(expected.get_weights(), model.get_weights())
    assert len(waiting.pairs) == 2 * (4 * 2 + 4) + 2
    for beside, alone in waiting.pairs:
        np.testing.assert_equal(beside, alone)


def test_a_callback_may_wait_for_a_thread_that_saves(batches, tmp_path):
    def save(model):
        path = tmp_path / f"{model.average_step}.weights.h5"
        model.save_weights(path)
        return path

    model = PolyakModel(compile_classifier(make_classifier()), UniformAverage())
    waiting = Waiting(model, save)
    model.fit(*batches, batch_size=16, verbose=0, callbacks=[waiting])
    loaded = PolyakModel(compile_classifier(make_classifier()), UniformAverage())
    for beside, _ in waiting.pairs:
        loaded.load_weights(beside)
        assert beside.name == f"{loaded.average_step}.weights.h5"
    assert_identical(model.get_weights(), loaded.get_weights())


def test_threads_are_let_in_between_batches_and_a_failing_callback_leaves_nobody_waiting(batches):
    steps, done = [], threading.Event()

    class Fail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 12:
                raise RuntimeError("at batch 12")

    model = PolyakModel(compile_classifier(make_classifier()), UniformAverage())

    def read():
        while not done.is_set():
            steps.append(model.average_step)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read)
        try:
            with pytest.raises(RuntimeError, match="at batch 12"):
                model.fit(*batches, batch_size=4, verbose=0, callbacks=[Fail()])
        finally:
            done.set()
        reading.result(timeout=60)
    assert steps == sorted(steps)
    assert len({*steps}) > 5
    model.fit(*batches, batch_size=4, verbose=0)
    assert model.average_step == 13 + 16
