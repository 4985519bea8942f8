"""A quadratic trained on the same examples with small or with large batches.

Mean and variance of the average are computed exactly. A small batch is one example,
whose noise has variance 1. Time is measured in examples.
"""

from dataclasses import dataclass

import numpy as np
from trajectories import weights

from polyak_model import ExponentialAverage, rescale_decay


def large_batch(rate, ratio):
    """Returns a and the noise variance q of the step w -> a * w + noise with a large batch.

    Args:
        rate: Float, gamma * lambda of the small batch.
        ratio: Int, kappa.
    """
    return 1 - rate * ratio, rate**2 * ratio


def small_steps(rate, ratio):
    """Returns the same for `ratio` small steps combined."""
    a = (1 - rate) ** ratio
    return a, rate**2 * (1 - a**2) / (1 - (1 - rate) ** 2)


def profile(a, q, decay, steps):
    """Computes the mean and the variance of the average after each step.

    The iterate starts at 1 and follows w -> a * w + noise of variance q. The
    debiased average does not include the start.

    Args:
        a: Float.
        q: Float.
        decay: Float, decay of the average.
        steps: Int.

    Returns:
        Two arrays with an entry per step.
    """
    weight = weights(ExponentialAverage(decay), steps)
    mean_raw = mean_average = 1.0
    var_raw = covariance = var_average = 0.0
    means, variances = np.zeros(steps), np.zeros(steps)
    for i, c in enumerate(weight):
        mean_raw *= a
        mean_average += c * (mean_raw - mean_average)
        var_raw = a**2 * var_raw + q
        with_old = a * covariance
        covariance = (1 - c) * with_old + c * var_raw
        var_average = (1 - c) ** 2 * var_average + 2 * c * (1 - c) * with_old + c**2 * var_raw
        means[i], variances[i] = mean_average, var_average
    return means, variances


@dataclass(frozen=True)
class Variant:
    """A way to train and average on the same examples, to compare with the small batch.

    Attributes:
        name: String.
        ratio: Int, examples between two updates of the average.
        decay: Float, decay of the average per update.
        dynamics: `large_batch` or `small_steps`.
    """

    name: str
    ratio: int
    decay: float
    dynamics: object = large_batch

    def profile(self, rate, examples):
        """Returns mean and variance of the average after each of its updates."""
        return profile(*self.dynamics(rate, self.ratio), self.decay, examples // self.ratio)


def variants(decay, ratio):
    """Returns the variants for one kappa."""
    rescaled = rescale_decay(decay, ratio)
    return [
        Variant("update_every", ratio, rescaled, small_steps),
        Variant("rescaled", ratio, rescaled),
        Variant("kept", ratio, decay),
    ]


def profile_differences(variant, rate, decay, examples):
    """Compares mean and variance with those of the small batch at the same number of examples.

    Args:
        variant: A `Variant`.
        rate: Float, gamma * lambda of the small batch.
        decay: Float, decay for the small batch.
        examples: Int.

    Returns:
        Three floats: the largest difference of the means, with a start of 1; the
        largest difference of the variances relative to the largest variance; and
        the difference of the final variances relative to the final one.
    """
    at = slice(variant.ratio - 1, None, variant.ratio)
    mean, variance = (p[at] for p in Variant("small", 1, decay).profile(rate, examples))
    new_mean, new_variance = variant.profile(rate, examples)
    difference = np.abs(new_variance - variance)
    return (
        np.abs(new_mean - mean).max(),
        difference.max() / variance.max(),
        difference[-1] / variance[-1],
    )
