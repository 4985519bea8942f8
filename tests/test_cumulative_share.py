import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_shares import rules

from polyak_model import PolynomialAverage, PowerAverage, UniformAverage
from polyak_model.rules import Rule, cumulative_share, shares


class SummedAverage(PowerAverage):
    """A rule without a closed form."""

    _log_growth = Rule._log_growth


@given(rules, st.integers(1, 200))
def test_it_is_the_sum_of_the_shares_and_of_that_of_the_first_weights(rule, n):
    alone = shares(rule, n)
    cumulated = cumulative_share(rule, n, np.arange(-1, n + 3))
    np.testing.assert_allclose(cumulated[2 : n + 2], 1 - alone.sum() + alone.cumsum(), atol=1e-12)
    assert cumulated[0] == 0
    assert (cumulated[n + 1 :] == 1).all()


@pytest.mark.parametrize("eta", [0, 0.5, 3, 300])
@pytest.mark.parametrize("n", [1, 10, 10**7])
def test_small_shares_keep_their_digits(eta, n):
    # The last iterate has the weight of the last step.
    rule = PolynomialAverage(eta)
    before, last = cumulative_share(rule, n, np.array([n - 1, n]))
    assert last - before == pytest.approx(rule.weight(n), rel=1e-7)


def test_a_rule_of_ones_own_is_summed_step_by_step():
    steps = np.arange(0, 2_500_000, 997)
    schedule = {"gamma": 4.0, "start_step": 1000, "update_every": 2}
    np.testing.assert_allclose(
        cumulative_share(SummedAverage(**schedule), 2_400_000, steps),
        cumulative_share(PowerAverage(**schedule), 2_400_000, steps),
        rtol=1e-9,
        atol=1e-300,
    )


def test_a_run_of_ten_million_steps_needs_no_array_of_its_steps():
    assert cumulative_share(UniformAverage(), 10**7, np.array([10**6])) == pytest.approx(0.1)
