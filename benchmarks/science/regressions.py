"""Regressions with normal inputs: stochastic gradients, and their H and S.

H is the Hessian of the expected loss at the optimum, and S the covariance of the
gradients of single examples there. The step sizes are gamma_0 * t**-0.6.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

EXPONENT = 0.6


@dataclass(frozen=True)
class Regression:
    """One problem.

    Attributes:
        name: String.
        optimum: Array, the true parameters.
        scales: Array, the standard deviation of each input.
        hessian: Array, H at the optimum.
        noise: Array, S, the covariance of the gradients at the optimum.
        residual: Callable from the linear predictor, its true value, the inputs
            and a standard normal draw to the derivative of the loss by the
            predictor.
        pull: Array, f'''[Sigma] / 2: the shift of the mean gradient by noise of
            covariance Sigma around the optimum, where H Sigma + Sigma H = S.
        first_rate: Float, gamma_0 times the largest eigenvalue of H.
    """

    name: str
    optimum: np.ndarray
    scales: np.ndarray
    hessian: np.ndarray
    noise: np.ndarray
    residual: object
    pull: np.ndarray
    first_rate: float = 0.5

    @property
    def covariance(self):
        """V, n times the covariance of the optimal estimate from n examples."""
        inverse = np.linalg.inv(self.hessian)
        return inverse @ self.noise @ inverse

    @property
    def first_step_size(self):
        """gamma_0."""
        return self.first_rate / np.linalg.eigvalsh(self.hessian).max()

    def step(self, replicas, seed):
        """Returns the function from an iterate and a step to the next iterate."""
        shape = (replicas, len(self.optimum) + 1)
        optimum, scales = tf.constant(self.optimum), tf.constant(self.scales)

        def take_step(iterate, t):
            key = tf.stack([tf.constant(seed, "int64"), t])
            draws = tf.random.stateless_normal(shape, key, dtype="float64")
            x, draw = draws[:, :-1] * scales, draws[:, -1]
            predictor, truth = tf.reduce_sum(x * iterate, 1), tf.reduce_sum(x * optimum, 1)
            gradient = x * self.residual(predictor, truth, x, draw)[:, None]
            return iterate - self.first_step_size * tf.cast(t, "float64") ** -EXPONENT * gradient

        return take_step


def unit_vector(size):
    """Returns the vector of length 1 with equal entries."""
    return np.full(size, size**-0.5)


def linear_regression(size=5):
    """Linear regression with inputs of covariance 1 and noise of variance (1 + x_1**2) / 2."""
    noise = np.eye(size)
    noise[0, 0] = 2  # E[(1 + x**2) / 2 * x**2], where E[x**4] = 3
    return Regression(
        "linear regression",
        unit_vector(size),
        np.ones(size),
        np.eye(size),
        noise,
        lambda predictor, truth, x, draw: (
            predictor - truth - draw * tf.sqrt((1 + x[:, 0] ** 2) / 2)
        ),
        pull=np.zeros(size),
    )


def logistic_regression(size=5):
    """Logistic regression, inputs of covariance 1, labels from the model: S = H, by quadrature."""
    optimum = unit_vector(size)
    nodes, mass = np.polynomial.hermite_e.hermegauss(200)
    chance = 1 / (1 + np.exp(-nodes))
    slope = chance * (1 - chance) * mass / mass.sum()
    across, along = slope.sum(), (slope * nodes**2).sum()
    hessian = across * np.eye(size) + (along - across) * np.outer(optimum, optimum)
    # E[sigmoid''(z) * x.T Sigma x * x] / 2, with x = z along the optimum, and Sigma = 1 / 2.
    bend = slope * (1 - 2 * chance)
    pull = (bend * nodes * (nodes**2 + size - 1)).sum() / 4 * optimum

    def residual(predictor, truth, x, draw):
        # A standard normal draw below this quantile has the probability of the label 1.
        label = tf.cast(0.5 * tf.math.erfc(-draw * 2**-0.5) < tf.sigmoid(truth), "float64")
        return tf.sigmoid(predictor) - label

    return Regression(
        "logistic regression", optimum, np.ones(size), hessian, hessian, residual, pull
    )


def ill_conditioned_regression(eigenvalues=(1.0, 0.1, 0.01, 0.001, 0.0001)):
    """Linear regression with inputs of these variances and noise of variance 1."""
    hessian = np.diag(eigenvalues)
    return Regression(
        "ill-conditioned linear regression",
        np.ones(len(eigenvalues)),
        np.sqrt(eigenvalues),
        hessian,
        hessian,
        lambda predictor, truth, x, draw: predictor - truth - draw,
        pull=np.zeros_like(eigenvalues),
    )
