"""Reference values, computed in float64 for snapshots of power averages."""

import math
import time
import tracemalloc

import numpy as np
import pytest

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage
from polyak_model.posthoc.basis import Basis, Stored
from polyak_model.posthoc.reach import (
    family_of,
    find_count,
    find_nearest,
    find_reachable,
    half_lives,
    relative_widths,
)
from polyak_model.rules import shares

width = PowerAverage.from_relative_width
NARROW_PAIR = {"first": width(0.05), "second": width(0.10)}
QUARTERS = (0.25, 0.5, 0.75, 1)
N = 8192


def store(averages, n, fractions):
    return [Stored(round(n * f), name, averages[name]) for f in fractions for name in averages]


def store_evenly(averages, count, n=N):
    return store(averages, n, [i / count for i in range(1, count + 1)])


@pytest.mark.parametrize(
    ("target", "error", "coefficients", "true", "rebuilt"),
    [
        (
            0.15,
            0.1024616919,
            "-0.0037170338 0.0092976003 -0.0189106607 0.0506165991 "
            "-0.0833047809 0.2110006721 -0.2634679775 1.0984855815",
            28.5055514683,
            28.5322565869,
        ),
        (
            0.25,
            0.3899990116,
            "-0.0448336113 0.1091471972 -0.1260028191 0.2920056009 "
            "-0.2114618675 0.4736579061 -0.2831854180 0.7906730118",
            24.5111004050,
            25.7226001245,
        ),
    ],
)
def test_coefficients_are_those_of_exact_shares(target, error, coefficients, true, rebuilt):
    stored = store(NARROW_PAIR, 1000, QUARTERS)
    combination = Basis(stored, 1000).combine(width(target))
    received = [combination.coefficients[each.step, each.name] for each in stored]
    coefficients = np.array(coefficients.split(), float)
    np.testing.assert_allclose(received, coefficients, atol=6e-11)
    assert math.fsum(received) == pytest.approx(1, abs=1e-15)
    assert combination.profile_error == pytest.approx(error, abs=1e-10)
    assert combination.rounding == pytest.approx(np.abs(coefficients).sum(), abs=1e-9)
    iterates = np.sqrt(np.arange(1, 1001))
    assert shares(width(target), 1000) @ iterates == pytest.approx(true, abs=1e-10)
    averages = [shares(each.rule, each.step) @ iterates[: each.step] for each in stored]
    assert np.dot(received, averages) == pytest.approx(rebuilt, abs=1e-9)


def test_coefficients_of_long_runs_approach_those_of_the_limit():
    stored = store(NARROW_PAIR, 10**7, QUARTERS)
    combination = Basis(stored, 10**7).combine(width(0.15))
    received = [combination.coefficients[each.step, each.name] for each in stored]
    limit = [-0.0037146919, 0.0092950380, -0.0189083726, 0.0506146997]
    limit += [-0.0833002836, 0.2109969568, -0.2634600036, 1.0984766572]
    np.testing.assert_allclose(received, limit, atol=1e-7)
    assert combination.profile_error == pytest.approx(0.1024670087, abs=1e-6)


TARGETS = {
    "0.02": width(0.02),
    "0.03": width(0.03),
    "0.15": width(0.15),
    "0.25": width(0.25),
    "uniform": UniformAverage(),
    "tail of 25 %": UniformAverage(start_step=3 * N // 4),
    "exponential": ExponentialAverage.from_half_life(N / 20),
}
ERRORS = {
    8: [
        (".25", ".25"),
        (".1", ".069"),
        (".033", ".0038"),
        (".18", ".053"),
        (".45", ".14"),
        (".084", ".014"),
        (".0056", ".0018"),
    ],
    16: [
        (".12", ".057"),
        (".039", ".012"),
        (".0090", ".0005"),
        (".079", ".020"),
        (".30", ".078"),
        (".023", ".0016"),
        (".0015", ".0002"),
    ],
    32: [
        (".040", ".0094"),
        (".011", ".0017"),
        (".0023", "6e-5"),
        (".034", ".0066"),
        (".21", ".041"),
        (".0058", ".0002"),
        (".0004", "3e-5"),
    ],
    64: [
        (".011", ".0013"),
        (".0029", ".0002"),
        (".0006", "7e-6"),
        (".015", ".0021"),
        (".15", ".021"),
        (".0014", "2e-5"),
        (".0001", "4e-6"),
    ],
}


def round_like(value, text):
    """Half a unit of the last digit of a number that was rounded."""
    digits, _, exponent = text.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return pytest.approx(float(text), abs=0.75 * unit) == value


@pytest.mark.parametrize("count", ERRORS)
def test_errors_are_those_of_the_reference(count):
    basis = Basis(store_evenly(NARROW_PAIR, count), N)
    for rule, (profile_error, walk_error) in zip(TARGETS.values(), ERRORS[count], strict=True):
        combination = basis.combine(rule)
        assert round_like(combination.profile_error, profile_error), rule
        assert round_like(combination.walk_error, walk_error), rule


@pytest.mark.parametrize(
    ("widths", "profile_error", "walk_error", "rounding"),
    [
        ((0.05, 0.10), 0.079, 0.020, 7.7),
        ((0.05, 0.28), 0.050, 0.016, 20),
        ((0.03, 0.20), 0.029, 0.0055, 4.1),
    ],
)
def test_the_proposed_pair_has_the_smallest_worst_errors(
    widths, profile_error, walk_error, rounding
):
    averages = {str(w): width(w) for w in widths}
    basis = Basis(store_evenly(averages, 16), N)
    worst = np.max([basis.combine(width(w))[1:] for w in np.linspace(0.03, 0.25, 23)], 0)
    np.testing.assert_allclose(worst, [profile_error, walk_error, rounding], rtol=0.03)


def test_three_averages_on_the_same_disk_space_are_better_than_two():
    def worst(averages, count):
        basis = Basis(store_evenly(averages, count), N)
        return max(basis.combine(width(w)).walk_error for w in np.linspace(0.03, 0.25, 23))

    assert worst(PowerAverage.triple(), 10) < 0.5 * worst(PowerAverage.pair(), 15)


def test_the_constraint_is_better_than_dividing_by_the_sum():
    stored = store(NARROW_PAIR, N, [0.5, 1])
    combination = Basis(stored, N).combine(width(0.02))
    assert combination.profile_error == pytest.approx(0.346, abs=1e-3)
    profiles = [np.pad(shares(each.rule, each.step), (0, N - each.step)) for each in stored]
    profiles = np.stack(profiles, 1)
    true = shares(width(0.02), N)
    free, *_ = np.linalg.lstsq(profiles, true, rcond=None)
    divided = np.linalg.norm(profiles @ free / free.sum() - true) / np.linalg.norm(true)
    assert divided == pytest.approx(0.485, abs=1e-3)


STORED_RULES = {
    "power": PowerAverage(3.0),
    "debiased": ExponentialAverage(0.98),
    "plain": ExponentialAverage(0.98, debias=False),
    "warmup": ExponentialAverage(0.98, warmup=True),
    "uniform": UniformAverage(),
    "polynomial": PolynomialAverage(2.5),
    "late": PowerAverage(5.0, start_step=37),
    "rare": PowerAverage(5.0, start_step=3, update_every=7),
    "plain, late and rare": ExponentialAverage(0.9, False, start_step=37, update_every=5),
}


@pytest.mark.parametrize("rule", STORED_RULES.values(), ids=STORED_RULES)
def test_a_stored_average_comes_back_to_rounding(rule):
    averages = {"same": rule, "other": ExponentialAverage(0.9, update_every=rule.update_every)}
    combination = Basis(store(averages, 400, [0.5, 0.75, 1]), 400).combine(rule)
    for key, coefficient in combination.coefficients.items():
        assert coefficient == pytest.approx(float(key == (400, "same")), abs=1e-12)
    assert combination.walk_error < 1e-12
    assert combination.profile_error < 1e-12


def test_the_error_of_a_walk_is_that_of_simulated_ones():
    stored = store(NARROW_PAIR, 200, QUARTERS)
    combination = Basis(stored, 200).combine(width(0.2))
    rebuilt = np.zeros(200)
    for each in stored:
        share = combination.coefficients[each.step, each.name]
        rebuilt[: each.step] += share * shares(each.rule, each.step)
    walks = np.cumsum(np.random.default_rng(0).normal(size=(200, 20000)), 0)
    true = shares(width(0.2), 200) @ walks
    measured = np.linalg.norm(rebuilt @ walks - true) / np.linalg.norm(true - walks[-1])
    assert combination.walk_error == pytest.approx(measured, rel=0.02)


def test_windows_between_snapshots_of_a_uniform_average_are_exact():
    stored = store({"average": UniformAverage()}, 1000, [0.3, 0.6, 1])
    combination = Basis(stored, 1000).combine(UniformAverage(start_step=600))
    assert combination.coefficients[1000, "average"] == pytest.approx(1 + 600 / 400, abs=1e-12)
    assert combination.coefficients[600, "average"] == pytest.approx(-600 / 400, abs=1e-12)
    assert combination.walk_error < 1e-12


def test_later_snapshots_do_not_count():
    stored = store(NARROW_PAIR, 1000, QUARTERS)
    early = [each for each in stored if each.step <= 500]
    assert Basis(stored, 500).combine(width(0.1)) == Basis(early, 500).combine(width(0.1))
    with pytest.raises(ValueError, match="must contain an average of step 200 or before"):
        Basis(stored, 200)


def test_snapshots_that_later_ones_span_are_left_out():
    # The first three steps have three iterates, and all averages of step 1 are the first.
    stored = store(NARROW_PAIR, 3, [1 / 3, 2 / 3, 1])
    basis = Basis(stored, 3)
    assert [(each.step, each.name) for each in basis.stored] == [
        (3, "first"),
        (3, "second"),
        (2, "first"),
    ]
    assert basis.combine(UniformAverage()).profile_error < 1e-12


@pytest.mark.parametrize("every", [1, 10, 100])
def test_the_stride_does_not_change_the_combination(every):
    # Of iterates that no stored average has read, the next one stands for all.
    averages = PowerAverage.pair(update_every=every)
    combination = Basis(store_evenly(averages, 16, 16000), 16000).combine(width(0.1))
    reference = Basis(store_evenly(PowerAverage.pair(), 16, 16000), 16000).combine(width(0.1))
    assert combination.walk_error == pytest.approx(reference.walk_error, abs=2e-3)
    assert combination.profile_error == pytest.approx(reference.profile_error, rel=0.1)


def test_averages_that_begin_late_are_rebuilt_from_those_that_do_too():
    schedule = {"start_step": 300}
    stored = store(PowerAverage.pair(**schedule), 2000, np.arange(1, 17) / 16)
    basis = Basis(stored, 2000)
    assert basis.combine(width(0.1, **schedule)).walk_error < 0.005
    # The first step that can have a part is the first after the start.
    assert basis.combine(UniformAverage()).walk_error > 0.1


def test_cells_of_long_runs_are_as_good_as_single_steps():
    stored = store_evenly(PowerAverage.pair(), 16, 20000)
    exact, cells = Basis(stored, 20000), Basis(stored, 20000, budget=2**17)
    for rule in (width(0.1), ExponentialAverage.from_half_life(2000), UniformAverage(10001)):
        for one, other in zip(exact.combine(rule)[1:], cells.combine(rule)[1:], strict=True):
            assert one == pytest.approx(other, rel=0.02)


def test_runs_of_ten_million_steps_take_seconds_and_little_memory():
    begun = time.process_time()
    tracemalloc.start()
    basis = Basis(store_evenly(PowerAverage.pair(update_every=3), 33, 10**7), 10**7)
    for rule in (
        width(0.1),
        ExponentialAverage(0.999999),
        ExponentialAverage(0.999999, warmup=True),
        PolynomialAverage(3),
        UniformAverage(9 * 10**6),
    ):
        assert basis.combine(rule).walk_error < 0.06
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**28
    assert time.process_time() - begun < 10


def test_hundreds_of_snapshots_cost_no_more_than_a_hundred():
    stored = store_evenly(PowerAverage.pair(), 1000, 10**5)
    basis = Basis(stored, 10**5)
    assert len({each.step for each in basis.stored}) <= 96
    assert basis.combine(ExponentialAverage.from_half_life(300)).walk_error < 0.01


def test_a_combination_never_follows_the_raw_weights():
    # Its own distance from the raw weights is 0.
    combination = Basis(store(NARROW_PAIR, 100, QUARTERS), 100).combine(ExponentialAverage(0.0))
    assert combination.walk_error == math.inf


def test_the_reachable_lengths_are_those_whose_error_is_small_enough():
    basis = Basis(store_evenly(PowerAverage.pair(), 16), N)
    for family in (relative_widths(), half_lives(N)):
        one_percent, five_percent = find_reachable(basis, family, [0.01, 0.05])
        ((shortest, longest),) = one_percent
        assert five_percent[0][0] < shortest < longest <= five_percent[0][1]
        assert basis.combine(family.make(shortest)).walk_error <= 0.01
        assert basis.combine(family.make(shortest / 1.2)).walk_error > 0.01


def test_the_nearest_reachable_target_and_what_another_takes_are_named():
    basis = Basis(store_evenly(PowerAverage.pair(), 16), N)
    assert find_nearest(basis, width(0.005), 0.05).startswith("relative width 0.01")
    assert find_count(basis, width(0.01), 0.05) in (64, 128)
    assert find_count(basis, ExponentialAverage.from_half_life(3), 0.05) is None
    assert find_nearest(basis, PolynomialAverage(300), 0.05) is None
    assert find_nearest(basis, ExponentialAverage(0.0), 0.05).startswith("half-life in steps")


@pytest.mark.parametrize(
    ("rule", "length"),
    [
        (width(0.07), 0.07),
        (ExponentialAverage.from_half_life(50), 50),
        (UniformAverage(700), 300),
    ],
)
def test_a_family_has_the_length_of_its_rule(rule, length):
    family = family_of(rule, 1000)
    assert family.length == pytest.approx(length)
    np.testing.assert_allclose(shares(family.make(length), 1000), shares(rule, 1000), atol=1e-12)
