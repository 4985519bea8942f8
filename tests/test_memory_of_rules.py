"""What rules remember: mean age, effective iterates and half-life."""

import math

import closed_forms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, Rule, UniformAverage
from polyak_model.rules import shares

RULES = pytest.mark.parametrize("rule", closed_forms.RULES.values(), ids=closed_forms.RULES)
counts = st.integers(1, 3000)
decays = st.floats(0.01, 0.999)


def moments(ages, parts):
    """Returns the mean age and 1 / sum of squares of shares."""
    return np.dot(ages, parts), 1 / np.dot(parts, parts)


def remembered(rule, n):
    return rule.mean_age(n), rule.effective_iterates(n)


@RULES
@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 40, 241])
def test_both_equal_the_moments_of_the_shares(rule, n):
    parts = shares(rule, n)
    parts = np.append(1 - parts.sum(), parts)
    expected = moments(n - np.arange(n + 1.0), parts)
    np.testing.assert_allclose(remembered(rule, n), expected, rtol=1e-12, atol=1e-12)


@RULES
def test_both_equal_the_moments_of_the_closed_form_of_every_rule(rule):
    moves, later = 40, rule.update_every - 1
    ages = later + rule.update_every * np.arange(moves, -1.0, -1)
    expected = moments(ages, np.array(closed_forms.shares(rule, moves)))
    n = rule.start_step + moves * rule.update_every + later
    np.testing.assert_allclose(remembered(rule, n), expected, rtol=1e-10)


@given(counts)
def test_a_uniform_average_remembers_all_iterates_alike(n):
    np.testing.assert_allclose(remembered(UniformAverage(), n), [(n - 1) / 2, n], rtol=1e-11)


@given(counts, decays)
def test_an_exponential_average_follows_the_geometric_series(n, decay):
    rate = -math.log(decay)
    age = 1 / math.expm1(rate) - n * decay**n / (1 - decay**n)
    expected = age, math.tanh(n * rate / 2) / math.tanh(rate / 2)
    received = remembered(ExponentialAverage(decay), n)
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-9)


@given(counts, decays)
def test_a_biased_exponential_average_keeps_the_initial_weights(n, decay):
    squares = decay ** (2 * n) + (1 - decay) / (1 + decay) * (1 - decay ** (2 * n))
    expected = decay * (1 - decay**n) / (1 - decay), 1 / squares
    received = remembered(ExponentialAverage(decay, debias=False), n)
    np.testing.assert_allclose(received, expected, rtol=1e-10)


@given(counts, st.floats(0, 50))
def test_the_mean_age_of_a_polynomial_average_is_a_fraction_of_the_run(n, eta):
    expected = (n - 1) / (eta + 2)
    assert PolynomialAverage(eta).mean_age(n) == pytest.approx(expected, rel=1e-9, abs=1e-12)


# The age and the variance, as fractions of a long run, of three relative widths.
@pytest.mark.parametrize(
    ("width", "age", "variance"),
    [
        (0.05, 0.0527087040, 9.2432535239),
        (0.10, 0.1118918184, 4.2354093605),
        (0.25, 0.3676708550, 1.2123857820),
    ],
)
def test_a_power_average_remembers_a_fraction_of_the_run(width, age, variance):
    n = 10**6
    rule = PowerAverage.from_relative_width(width)
    assert rule.mean_age(n) / n == pytest.approx(age, abs=1e-6)
    assert n / rule.effective_iterates(n) == pytest.approx(variance, rel=1e-5)


@RULES
def test_arrays_of_steps_give_what_single_steps_give(rule):
    steps = np.array([[7, 0, 40], [7, 100, 1]])
    for remember in (rule.mean_age, rule.effective_iterates):
        received = remember(steps)
        assert received.shape == steps.shape
        assert received.dtype == np.float64
        expected = [[remember(int(step)) for step in row] for row in steps]
        np.testing.assert_allclose(received, expected, rtol=1e-13)


def test_while_it_mirrors_an_average_remembers_the_newest_iterate_alone():
    rule = UniformAverage(start_step=5)
    assert [remembered(rule, n) for n in (0, 3, 5)] == [(0, 1)] * 3


def test_between_its_moves_an_average_ages():
    rule = UniformAverage(start_step=2, update_every=4)
    assert [rule.mean_age(step) for step in range(2, 11)] == [0, 1, 2, 3, 0, 1, 2, 3, 2]


def test_a_run_of_a_million_steps_is_computed_in_blocks_without_losing_digits():
    received = remembered(UniformAverage(), 10**6)
    np.testing.assert_allclose(received, [(10**6 - 1) / 2, 10**6], rtol=1e-9)


def test_a_rule_of_the_user_remembers_too():
    class Halving(Rule):
        def _share(self, t, k, xp):
            return xp.where(t <= k, 1.0, 0.5)

    assert remembered(Halving(), 3) == (0.25 * 1 + 0.25 * 2, 1 / (0.25 + 0.0625 + 0.0625))


@pytest.mark.parametrize("step", [-1, 2.0, True, "3", [1, -2]])
def test_steps_that_are_no_counts_are_refused(step):
    with pytest.raises(ValueError, match="`step` counts optimizer steps: it must be an int of at"):
        UniformAverage().mean_age(step)


@pytest.mark.parametrize("decay", [0.01, 0.9, 0.9999])
def test_the_half_life_halves_the_share_of_an_iterate(decay):
    rule = ExponentialAverage(decay, update_every=3)
    assert decay**rule.half_life == pytest.approx(0.5, rel=1e-12)


def test_rules_without_memory_have_a_half_life_of_zero_and_other_rules_none():
    assert ExponentialAverage(0).half_life == 0
    assert {r.half_life for r in (UniformAverage(), PolynomialAverage(), PowerAverage())} == {None}


def test_a_half_life_in_epochs_is_one_in_steps():
    expected = ExponentialAverage.from_half_life(156, warmup=True)
    rule = ExponentialAverage.from_half_life(epochs=0.5, steps_per_epoch=312, warmup=True)
    assert rule == expected
    assert expected.half_life == pytest.approx(156, rel=1e-12)


@pytest.mark.parametrize(
    "lengths",
    [
        {},
        {"epochs": 1},
        {"steps_per_epoch": 3},
        {"steps": 5, "epochs": 1},
        {"steps": 5, "steps_per_epoch": 3},
        {"steps": 5, "epochs": 1, "steps_per_epoch": 3},
    ],
)
def test_a_half_life_given_neither_or_both_ways_is_refused(lengths):
    with pytest.raises(ValueError, match="either `steps`, or `epochs` and `steps_per_epoch`"):
        ExponentialAverage.from_half_life(**lengths)


@pytest.mark.parametrize(
    "lengths", [{"epochs": 0, "steps_per_epoch": 3}, {"epochs": 1, "steps_per_epoch": -3}]
)
def test_a_half_life_of_no_epochs_is_refused(lengths):
    with pytest.raises(ValueError, match="must be a positive finite number"):
        ExponentialAverage.from_half_life(**lengths)
