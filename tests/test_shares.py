import math
import time

import closed_forms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model import (
    ExponentialAverage,
    PolynomialAverage,
    PowerAverage,
    UniformAverage,
)
from polyak_model.rules import shares

counts = st.integers(1, 200)
exponents = st.floats(0, 20)
schedules = {"start_step": st.integers(0, 30), "update_every": st.integers(1, 7)}
rules = st.one_of(
    st.builds(UniformAverage, **schedules),
    st.builds(PolynomialAverage, exponents, **schedules),
    st.builds(PowerAverage, exponents, **schedules),
    st.builds(ExponentialAverage, st.floats(0, 0.9999), st.booleans(), st.booleans(), **schedules),
)


@given(counts)
def test_uniform_shares_are_equal(n):
    np.testing.assert_allclose(shares(UniformAverage(), n), np.full(n, 1 / n), rtol=1e-13)


@given(counts, st.floats(0.01, 0.9999))
def test_exponential_shares_are_proportional_to_powers_of_the_decay(n, decay):
    expected = decay ** np.arange(n - 1.0, -1, -1)
    received = shares(ExponentialAverage(decay), n)
    np.testing.assert_allclose(received, expected / expected.sum(), rtol=1e-10)


@given(counts, exponents)
def test_polynomial_shares_are_proportional_to_ratios_of_gamma_functions(n, eta):
    logs = np.array([math.lgamma(i + eta) - math.lgamma(i) for i in range(1, n + 1)])
    expected = np.exp(logs - logs[-1])
    received = shares(PolynomialAverage(eta), n)
    np.testing.assert_allclose(received, expected / expected.sum(), rtol=1e-10)


@given(counts, exponents)
def test_power_shares_are_differences_of_powers(n, gamma):
    expected = np.diff((np.arange(n + 1.0) / n) ** (gamma + 1))
    np.testing.assert_allclose(shares(PowerAverage(gamma), n), expected, rtol=1e-9, atol=1e-15)


@given(rules, counts)
def test_shares_are_the_result_of_updates_with_the_weights_of_the_rule(rule, n):
    # The average of unit vectors is the vector of shares.
    average = np.zeros(n)
    for step, iterate in enumerate(np.eye(n), 1):
        if rule.moves_at(step):
            average += rule.weight(step, rule.update_every) * (iterate - average)
    np.testing.assert_allclose(shares(rule, n), average, rtol=1e-12, atol=1e-15)


@given(rules, counts)
def test_shares_are_not_negative_and_sum_to_at_most_one(rule, n):
    received = shares(rule, n)
    assert (received >= 0).all()
    assert received.sum() <= 1 + 1e-12


@pytest.mark.parametrize(
    "rule",
    [ExponentialAverage(0.99), UniformAverage(), PolynomialAverage(20), PowerAverage(20)],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 1000, 100_000])
def test_the_shares_of_a_rule_that_starts_from_the_first_iterate_sum_to_one(rule, n):
    received = shares(rule, n)
    assert received.shape == (n,)
    assert received.dtype == np.float64
    assert math.fsum(received) == pytest.approx(1, rel=1e-12)
    assert received[-1] > 0


@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_initial_weights_have_the_rest(n):
    rule = ExponentialAverage(0.9, debias=False)
    assert 1 - shares(rule, n).sum() == pytest.approx(0.9**n, rel=1e-12)


@pytest.mark.parametrize("name", closed_forms.RULES)
def test_shares_equal_the_closed_form_of_every_rule(name):
    rule, moves = closed_forms.RULES[name], 40
    n = rule.start_step + moves * rule.update_every
    received = shares(rule, n)[rule.start_step :][rule.update_every - 1 :: rule.update_every]
    np.testing.assert_allclose(received, closed_forms.shares(rule, moves)[1:], rtol=1e-10)


def test_ten_million_steps_take_seconds_and_lose_no_digits():
    n = 10**7
    begin = time.perf_counter()
    received = shares(PowerAverage(6.94), n)
    assert time.perf_counter() - begin < 20
    steps = np.array([10**3, 10**5, 10**7])
    # 1 - (1 - 1/t)**7.94 times (t/n)**7.94, without the cancellation.
    expected = -np.expm1(7.94 * np.log1p(-1 / steps)) * (steps / n) ** 7.94
    np.testing.assert_allclose(received[steps - 1], expected, rtol=1e-9)


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_an_invalid_number_of_steps_is_refused(n):
    with pytest.raises(ValueError, match="`n` counts optimizer steps: it must be an int of at"):
        shares(UniformAverage(), n)
