"""The laws on several devices: two CPUs under one strategy, and two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import closed_forms
import keras
import numpy as np
import pytest
import strategy_worker
import tensorflow as tf
from keras import layers
from models import (
    CROSSENTROPY,
    LazyClassifier,
    assert_close,
    assert_identical,
    compile_classifier,
    make_classifier,
)

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage
from polyak_model.backend.tensorflow import update as moves

ROUTES = ("average", "raw", "ensemble")

# The oldest Keras reports the metrics of the first replica alone, of a bare model, too.
METRICS_OF_ALL_REPLICAS = pytest.mark.xfail(
    not hasattr(keras.Variable, "synchronization"),
    reason="this Keras does not sum metrics over replicas",
    strict=True,
)


def make_plain(seed=1):
    """Makes a net whose training does not depend on how a batch is divided."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="tanh", kernel_regularizer="l2"),
            layers.Dense(3, activation="softmax"),
        ]
    )


def wrapped(strategy, make=make_classifier, rule=0.9, optimizer="adam", settings=None, **kwargs):
    """Compiles and wraps a model in the scope of a strategy."""
    with strategy.scope():
        return PolyakModel(compile_classifier(make(), optimizer, **settings or {}), rule, **kwargs)


def fit(model, batches, **kwargs):
    """Fits on global batches of eight in their order, eight optimizer steps."""
    return model.fit(*batches, batch_size=8, verbose=0, shuffle=False, **kwargs)


def components(variable):
    """Returns the values that the replicas of this process hold of a variable."""
    value = variable.value
    held = value.values if isinstance(value, tf.distribute.DistributedValues) else [value]
    return [component.numpy().astype("float64") for component in held]


def reduced(model):
    """Returns the weights of a model, each the mean over the replicas."""
    return [np.mean(components(w), axis=0).astype("float32") for w in model.weights]


class MeanRecorder(keras.callbacks.Callback):
    """Records the reduced raw weights after each batch."""

    def __init__(self):
        super().__init__()
        self.iterates = []

    def on_train_batch_end(self, batch, logs=None):
        self.iterates.append(reduced(self.model.raw_model))


def assert_alike_on_all_replicas(model, expected=2):
    variables = [*model.shadow.first.model.weights, *model.shadow.weights]
    assert any(variable is model.shadow.step for variable in variables)
    for variable in variables:
        first, *others = components(variable)
        assert len(others) == expected - 1
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=variable.path)


@pytest.fixture(autouse=True)
def small_models_have_large_variables(monkeypatch):
    """Some variables then move by a compiled function, the others by other means."""
    monkeypatch.setattr(moves, "LARGE", 16)
    monkeypatch.setattr(moves, "HUGE", 16)


# The average


@pytest.mark.parametrize(
    ("name", "policy", "kwargs", "ulps"),
    [
        ("biased", "mixed_bfloat16", {}, 4),
        ("late-and-rare", "float32", {"non_trainable": "copy"}, 4),
        ("uniform", "float32", {"compensated": True}, 0.6),
    ],
)
def test_the_average_is_the_closed_form_on_every_replica(
    strategy, batches, name, policy, kwargs, ulps
):
    keras.config.set_dtype_policy(policy)
    rule = closed_forms.RULES[name]
    model = wrapped(strategy, rule=rule, **kwargs)
    start, recorder = reduced(model.raw_model), MeanRecorder()
    fit(model, batches, epochs=2, callbacks=[recorder])
    assert model.average_step == len(recorder.iterates) == 16
    assert_alike_on_all_replicas(model)
    expected = closed_forms.average(rule, start, recorder.iterates)
    if kwargs.get("non_trainable") == "copy":
        moved = 16 - (16 - rule.start_step) % rule.update_every
        expected[4:6] = recorder.iterates[moved - 1][4:6]
    assert_close(expected, model.average_model.get_weights(), ulps)


def test_the_statistics_of_replicas_differ_and_their_average_is_that_of_the_mean(strategy, batches):
    model = wrapped(strategy, rule=0.0)
    fit(model, batches)
    one, other = components(model.raw_model.layers[1].moving_mean)
    assert np.abs(one - other).min() > 1e-3
    assert_identical(reduced(model.raw_model), model.average_model.get_weights())


@pytest.mark.parametrize("kwargs", [{}, {"compensated": True}])
def test_two_devices_give_what_one_does_on_the_same_global_batches(strategy, batches, kwargs):
    models = []
    for scope in (strategy.scope, tf.distribute.get_strategy().scope):
        with scope():
            optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
            model = PolyakModel(compile_classifier(make_plain(), optimizer), 0.9, **kwargs)
        fit(model, batches, epochs=2)
        models.append(model)
    two, one = models
    assert two.average_step == one.average_step == 16
    assert_close(one.raw_model.get_weights(), two.raw_model.get_weights(), ulps=16)
    assert_close(one.average_model.get_weights(), two.average_model.get_weights(), ulps=16)


def test_the_wrapper_trains_exactly_as_the_bare_model_does(strategy, batches):
    trained, logs = [], []
    for wrap in (False, True):
        with strategy.scope():
            inner = compile_classifier(make_classifier())
        model = PolyakModel(inner, 0.9, inference="raw") if wrap else inner
        logs.append(fit(model, batches, epochs=2, validation_data=batches).history)
        trained.append([values for w in inner.weights for values in components(w)])
    assert_identical(*trained)
    assert logs[0] == logs[1]


def test_evaluating_while_the_average_mirrors_changes_nothing(strategy, batches):
    rule = ExponentialAverage(0.9, debias=False, start_step=4)
    models = [wrapped(strategy, rule=rule) for _ in range(2)]
    for model in models:
        for x, y in zip(*(np.split(part, 8) for part in batches), strict=True):
            model.train_on_batch(x, y)
            if model is models[0]:
                model.evaluate(x, y, verbose=0)
    assert models[0].average_step == 8
    assert_alike_on_all_replicas(models[0])
    # `average_model` would catch up first.
    assert_identical(*(model.shadow.first.model.get_weights() for model in models))


def test_before_the_first_step_the_average_mirrors_loaded_weights(strategy, batches):
    model = wrapped(strategy)
    loaded = make_classifier(seed=2).get_weights()
    model.raw_model.set_weights(loaded)
    x, _ = batches
    raw = model.predict(x, verbose=0, using="raw")
    np.testing.assert_array_equal(model.predict(x, verbose=0), raw)
    assert_identical(loaded, model.average_model.get_weights())


def test_resetting_and_applying_act_on_every_replica(strategy, batches):
    model = wrapped(strategy, compensated=True)
    fit(model, batches)
    model.apply_average()
    for w in model.raw_model.weights:
        assert_identical(*components(w))
    fit(model, batches)
    model.reset_average()
    assert model.average_step == 0
    for w, average in zip(model.raw_model.weights, model.shadow.first.model.weights, strict=True):
        assert_identical(components(w), components(average))
    fit(model, batches)
    assert model.average_step == 8
    assert_alike_on_all_replicas(model)


class Odd(layers.Layer):
    """Holds an integer and a mean that Keras reduces at each assignment."""

    def build(self, input_shape):
        self.positive = self.add_weight(shape=(), dtype="int32", trainable=False, name="positive")
        self.mean = self.add_weight(
            shape=(), initializer="zeros", trainable=False, aggregation="mean", name="mean"
        )

    def call(self, inputs, training=None):
        if training:
            self.positive.assign_add(keras.ops.sum(keras.ops.cast(inputs > 0.5, "int32")))
            self.mean.assign(keras.ops.mean(inputs))
        return inputs


def test_integers_and_variables_with_an_aggregation(strategy, batches):
    def make():
        return keras.Sequential([keras.Input((6,)), Odd(), layers.Dense(3, "softmax")])

    rule = UniformAverage(update_every=2)
    model = wrapped(strategy, make, rule)
    start, recorder = reduced(model.raw_model), MeanRecorder()
    fit(model, batches, callbacks=[recorder])
    assert_alike_on_all_replicas(model)
    raw, average = model.raw_model.layers[0], model.average_model.layers[0]
    one, other = components(raw.positive)
    assert one != other
    assert components(average.positive) == [one, one]
    expected = closed_forms.average(rule, start, recorder.iterates)
    assert_close(expected[1:], model.average_model.get_weights()[1:], ulps=4)


@pytest.mark.parametrize("inside", [True, False])
def test_a_training_loop_of_ones_own(strategy, batches, inside):
    with strategy.scope():
        model = PolyakModel(make_classifier(), UniformAverage())
    x, y = (np.split(part, 8) for part in batches)
    data = tf.data.Dataset.from_tensor_slices((np.stack(x), np.stack(y)))
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True))
            loss = tf.reduce_sum(loss) / 8
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        if inside:
            model.update_average()

    @tf.function
    def train_step(x, y):
        strategy.run(replica_step, args=(x, y))
        if not inside:
            model.update_average()

    start, iterates = reduced(model.raw_model), []
    for x, y in strategy.experimental_distribute_dataset(data.unbatch().batch(8)):
        train_step(x, y)
        iterates.append(reduced(model.raw_model))
    assert model.average_step == len(iterates) == 8
    assert_alike_on_all_replicas(model)
    expected = closed_forms.average(UniformAverage(), start, iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=4)


def test_a_step_in_eager_mode(strategy, batches):
    model = wrapped(strategy, settings={"run_eagerly": True})
    compiled = wrapped(strategy)
    for one in (model, compiled):
        fit(one, [part[:16] for part in batches])
    assert model.average_step == 2
    assert_alike_on_all_replicas(model)
    eager, graph = model.average_model.get_weights(), compiled.average_model.get_weights()
    assert_close(graph, eager, ulps=16)


def test_one_device_strategy(batches):
    model = wrapped(tf.distribute.OneDeviceStrategy("CPU:1"))
    start, recorder = reduced(model.raw_model), MeanRecorder()
    fit(model, batches, callbacks=[recorder])
    assert "CPU:1" in model.shadow.step.value.device
    expected = closed_forms.average(model.shadow.first.rule, start, recorder.iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=4)
    assert model.predict(batches[0], verbose=0, using="ensemble").shape == (64, 3)


# Routes


@METRICS_OF_ALL_REPLICAS
def test_every_route_answers_as_on_one_device(strategy, batches):
    x, y = batches
    model = wrapped(strategy, make_plain, report=ROUTES)
    fit(model, batches, epochs=2)
    alone = PolyakModel(compile_classifier(make_plain()), 0.9, report=ROUTES)
    alone.raw_model.set_weights(model.raw_model.get_weights())
    alone.update_average()
    alone.average_model.set_weights(model.average_model.get_weights())
    logs, expected = (
        one.evaluate(x, y, batch_size=8, verbose=0, return_dict=True) for one in (model, alone)
    )
    assert sorted(logs) == sorted(expected)
    assert len(logs) == 6
    for key, value in expected.items():
        assert logs[key] == pytest.approx(value, rel=1e-6), key
    assert len({logs[f"{prefix}loss"] for prefix in ("", "raw_", "ensemble_")}) == 3
    for route, prefix in zip(ROUTES, ("", "raw_", "ensemble_"), strict=True):
        single = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True, using=route)
        for key, value in single.items():
            assert value == pytest.approx(logs[prefix + key], rel=1e-6)
        np.testing.assert_allclose(
            model.predict(x, batch_size=8, verbose=0, using=route),
            alone.predict(x, batch_size=8, verbose=0, using=route),
            rtol=1e-6,
        )


@METRICS_OF_ALL_REPLICAS
def test_validation_reports_every_route_with_batch_normalization(strategy, batches):
    model = wrapped(strategy, report=ROUTES)
    history = fit(model, batches, validation_data=batches).history
    assert {"val_loss", "val_raw_loss", "val_ensemble_accuracy"} <= set(history)
    # The average answers alike on each replica, so that one device gives the same.
    alone = compile_classifier(make_classifier())
    alone.set_weights(model.average_model.get_weights())
    expected = alone.evaluate(*batches, verbose=0)
    assert history["val_loss"][0] == pytest.approx(expected[0], rel=1e-6)
    assert history["val_accuracy"][0] == pytest.approx(expected[1], rel=1e-6)


# How models come to be


@pytest.mark.parametrize("first", ["fit", "predict", "build"])
def test_a_model_built_by_its_first_batch(strategy, batches, first):
    x, y = batches
    model = wrapped(strategy, LazyClassifier, UniformAverage())
    if first == "predict":
        np.testing.assert_array_equal(
            model.predict(x, verbose=0), model.predict(x, verbose=0, using="raw")
        )
    elif first == "evaluate":
        model.evaluate(x, y, verbose=0)
    elif first == "train_on_batch":
        model.train_on_batch(x[:8], y[:8])
    elif first == "build":
        model.build((None, 6))
    steps = model.average_step
    fit(model, batches)
    assert model.average_step == steps + 8
    assert_alike_on_all_replicas(model)
    assert not np.array_equal(model.average_model.get_weights()[0], model.get_weights()[0])


def test_wrapping_and_compiling_outside_of_the_scope(strategy, batches):
    with strategy.scope():
        inner = make_plain()
    model = compile_classifier(PolyakModel(inner, 0.9))
    fit(model, batches)
    assert_alike_on_all_replicas(model)
    inside = wrapped(strategy, make_plain)
    fit(inside, batches)
    assert_identical(inside.average_model.get_weights(), model.average_model.get_weights())


@pytest.mark.parametrize("saved_under_strategy", [True, False])
def test_saving_under_a_strategy_and_loading_without_one_or_the_other_way(
    strategy, batches, tmp_path, saved_under_strategy
):
    none = tf.distribute.get_strategy()
    before, after = (strategy, none) if saved_under_strategy else (none, strategy)
    rule = UniformAverage(start_step=2)
    model = wrapped(before, make_plain, rule, compensated=True)
    fit(model, batches)
    model.save(tmp_path / "model.keras")
    with after.scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.average_step == 8
    assert_identical(model.get_weights(), loaded.get_weights())
    for one in (model, loaded):
        fit(one, batches)
    assert loaded.average_step == 16
    assert_close(model.average_model.get_weights(), loaded.average_model.get_weights(), ulps=16)
    assert_alike_on_all_replicas(loaded, expected=1 if saved_under_strategy else 2)


# Refusals


def test_a_model_made_outside_is_refused_inside_the_scope(strategy):
    inner = make_plain()
    with strategy.scope(), pytest.raises(ValueError, match="'sequential', created without a strat"):
        PolyakModel(inner)


def test_a_device_is_refused(strategy):
    with strategy.scope():
        inner = make_plain()
    with pytest.raises(ValueError, match="device='CPU:1'.*MirroredStrategy. Leave `device` out"):
        PolyakModel(inner, device="CPU:1")


def make_accumulating():
    return keras.optimizers.SGD(gradient_accumulation_steps=2)


UNTRAINABLE = {
    "accumulation": (
        lambda: {"optimizer": make_accumulating()},
        "Keras cannot accumulate gradients.*gradient_accumulation_steps=2",
    ),
    "scaled-accumulation": (
        lambda: {"optimizer": keras.optimizers.LossScaleOptimizer(make_accumulating())},
        "Keras cannot accumulate gradients.*gradient_accumulation_steps=2",
    ),
    "several-steps": (
        lambda: {"optimizer": "sgd", "steps_per_execution": 4},
        "several steps per execution.*steps_per_execution=4",
    ),
}


@pytest.mark.parametrize(("settings", "message"), UNTRAINABLE.values(), ids=UNTRAINABLE)
@pytest.mark.parametrize("compiled_before", [True, False])
def test_what_keras_cannot_train_is_refused(strategy, settings, message, compiled_before):
    with strategy.scope():
        inner = make_plain()
        if compiled_before:
            inner.compile(loss=CROSSENTROPY, **settings())
            with pytest.raises(ValueError, match=message):
                PolyakModel(inner)
        else:
            model = PolyakModel(inner)
            with pytest.raises(ValueError, match=message):
                model.compile(loss=CROSSENTROPY, **settings())
            assert not inner.compiled


def test_keras_fails_at_what_is_refused(strategy, batches):
    # When this test fails, Keras has learnt it, and the refusal can go.
    errors = {"accumulation": RuntimeError, "several-steps": tf.errors.InvalidArgumentError}
    for name, error in errors.items():
        with strategy.scope():
            inner = make_plain()
            inner.compile(loss=CROSSENTROPY, **UNTRAINABLE[name][0]())
        with pytest.raises(error):
            fit(inner, batches)


def test_accumulation_works_eagerly(strategy, batches):
    with strategy.scope():
        optimizer = make_accumulating()
    model = wrapped(strategy, make_plain, 0.9, optimizer, {"run_eagerly": True})
    fit(model, batches)
    assert model.average_step == 4
    assert_alike_on_all_replicas(model)


def test_an_optimizer_made_outside_is_refused(strategy):
    with strategy.scope():
        model = PolyakModel(make_plain())
    with pytest.raises(ValueError, match="Received: SGD, created under no strategy, for the model"):
        model.compile(keras.optimizers.SGD(), CROSSENTROPY)


# Two processes


def run_workers(folder):
    """Runs two workers on the loopback address until both are done; neither outlives the call."""
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{free.getsockname()[1]}" for free in (one, other)]
    tests = pathlib.Path(__file__).parents[1]
    helpers = tests / "helpers"
    workers, logs = [], []
    try:
        for index in range(2):
            task = {"type": "worker", "index": index}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
                "PYTHONPATH": os.pathsep.join([str(tests.parent), str(helpers)]),
                "CUDA_VISIBLE_DEVICES": "-1",
            }
            command = [sys.executable, str(helpers / "strategy_worker.py"), str(folder), str(index)]
            logs.append((folder / f"worker{index}.log").open("w+"))
            workers.append(
                subprocess.Popen(command, env=environment, stdout=logs[-1], stderr=logs[-1])
            )
        deadline = time.monotonic() + 300
        codes = [worker.wait(deadline - time.monotonic()) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for log in logs:
            log.close()
    ends = [(folder / f"worker{index}.log").read_text()[-3000:] for index in range(2)]
    assert codes == [0, 0], "\n".join(ends)
    return [dict(np.load(folder / f"worker{index}.npz")) for index in range(2)]


def weights_under(results, prefix):
    return [results[f"{prefix}{i}"] for i in range(len(results)) if f"{prefix}{i}" in results]


@pytest.mark.processes
def test_two_processes_train_as_one(batches, tmp_path):
    x, y = batches
    np.savez(tmp_path / "data.npz", x=x, y=y)
    chief, other = run_workers(tmp_path)
    assert chief.keys() == other.keys()
    rule = UniformAverage(start_step=2)

    for make in (strategy_worker.make_plain, make_classifier):
        name = make.__name__
        assert chief[f"{name}/step"] == other[f"{name}/step"] == 8
        averages = weights_under(chief, f"{name}/average")
        assert_identical(averages, weights_under(other, f"{name}/average"))

        start, *iterates = [
            [
                np.mean(pair, axis=0, dtype="float64").astype("float32")
                for pair in zip(
                    *(weights_under(one, f"{name}/iterate{i}/") for one in (chief, other)),
                    strict=True,
                )
            ]
            for i in range(9)
        ]
        expected = closed_forms.average(rule, start, iterates)
        assert len(averages) == len(expected)
        assert_close(expected, averages, ulps=4)

        loaded = keras.models.load_model(tmp_path / f"{name}.keras")
        assert loaded.average_step == 8
        assert_identical(averages, loaded.average_model.get_weights())
        if make is strategy_worker.make_plain:
            continue
        for route in ROUTES:
            answers = chief[f"{name}/{route}"]
            np.testing.assert_array_equal(answers, other[f"{name}/{route}"])
            # Each process answers its share with its own statistics of the raw model.
            if route == "average":
                np.testing.assert_allclose(
                    answers, loaded.predict(x, verbose=0, using=route), rtol=1e-5
                )
    for one in (chief, other):
        assert "Keras 3 cannot run `evaluate()` under a strategy of sev" in str(one["refusal"])

    alone = strategy_worker.wrap(strategy_worker.make_plain)
    strategy_worker.train(alone, x, y, tf.distribute.get_strategy())
    raw = weights_under(chief, "make_plain/iterate8/")
    assert_close(alone.raw_model.get_weights(), raw, ulps=16)
    averages = weights_under(chief, "make_plain/average")
    assert_close(alone.average_model.get_weights(), averages, ulps=16)
