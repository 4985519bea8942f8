"""Every optimizer that Keras ships trains as it does bare, or is refused with the reason."""

import closed_forms
import keras
import numpy as np
import pytest
from keras import layers, optimizers
from models import (
    CROSSENTROPY,
    Recorder,
    assert_close,
    assert_identical,
    assert_trains_as_bare,
    make_classifier,
)

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage

KINDS = {
    name: kind
    for name, kind in sorted(vars(optimizers).items())
    if isinstance(kind, type)
    and issubclass(kind, optimizers.Optimizer)
    and kind is not optimizers.Optimizer
}
# These hold others inside and have tests of their own, or are refused.
SPECIAL = {"LossScaleOptimizer", "MultiOptimizer", "ScheduleFreeAdamW"}
PLAIN = sorted(KINDS.keys() - SPECIAL)

needs_multi_optimizer = pytest.mark.skipif(
    "MultiOptimizer" not in KINDS, reason="this Keras has no MultiOptimizer"
)
needs_schedule_free = pytest.mark.skipif(
    "ScheduleFreeAdamW" not in KINDS, reason="this Keras has no ScheduleFreeAdamW"
)


def make_with(make_optimizer):
    """Returns a function that makes a small net compiled with a fresh optimizer."""

    def make():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(5, activation="relu", name="first"),
                layers.Dropout(0.3),
                layers.Dense(3, activation="softmax", name="last"),
            ]
        )
        # A few eager steps take less time than tracing one; the laws are tested in both.
        model.compile(make_optimizer(), CROSSENTROPY, run_eagerly=True)
        return model

    return make


def fit(batches, steps=4):
    """Returns a function that trains for some steps, in two epochs."""

    def train(model, recorder):
        size = 2 * 64 // steps
        model.fit(*batches, batch_size=size, epochs=2, verbose=0, callbacks=[recorder])

    return train


def test_every_optimizer_of_this_keras_is_known():
    assert {"SGD", "Adam", "AdamW", "Adafactor", "Lion", "RMSprop"} <= set(PLAIN)
    assert "LossScaleOptimizer" in KINDS


@pytest.mark.parametrize("name", PLAIN)
def test_every_optimizer_trains_as_it_does_bare_with_a_schedule_weight_decay_and_clipping(
    name, batches
):
    def make_optimizer():
        rate = optimizers.schedules.ExponentialDecay(0.02, decay_steps=3, decay_rate=0.5)
        return KINDS[name](rate, weight_decay=0.01, clipnorm=0.1)

    assert_trains_as_bare(fit(batches), make_with(make_optimizer), ExponentialAverage(0.9))


def constant_rate():
    return 0.5


SCHEDULES = {
    "cosine": lambda: optimizers.schedules.CosineDecay(
        0.0, decay_steps=6, warmup_target=0.5, warmup_steps=2
    ),
    "restarts": lambda: optimizers.schedules.CosineDecayRestarts(0.5, first_decay_steps=3),
    "inverse-time": lambda: optimizers.schedules.InverseTimeDecay(0.5, 2, 0.5),
    "piecewise": lambda: optimizers.schedules.PiecewiseConstantDecay([3, 5], [0.5, 0.1, 0.02]),
    "polynomial": lambda: optimizers.schedules.PolynomialDecay(0.5, 5),
    "a-function": lambda: constant_rate,
}


@pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_trains_as_it_does_bare(make_schedule, batches):
    make = make_with(lambda: optimizers.SGD(make_schedule(), momentum=0.9, nesterov=True))
    assert_trains_as_bare(fit(batches, steps=8), make)  # As many as change the rates.


@pytest.mark.parametrize("clipping", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_every_clipping_trains_as_it_does_bare(clipping, batches):
    make = make_with(lambda: optimizers.Adam(0.01, **{clipping: 0.01}))
    assert_trains_as_bare(fit(batches), make)


def test_an_optimizer_given_by_name_or_config_trains_as_it_does_bare(batches):
    config = {"class_name": "SGD", "config": {"learning_rate": 0.1, "momentum": 0.9}}
    for identifier in ("rmsprop", config):
        assert_trains_as_bare(fit(batches), make_with(lambda identifier=identifier: identifier))


def test_a_loss_scaling_optimizer_of_ones_own_trains_as_it_does_bare(batches):
    def make_optimizer():
        return optimizers.LossScaleOptimizer(optimizers.Adam(0.01), initial_scale=1024.0)

    assert_trains_as_bare(fit(batches), make_with(make_optimizer))


# Several optimizers in one


def make_multi_optimizer(**kwargs):
    """Makes one that trains the first layer with Adam and the rest with SGD."""
    adam, sgd = optimizers.Adam(0.01, **kwargs), optimizers.SGD(0.1, **kwargs)
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(sgd, {"first/.*": adam}))


@needs_multi_optimizer
def test_several_optimizers_in_one_train_as_they_do_bare(batches):
    assert_trains_as_bare(fit(batches), make_with(make_multi_optimizer))


def make_chosen_optimizer(**kwargs):
    """Makes the same with a function in place of the map, so that it is empty until it is built."""
    adam, sgd = optimizers.Adam(0.01, **kwargs), optimizers.SGD(0.1, **kwargs)

    def choose(variable):
        return adam if "first" in variable.path else sgd

    return optimizers.MultiOptimizer(choose)


@needs_multi_optimizer
def test_several_optimizers_chosen_by_a_function_train_as_they_do_bare(batches):
    assert_trains_as_bare(fit(batches), make_with(make_chosen_optimizer))


@needs_multi_optimizer
@pytest.mark.parametrize("make_optimizer", [make_multi_optimizer, make_chosen_optimizer])
def test_the_average_rests_while_the_optimizers_in_one_accumulate_gradients(
    make_optimizer, batches
):
    inner = make_with(lambda: make_optimizer(gradient_accumulation_steps=4))()
    model = PolyakModel(inner, UniformAverage())
    recorder = Recorder(inner)
    model.fit(*batches, batch_size=4, verbose=0, callbacks=[recorder])
    iterates = recorder.weights[3::4]
    assert model.average_step == len(iterates) == 4
    expected = closed_forms.average(UniformAverage(), iterates[0], iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=4)


# Refused


def assert_refused(optimizer, message):
    """Checks that an optimizer is refused before the raw model is compiled, and when it is."""
    model = PolyakModel(make_classifier())
    with pytest.raises(ValueError, match=message):
        model.compile(optimizer, CROSSENTROPY)
    assert not model.raw_model.compiled
    with pytest.raises(ValueError, match=message):
        model.compile(loss=CROSSENTROPY, optimizer=optimizer)
    inner = make_classifier()
    inner.compile(optimizer, CROSSENTROPY)
    with pytest.raises(ValueError, match=message):
        PolyakModel(inner)


@needs_schedule_free
def test_an_optimizer_that_keeps_the_iterates_to_itself_is_refused():
    message = "Received: ScheduleFreeAdamW, which.*AdamW and keep PolyakModel, or keep the opt"
    for optimizer in (
        KINDS["ScheduleFreeAdamW"](),
        "schedulefreeadamw",
        {"class_name": "ScheduleFreeAdamW", "config": {}},
        optimizers.LossScaleOptimizer(KINDS["ScheduleFreeAdamW"]()),
    ):
        assert_refused(optimizer, message)


@needs_schedule_free
def test_a_subclass_of_an_optimizer_that_averages_is_refused_too():
    class Own(KINDS["ScheduleFreeAdamW"]):
        pass

    assert_refused(Own(), "Received: ScheduleFreeAdamW")


def test_a_config_of_an_optimizer_that_averages_is_refused():
    averaging = optimizers.SGD(use_ema=True, ema_momentum=0.9)
    message = r"Received: SGD\(use_ema=True, ema_momentum=0.9\). Remove use_ema=True"
    assert_refused(optimizers.serialize(averaging), message)
    assert_refused(optimizers.serialize(optimizers.LossScaleOptimizer(averaging)), message)
    assert_refused(
        {"class_name": "SGD", "config": {"use_ema": True}}, "SGD.use_ema=True, ema_momentum=0.99"
    )


@needs_multi_optimizer
def test_an_optimizer_that_averages_among_several_in_one_is_refused():
    optimizer = make_multi_optimizer(use_ema=True, ema_momentum=0.8)
    message = r"Received: (SGD|Adam)\(use_ema=True, ema_momentum=0.8\)"
    assert_refused(optimizer, message)
    assert_refused(optimizers.serialize(optimizer), message)


def test_a_config_without_an_average_is_compiled(batches):
    model = PolyakModel(make_classifier())
    model.compile(optimizers.serialize(optimizers.SGD(0.5)), CROSSENTROPY)
    assert float(np.asarray(model.optimizer.learning_rate)) == 0.5


def set_use_ema(model, optimizer):
    model.optimizer.use_ema = True


def replace(model, optimizer):
    model.optimizer = optimizer


def replace_in_the_raw_model(model, optimizer):
    model.raw_model.optimizer = optimizer


def choose_in_training(model, optimizer):
    if "MultiOptimizer" not in KINDS:
        pytest.skip("this Keras has no MultiOptimizer")
    model.compile(make_chosen_optimizer(use_ema=True), CROSSENTROPY)


def keep_beside(model, optimizer):
    model.raw_model.another_optimizer = optimizer


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize(
    "change",
    [set_use_ema, replace, replace_in_the_raw_model, choose_in_training, keep_beside],
)
def test_an_optimizer_that_averages_is_refused_before_training_however_it_was_set(
    change, trained_before, batches
):
    model = PolyakModel(make_with(lambda: optimizers.SGD(0.1))())
    if trained_before:
        model.fit(*batches, verbose=0)
    start, step = model.raw_model.get_weights(), model.average_step
    change(model, optimizers.SGD(0.1, use_ema=True))
    with pytest.raises(ValueError, match="must not average by itself"):
        model.fit(*batches, verbose=0)
    assert_identical(start, model.raw_model.get_weights())
    assert model.average_step == step
    model.compile("sgd", CROSSENTROPY)
    if change is not keep_beside:
        model.fit(*batches, batch_size=16, verbose=0)
        assert model.average_step == step + 4


@pytest.mark.parametrize("change", [replace, replace_in_the_raw_model])
def test_an_optimizer_that_replaces_another_trains(change, batches):
    model = PolyakModel(make_with(lambda: optimizers.SGD(0.1))(), UniformAverage())
    model.fit(*batches, batch_size=16, verbose=0)
    change(model, optimizers.Adam(0.01))
    model.fit(*batches, batch_size=16, verbose=0)
    assert model.optimizer is model.raw_model.optimizer
    assert type(model.optimizer).__name__ == "Adam"
    assert int(model.optimizer.iterations) == 4
    assert model.average_step == 8


def test_an_eager_step_of_keras_does_not_search_the_model_for_optimizers(batches, monkeypatch):
    model = PolyakModel(make_with(lambda: optimizers.SGD(0.1))(), UniformAverage())
    model.compile("sgd", CROSSENTROPY, run_eagerly=True)
    x, y = (values[:4] for values in batches)
    model.train_on_batch(x, y)

    def search(model):
        pytest.fail("It takes longer than the update of a small model.")

    monkeypatch.setattr("polyak_model.backend.common.optimizers_of", search)
    model.train_on_batch(x, y)
    assert model.average_step == 2
