"""Predictions for an average of a finite number of SGD steps."""

import numpy as np
from regressions import EXPONENT

from polyak_model.rules import shares


def finite_run(share, step_size, eigenvalues):
    """Solves the linear recursion for averages of n steps.

    The error e follows e += -gamma_t * (lambda * e - noise_t), with noise of
    variance 1 and a start at e = 1.

    Args:
        share: Array (r, n), the share of each iterate in r averages.
        step_size: Array (n,), gamma_t.
        eigenvalues: Array (k,), values of lambda.

    Returns:
        Two arrays (r, k), the variance and the mean of the averages.
    """
    # Contribution of a unit of error right after step t to the average.
    effect = np.zeros((len(share), len(eigenvalues)))
    variance = np.zeros_like(effect)
    for t in reversed(range(len(step_size))):
        effect += share[:, t, None]
        variance += (step_size[t] * effect) ** 2
        effect *= 1 - step_size[t] * eigenvalues
    return variance, effect


def predict(regression, rules, steps):
    """Predicts averages of n steps from 0.

    Adds to the linear recursion with noise of covariance S the effect of changing
    curvature: noise of covariance gamma_t * Sigma around the optimum shifts the
    mean gradient by gamma_t * `regression.pull`, and the iterate by -H^-1 times
    that.

    Args:
        regression: A `Regression`.
        rules: List of rules.
        steps: Int, n.

    Returns:
        Two arrays with an entry per rule: n * tr Cov / tr V and
        n * |bias|**2 / tr V.
    """
    values, vectors = np.linalg.eigh(regression.hessian)
    noise = np.diag(vectors.T @ regression.noise @ vectors)
    share = np.stack([shares(rule, steps) for rule in rules])
    step_size = regression.first_step_size * np.arange(1, steps + 1.0) ** -EXPONENT
    variance, start = finite_run(share, step_size, values)
    pull = vectors.T @ regression.pull / values
    bias = -start * (vectors.T @ regression.optimum) - np.outer(share @ step_size, pull)
    scale = steps / np.trace(regression.covariance)
    return scale * (variance * noise).sum(axis=1), scale * (bias**2).sum(axis=1)
