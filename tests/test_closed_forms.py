import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model import (
    ExponentialAverage,
    PolynomialAverage,
    PowerAverage,
    UniformAverage,
    closed_forms,
)

pytestmark = pytest.mark.without_keras
counts = st.integers(1, 40)
exponents = st.floats(0, 20)


def check(weights, rule):
    """The share of the i-th is what enters at i times what all later ones leave of it."""
    entering = [rule.weight(step) for step in range(1, len(weights) + 1)]
    total = math.fsum(weights)
    for i, weight in enumerate(weights):
        share = entering[i] * math.prod(1 - later for later in entering[i + 1 :])
        assert weight / total == pytest.approx(share, rel=1e-9, abs=1e-15)


@given(counts)
def test_uniform_weights_are_those_of_the_rule(count):
    check(closed_forms.uniform(count), UniformAverage())


@given(counts, st.floats(0, 0.9999))
def test_exponential_weights_are_those_of_the_rule(count, decay):
    check(closed_forms.exponential(count, decay), ExponentialAverage(decay))


@given(counts, exponents)
def test_polynomial_weights_are_those_of_the_rule(count, eta):
    check(closed_forms.polynomial(count, eta), PolynomialAverage(eta))


@given(counts, exponents)
def test_power_weights_are_those_of_the_rule(count, gamma):
    check(closed_forms.power(count, gamma), PowerAverage(gamma))


@pytest.mark.parametrize("form", [closed_forms.polynomial, closed_forms.power])
@pytest.mark.parametrize("value", [-1, math.inf, math.nan])
def test_an_exponent_out_of_range_is_refused(form, value):
    with pytest.raises(ValueError, match="must be a finite number of at least 0"):
        form(3, value)


@pytest.mark.parametrize("decay", [-0.1, 1, math.nan])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\)"):
        closed_forms.exponential(3, decay)


def test_weights_of_very_many_files_are_finite():
    for weights in (
        closed_forms.exponential(10**4, 0.5),
        closed_forms.polynomial(10**4, 20),
        closed_forms.power(10**4, 20),
    ):
        assert all(0 <= weight <= 1 for weight in weights)
        assert weights[-1] > 0
