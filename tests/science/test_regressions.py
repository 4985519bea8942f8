"""The deterministic claims of `benchmarks/science`, and a quick form of one that is not."""

import batch_size_rule
import batches
import numpy as np
import polyak_juditsky
import pytest
import recursion
import regressions
import scipy.integrate
import scipy.linalg
import tensorflow as tf
import trajectories
import variance_law

from polyak_model import ExponentialAverage, PolynomialAverage, UniformAverage, rescale_decay
from polyak_model.rules import shares

pytestmark = pytest.mark.benchmarks

PROBLEMS = [regressions.linear_regression(), regressions.logistic_regression()]
BY_NAME = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def test_averages_are_the_sums_of_the_iterates_times_their_shares():
    path = np.random.default_rng(0).normal(size=(24, 3))
    rules = [
        UniformAverage(start_step=5),
        ExponentialAverage(0.9, update_every=4),
        PolynomialAverage(3),
    ]
    values = tf.constant(path)
    reports = list(
        trajectories.trajectories(lambda _, t: values[t - 1], np.zeros(3), rules, 24, every=12)
    )
    assert [step for step, _, _ in reports] == [12, 24]
    for step, iterate, averages in reports:
        np.testing.assert_array_equal(iterate, path[step - 1])
        for rule, average in zip(rules, averages, strict=True):
            expected = shares(rule, step) @ path[:step]
            np.testing.assert_allclose(average, expected, rtol=1e-13, atol=1e-15)


def test_averages_of_the_linear_recursion_equal_linear_algebra():
    steps, eigenvalues = 40, np.array([0.05, 1.0])
    step_size = 0.5 * np.arange(1, steps + 1) ** -0.6
    share = np.stack([shares(r, steps) for r in (UniformAverage(), PolynomialAverage(3))])
    variance, mean = recursion.finite_run(share, step_size, eigenvalues)
    for k, eigenvalue in enumerate(eigenvalues):
        # (1 + step_size * eigenvalue * shift) e = start + step_size * noise, for all steps at once.
        system = np.eye(steps) - np.diag(1 - step_size[1:] * eigenvalue, -1)
        start = np.eye(steps)[0] * (1 - step_size[0] * eigenvalue)
        np.testing.assert_allclose(mean[:, k], share @ np.linalg.solve(system, start), rtol=1e-12)
        effect = share @ np.linalg.solve(system, np.diag(step_size))
        np.testing.assert_allclose(variance[:, k], (effect**2).sum(axis=1), rtol=1e-12)


def test_hessian_and_pull_of_the_logistic_regression_equal_integrals():
    problem = PROBLEMS[1]

    def expected(function):
        def integrand(z):
            chance = 1 / (1 + np.exp(-z))
            density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
            return function(z, chance * (1 - chance), 1 - 2 * chance) * density

        return scipy.integrate.quad(integrand, -12, 12, epsabs=1e-14)[0]

    u = problem.optimum
    across, along = expected(lambda z, s, b: s), expected(lambda z, s, b: s * z**2)
    hessian = across * (np.eye(5) - np.outer(u, u)) + along * np.outer(u, u)
    pull = expected(lambda z, s, b: s * b * z * (z**2 + 4) / 2) / 2 * u
    np.testing.assert_allclose(problem.hessian, hessian, rtol=1e-10)
    np.testing.assert_allclose(problem.pull, pull, rtol=1e-10)


@BY_NAME
def test_gradients_have_the_mean_and_the_covariance_that_theory_is_told(problem):
    count = 50_000
    at_optimum = np.tile(problem.optimum, (count, 1))
    take_step = problem.step(count, seed=0)
    moved = take_step(tf.constant(at_optimum), tf.constant(1, "int64"))
    gradients = (at_optimum - moved.numpy()) / problem.first_step_size
    products = gradients[:, :, None] * gradients[:, None, :]
    for sample, exact in ((gradients, 0), (products, problem.noise)):
        error = sample.std(axis=0) / count**0.5
        assert (np.abs(sample.mean(axis=0) - exact) < 4.5 * error).all()


@BY_NAME
def test_theory_of_so_many_steps_meets_the_targets_and_fails_for_short_runs(problem):
    steps = 20_000
    rules = list(polyak_juditsky.estimators(steps).values())
    limits = polyak_juditsky.limits(problem, steps).values()
    ratios, bias = recursion.predict(problem, rules, steps)
    for ratio, (limit, (low, high)) in zip(ratios, limits, strict=True):
        assert low < ratio / limit < high
    assert bias[0] < 0.1
    short = list(polyak_juditsky.estimators(1000).values())
    (_, _, _, polynomial), _ = recursion.predict(problem, short, 1000)
    assert polynomial / (16 / 7) < 0.8


@BY_NAME
def test_estimates_of_covariance_v_over_n_are_measured_as_efficient_unbiased_and_covered(problem):
    steps, generator = 1000, np.random.default_rng(0)
    errors = generator.multivariate_normal(np.zeros(5), problem.covariance / steps, size=20_000)
    ratio, error = polyak_juditsky.efficiency(problem, steps, errors)
    assert error < 0.01
    assert abs(ratio - 1) < 3 * error
    share, error = polyak_juditsky.mean_and_error(polyak_juditsky.covered(problem, steps, errors))
    assert (np.abs(share - 0.95) < 4 * error).all()
    shift = 0.1 * np.sqrt(np.diag(problem.covariance) / steps)
    for sample, exact in ((errors, 0), (errors + shift, 0.01)):
        square, error = polyak_juditsky.bias(problem, steps, sample)
        assert error < 0.002
        assert abs(square - exact) < 3 * error


@pytest.mark.parametrize("setting", variance_law.SETTINGS)
def test_the_variance_law_is_what_the_shares_of_the_rule_add_up_to(setting):
    steps = 30 * setting.memory
    share = shares(ExponentialAverage(setting.decay), steps)
    correlation = (1 - setting.rate) ** np.arange(steps)
    ratio = share @ scipy.linalg.matmul_toeplitz(correlation, share)
    assert ratio == pytest.approx(variance_law.law(setting.rate, setting.decay), rel=1e-10)


def test_a_measured_variance_keeps_the_law():
    setting, law = variance_law.Setting(0.5, 0.8), variance_law.law(0.5, 0.8)
    ratio, error = variance_law.measure(setting, chains=10_000, samples=4, seed=0)
    assert error < 0.01 * law
    assert abs(ratio - law) < 3 * error


@pytest.mark.parametrize("ratio", batch_size_rule.RATIOS)
@pytest.mark.parametrize("debias", [True, False])
def test_the_rescaled_decay_has_the_same_memory_in_examples(ratio, debias):
    decay, steps = batch_size_rule.DECAY, 8192 // ratio
    assert batch_size_rule.memory_difference(decay, ratio, steps, debias) < 3e-14
    rescaled = rescale_decay(decay, ratio)
    before, after, kept = (
        batch_size_rule.half_life(d, k) for d, k in ((decay, 1), (rescaled, ratio), (decay, ratio))
    )
    assert after == pytest.approx(before, rel=1e-12)
    assert kept == pytest.approx(ratio * before, rel=1e-12)


def test_moving_every_kth_step_is_the_rescaled_decay_on_every_kth_iterate():
    assert batch_size_rule.rare_difference(0.999, 8, steps=100, seed=0) < 1e-14


def test_the_profile_of_a_batch_equals_linear_algebra():
    a, q, decay, steps = 0.8, 0.1, 0.9, 12
    means, variances = batches.profile(a, q, decay, steps)
    effect = scipy.linalg.toeplitz(a ** np.arange(steps), np.eye(steps)[0])
    for t in range(1, steps + 1):
        share = shares(ExponentialAverage(decay), t)
        assert means[t - 1] == pytest.approx(share @ a ** np.arange(1, t + 1), rel=1e-13)
        noise = share @ effect[:t, :t]
        assert variances[t - 1] == pytest.approx(q * noise @ noise, rel=1e-12)


def test_the_rescaled_decay_errs_in_first_order_and_the_kept_one_however_small_the_step():
    def differences(rate):
        decay = 1 - rate / 5
        return np.array(
            [
                batches.profile_differences(variant, rate, decay, round(40 / rate))
                for variant in batches.variants(decay, 8)
            ]
        )

    rare, rescaled, kept = differences(0.005) / differences(0.01)
    np.testing.assert_allclose(rescaled, 0.5, rtol=0.04)
    np.testing.assert_allclose(rare, [0.5, 0.5, 0.25], rtol=0.06)
    np.testing.assert_allclose(kept[-1], 1, rtol=0.01)


def test_pictures_are_drawn(tmp_path):
    generator = np.random.default_rng(0)
    errors = {
        name: [(step, generator.normal(size=(9, 5))) for step in (10, 20)]
        for name in polyak_juditsky.estimators(20)
    }
    polyak_juditsky.draw(tmp_path / "1.png", [(problem, errors) for problem in PROBLEMS])
    measured = [(0.5, 0.1)] * len(variance_law.SETTINGS)
    variance_law.draw(tmp_path / "2.png", measured)
    averages = generator.uniform(1, 2, size=(3, 9))
    variants = batches.variants(0.9, 4)
    batch_size_rule.draw(tmp_path / "3.png", [(v, averages) for v in variants], every=8)
    assert [path.read_bytes()[:4] for path in sorted(tmp_path.iterdir())] == [b"\x89PNG"] * 3
