import copy
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import closed_forms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model import (
    ExponentialAverage,
    PolynomialAverage,
    PowerAverage,
    Rule,
    UniformAverage,
    rescale_decay,
    rules,
)

RULES = pytest.mark.parametrize("rule", closed_forms.RULES.values(), ids=closed_forms.RULES)
EXACT = {
    "exponential": (
        ExponentialAverage(0.999),
        lambda t, d=Fraction(0.999): (1 - d) / (1 - d**t),
    ),
    "slow": (
        ExponentialAverage(1 - 2**-20),
        lambda t, d=Fraction(1 - 2**-20): (1 - d) / (1 - d**t),
    ),
    "biased": (ExponentialAverage(0.999, debias=False), lambda t, d=Fraction(0.999): 1 - d),
    "warmup": (
        ExponentialAverage(0.999, warmup=True),
        lambda t, d=Fraction(0.999): 1 - min(d, Fraction(t, 9 + t)),
    ),
    "uniform": (UniformAverage(), lambda t: Fraction(1, t)),
    "polynomial": (PolynomialAverage(3), lambda t: Fraction(4, t + 3)),
    "power": (PowerAverage(7), lambda t: 1 - (1 - Fraction(1, t)) ** 8),
}


@pytest.mark.parametrize(("rule", "exact"), EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("step", [1, 2, 3, 10, 1000])
def test_weights_equal_exact_fractions_to_float64_rounding(rule, exact, step):
    assert rule.weight(step) == pytest.approx(float(exact(step)), rel=1e-13)


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        (ExponentialAverage(0.99999), 1 - 0.99999),
        (UniformAverage(), 1e-7),
        (PolynomialAverage(3), 4 / (10_000_000 + 3)),
        (PowerAverage(6.94), 7.94e-7 - 7.94 * 6.94 / 2 * 1e-14),
    ],
)
def test_weights_lose_no_digits_after_ten_million_steps(rule, limit):
    assert rule.weight(10_000_000) == pytest.approx(limit, rel=1e-10)


@RULES
def test_the_weight_of_an_array_is_that_of_each_step(rule):
    steps = np.arange(1, 50)
    expected = [rule.weight(int(step), rule.update_every) for step in steps]
    np.testing.assert_array_equal(rule.weight(steps, rule.update_every), expected)


@given(
    step=st.integers(1, 10**7),
    stride=st.integers(1, 100),
    name=st.sampled_from(sorted(closed_forms.RULES)),
)
def test_every_weight_is_in_the_half_open_unit_interval(step, stride, name):
    assert 0 < closed_forms.RULES[name].weight(step, stride) <= 1


@pytest.mark.parametrize(
    "rule", [ExponentialAverage(0.9, debias=False), UniformAverage(), PowerAverage(3)]
)
@given(step=st.integers(1, 1000), stride=st.integers(1, 20))
def test_one_move_after_a_stride_keeps_as_much_as_single_moves(rule, step, stride):
    kept = math.prod(1 - rule.weight(s) for s in range(step + 1, step + stride + 1))
    assert 1 - rule.weight(step + stride, stride) == pytest.approx(kept, rel=1e-9, abs=1e-12)


@RULES
def test_the_average_mirrors_up_to_the_start_step_and_moves_at_every_stride_after(rule):
    start, stride = rule.start_step, rule.update_every
    steps = range(1, start + 4 * stride + 1)
    moves = [step for step in steps if rule.moves_at(step)]
    assert moves == [*range(1, start + 1), *range(start + stride, steps[-1] + 1, stride)]
    assert all(rule.weight(step, stride) == 1 for step in range(1, start + 1))


def test_rules_with_other_arguments_differ():
    assert UniformAverage() != UniformAverage(start_step=1)
    assert ExponentialAverage(0.9) != ExponentialAverage(0.8)
    assert PowerAverage(0) != UniformAverage()


def test_a_rule_prints_as_the_call_that_makes_it():
    assert repr(PolynomialAverage(2, update_every=5)) == (
        "PolynomialAverage(eta=2.0, start_step=0, update_every=5)"
    )


@given(steps=st.floats(0.01, 1e9))
def test_the_half_life_halves_the_memory(steps):
    rule = ExponentialAverage.from_half_life(steps)
    assert rule.decay**steps == pytest.approx(0.5, rel=1e-6)


@given(sigma=st.floats(1e-4, 12**-0.5))
def test_the_relative_width_is_the_deviation_of_the_profile(sigma):
    gamma = PowerAverage.from_relative_width(sigma).gamma
    width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert width == pytest.approx(sigma, rel=1e-6)


def test_the_relative_width_is_measured_on_the_weights_of_a_run():
    rule = PowerAverage.from_relative_width(0.1)
    shares = rules.shares(rule, 20_000)
    age = np.arange(1, 20_001) / 20_000
    mean = (shares * age).sum()
    assert math.sqrt((shares * (age - mean) ** 2).sum()) == pytest.approx(0.1, rel=1e-3)


@given(decay=st.floats(0, 0.999999), ratio=st.floats(0.01, 100))
def test_rescaling_the_decay_is_a_power(decay, ratio):
    assert rescale_decay(decay, ratio) == decay**ratio


def test_a_number_is_the_decay_of_an_exponential_average():
    assert rules.get(0) == ExponentialAverage(0.0)
    assert rules.get(np.float32(0.5)) == ExponentialAverage(0.5)
    rule = UniformAverage()
    assert rules.get(rule) is rule


def test_a_user_defined_rule_needs_only_its_weight():
    class HalfAverage(Rule):
        def _share(self, t, k, xp):
            return xp.minimum(1.0, 0.5 + 0 * t)

    assert HalfAverage(start_step=2).weight(2) == 1
    assert HalfAverage(start_step=2).weight(3) == 0.5
    with pytest.raises(NotImplementedError, match="Rule does not implement"):
        Rule().weight(1)


@pytest.mark.parametrize("decay", [1, 1.2, -0.1, math.nan, math.inf, "0.9", None, True])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"`decay` must be a number in \[0, 1\). Received: decay="):
        ExponentialAverage(decay)


def test_the_refusal_of_a_decay_of_one_points_to_the_plain_mean():
    with pytest.raises(ValueError, match=r"decay=1.0. For the plain mean use UniformAverage\(\)"):
        rules.get(1.0)


@pytest.mark.parametrize("name", ["start_step", "update_every"])
@pytest.mark.parametrize("value", [-1, 2.0, "3", None, True])
def test_an_invalid_step_count_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` counts optimizer steps.*Received: {name}="):
        UniformAverage(**{name: value})


def test_updating_every_zero_steps_is_refused():
    with pytest.raises(ValueError, match="`update_every` .* an int of at least 1"):
        UniformAverage(update_every=0)


@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan, "3"])
def test_an_exponent_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="`eta` must be a finite number of at least 0. Received"):
        PolynomialAverage(value)
    with pytest.raises(ValueError, match="`gamma` must be a finite number of at least 0. Received"):
        PowerAverage(value)


def test_other_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="half-life in optimizer steps, must be a positive"):
        ExponentialAverage.from_half_life(0)
    with pytest.raises(ValueError, match=r"`sigma_rel` must be in \(0, 0.2887\]"):
        PowerAverage.from_relative_width(0.3)
    with pytest.raises(
        ValueError, match="`batch_ratio`, the new batch size divided by the old one"
    ):
        rescale_decay(0.9, 0)


@pytest.mark.parametrize("average", ["ema", None, [0.9]])
def test_other_values_than_a_decay_or_a_rule_are_refused(average):
    with pytest.raises(ValueError, match="`average` must be a decay in .* or a rule"):
        rules.get(average)


def test_a_rule_class_in_place_of_a_rule_is_refused_with_the_call():
    with pytest.raises(ValueError, match=r"Pass an instance: UniformAverage\(\)"):
        rules.get(UniformAverage)


class Clipped(Rule):
    """A rule of a user: the uniform average with a minimum weight."""

    def __init__(self, minimum=0.1, **kwargs):
        super().__init__(**kwargs)
        self.minimum = minimum

    def _share(self, t, k, xp):
        return xp.maximum(k / t, self.minimum)

    def get_config(self):
        return {"minimum": self.minimum, **super().get_config()}


IMMUTABLE = pytest.mark.parametrize(
    "rule", [*closed_forms.RULES.values(), Clipped(0.2)], ids=[*closed_forms.RULES, "user-defined"]
)


@IMMUTABLE
def test_no_attribute_of_a_rule_can_be_changed(rule):
    before = repr(rule)
    for name in [*rule.get_config(), "gamma", "anything"]:
        with pytest.raises(AttributeError, match=f"Cannot change `{name}` .*model.rule = "):
            setattr(rule, name, 0)
    with pytest.raises(AttributeError, match="rules are immutable"):
        del rule.start_step
    assert repr(rule) == before


@IMMUTABLE
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_a_copy_of_a_rule_is_equal_and_immutable(rule, copied):
    other = copied(rule)
    assert other == rule
    assert other.weight(7, 2) == rule.weight(7, 2)
    with pytest.raises(AttributeError, match="rules are immutable"):
        other.update_every = 9


@pytest.mark.processes
def test_rules_import_neither_keras_nor_tensorflow():
    code = (
        "import sys, numpy, polyak_model.rules; from polyak_model import UniformAverage\n"
        "assert polyak_model.rules.shares(UniformAverage(), 2).tolist() == [0.5, 0.5]\n"
        "assert UniformAverage().weight(numpy.array([2.0])) == 0.5\n"
        "assert not {'keras', 'tensorflow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PROSE = [
    (ExponentialAverage(0.9), "(1 - decay**k) / (1 - decay**t)"),
    (ExponentialAverage(0.9, debias=False), "1 - decay**k"),
    (ExponentialAverage(0.9, warmup=True), "1 - min(decay, (1 + n) / (10 + n))**k"),
    (UniformAverage(), "k / t"),
    (PolynomialAverage(3), "(eta + 1) / (n + 1 + eta)"),
    (PowerAverage(6.94), "1 - (1 - k / t)**(gamma + 1)"),
]


@pytest.mark.parametrize(("rule", "formula"), PROSE)
@pytest.mark.parametrize(("t", "k"), [(1, 1), (2, 1), (50, 1), (6, 3), (300, 5)])
def test_the_formula_in_a_docstring_is_the_weight(rule, formula, t, k):
    assert formula in type(rule).__doc__
    value = eval(formula, {}, {**rule.get_config(), "t": t, "k": k, "n": t / k - 1, "min": min})
    assert rule.weight(t, k) == pytest.approx(value, rel=1e-12)


def test_the_formulas_of_the_other_docstrings_hold():
    steps, decay, batch_ratio = 700, 0.99, 3
    assert "decay = 0.5 ** (1 / steps)" in ExponentialAverage.from_half_life.__doc__
    assert ExponentialAverage.from_half_life(steps).decay == 0.5 ** (1 / steps)
    assert "decay ** batch_ratio" in rescale_decay.__doc__
    assert rescale_decay(decay, batch_ratio) == decay**batch_ratio
    sigma_rel = 0.15
    gamma = PowerAverage.from_relative_width(sigma_rel).gamma
    equation = "sigma_rel**2 * (gamma + 2)**2 * (gamma + 3) = gamma + 1"
    assert equation in PowerAverage.from_relative_width.__doc__
    assert sigma_rel**2 * (gamma + 2) ** 2 * (gamma + 3) == pytest.approx(gamma + 1)
