"""What each of n weight files counts under a rule, in closed form and without Keras.

The rules of `polyak_model.rules` say how much of the newest iterate enters an
average; these are the weighted sums that come out of them.
"""

import itertools
import math

from polyak_model.errors import check_decay, check_exponent


def uniform(count):
    """Returns `count` equal weights."""
    return [1.0] * count


def exponential(count, decay):
    """Returns weights in proportion to `decay**age`: those of the debiased `ExponentialAverage`.

    Args:
        count: How many files there are.
        decay: Float in [0, 1).

    Returns:
        A list of floats, the last of them 1.

    Raises:
        ValueError: If `decay` is out of its range.

    Example:

    >>> exponential(3, decay=0.5)
    [0.25, 0.5, 1.0]
    """
    decay = check_decay(decay)
    return [decay**age for age in reversed(range(count))]


def polynomial(count, eta):
    """Returns weights in proportion to `gamma(i + eta) / gamma(i)`: those of `PolynomialAverage`.

    Args:
        count: How many files there are.
        eta: Float, at least 0.

    Returns:
        A list of floats, the last of them 1.

    Raises:
        ValueError: If `eta` is out of its range.

    Example:

    >>> [round(weight, 6) for weight in polynomial(3, eta=1)]
    [0.333333, 0.666667, 1.0]
    """
    eta = check_exponent("eta", eta)
    logs = [math.lgamma(i + eta) - math.lgamma(i) for i in range(1, count + 1)]
    return [math.exp(log - logs[-1]) for log in logs]


def power(count, gamma):
    """Returns weights in proportion to `i**(gamma + 1) - (i - 1)**(gamma + 1)`: `PowerAverage`'s.

    Args:
        count: How many files there are.
        gamma: Float, at least 0.

    Returns:
        A list of floats.

    Raises:
        ValueError: If `gamma` is out of its range.

    Example:

    >>> [round(weight * 9) for weight in power(3, gamma=1)]
    [1, 3, 5]
    """
    exponent = check_exponent("gamma", gamma) + 1
    steps = [(i / count) ** exponent for i in range(count + 1)]
    return [after - before for before, after in itertools.pairwise(steps)]
