"""Averages of checkpoints that imitate a decay of the learning rate."""

import numpy as np

from polyak_model.errors import check_choice, check_integer

_DECAYS = {
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
}


def decay_shares(shape, n):
    """Returns the shares of n checkpoints whose average imitates a decay of the learning rate.

        c_j = w((j - 1) / n) - w(j / n)

    where w(x), from w(0) = 1 to w(1) = 0, is the factor of the learning rate after
    the fraction x of the decay: `(1 + cos(pi * x)) / 2`, `1 - x` or `1 - sqrt(x)`. To
    first order, training at a constant rate and averaging checkpoints at even
    distances with these shares gives the weights of training with the decay.

    Args:
        shape: `"cosine"`, `"linear"` or `"1-sqrt"`.
        n: Int, at least 1, the number of checkpoints.

    Returns:
        A float64 array of shape `(n,)` that sums to 1, the earliest checkpoint first.

    Raises:
        ValueError: If `shape` is another string, or `n` is not an int of at least 1.

    Example:

    >>> decay_shares("linear", 4)
    array([0.25, 0.25, 0.25, 0.25])
    >>> decay_shares("cosine", 5).round(6)
    array([0.095492, 0.25    , 0.309017, 0.25    , 0.095492])

    Reference:
        Tian et al. 2025, WSM: decay-free learning rate schedule via checkpoint
        merging, section 3.
    """
    check_choice("shape", shape, tuple(_DECAYS))
    x = np.arange(check_integer("n", n, at_least=1, counts="checkpoints") + 1) / n
    return -np.diff(_DECAYS[shape](x))
