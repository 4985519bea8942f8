"""The warning of averages that remember the initial phase of a run."""

import warnings

import keras
import numpy as np
import pytest

from polyak_model import (
    ExponentialAverage,
    PolyakModel,
    PolynomialAverage,
    PowerAverage,
    UniformAverage,
)
from polyak_model.rules.initial_phase import warn_of_initial_phase


def messages(rule, step):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_initial_phase({"slow": rule}, step)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (UniformAverage(), 4),
        (UniformAverage(start_step=300), 1000),
        (ExponentialAverage(0.999), 1500),
        (ExponentialAverage(0.999, debias=False), 1500),
        (ExponentialAverage.from_half_life(1001, warmup=True), 1000),
        (PolynomialAverage(0.5), 1000),
        (PowerAverage(0.5), 1000),
    ],
    ids=str,
)
def test_it_warns_of_a_mean_age_above_a_third_of_the_run_or_a_longer_half_life(rule, step):
    (message,) = messages(rule, step)
    assert rule.mean_age(step) > step / 3 or rule.half_life > step
    assert f"after {step:,} steps the mean age of its iterates is" in message


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (UniformAverage(), 0),
        (UniformAverage(), 3),
        (UniformAverage(start_step=400), 1000),
        (ExponentialAverage(0.999), 3000),
        (ExponentialAverage.from_half_life(1000, warmup=True), 1000),
        (PolynomialAverage(), 1000),
        (PowerAverage(), 1000),
    ],
    ids=str,
)
def test_it_is_silent_otherwise(rule, step):
    assert messages(rule, step) == []


def test_the_message_names_the_average_its_memory_and_the_remedies():
    (message,) = messages(ExponentialAverage(0.999), 1200)
    assert message.startswith("The average 'slow' remembers the initial phase of training: after")
    assert "mean age of its iterates is 482 steps and its half-life is 693 steps" in message
    for remedy in ("PowerAverage()", "from_half_life(120)", "start_step=600"):
        assert remedy in message


def test_each_remedy_silences_it():
    step = 1200
    for rule in (
        PowerAverage(),
        ExponentialAverage.from_half_life(120),
        UniformAverage(start_step=600),
    ):
        assert messages(rule, step) == []


def test_the_warning_points_to_the_caller():
    with pytest.warns(UserWarning, match="initial phase") as caught:
        warn_of_initial_phase({"average": UniformAverage()}, 100)
    assert caught[0].filename == __file__


def fit(average, epochs=1):
    model = PolyakModel(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), average)
    model.compile("sgd", "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(epochs):
            model.fit(np.ones((100, 2)), np.ones((100, 1)), batch_size=1, verbose=0)
    return [each for each in caught if "initial phase" in str(each.message)]


def test_fit_warns_once_of_each_average_that_remembers_the_initial_phase():
    caught = fit({"slow": 0.999, "fine": PowerAverage(), "all": UniformAverage()}, epochs=2)
    names = [str(each.message).split("'")[1] for each in caught]
    assert names == ["slow", "all"]
    assert {each.filename for each in caught} == {__file__}


def test_fit_is_silent_where_the_memory_suits_the_run():
    assert fit(PowerAverage()) == []
