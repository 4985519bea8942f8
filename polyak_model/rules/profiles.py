"""The shares of iterates in an average, and what follows from them."""

import typing

import numpy as np

from polyak_model.errors import check_integer

if typing.TYPE_CHECKING:
    from polyak_model.rules.rule import Rule

# In moves of an average, so that long runs take little memory.
BLOCK = 2**16


def shares(rule: "Rule", n: int) -> np.ndarray:
    """Returns the shares of the iterates of steps 1 to n in the average after step n.

        a_t = w_t * (1 - w_{t+1}) * ... * (1 - w_n)

    where w_t is the weight of the rule at step t, and 0 where the average does
    not move. The share of the weights before the first step is `1 - sum(a)`.

    Args:
        rule: A `Rule`.
        n: Int, at least 1, the number of optimizer steps.

    Returns:
        A float64 array of shape `(n,)`.

    Raises:
        ValueError: If `n` is not an int of at least 1.

    Example:

    >>> from polyak_model import ExponentialAverage, UniformAverage
    >>> shares(UniformAverage(), 4)
    array([0.25, 0.25, 0.25, 0.25])
    >>> shares(ExponentialAverage(0.5, debias=False), 3)
    array([0.125, 0.25 , 0.5  ])
    """
    steps = np.arange(1, check_integer("n", n, at_least=1) + 1)
    weights = np.where(rule.moves_at(steps), rule.weight(steps, rule.update_every), 0.0)
    return weights * kept_shares(weights)


def cumulative_share(rule, n, steps):
    """Returns the share of the iterates up to some steps in the average after step n.

        F(s) = (1 - w_{s+1}) * (1 - w_{s+2}) * ... * (1 - w_n)

    where w_t is the weight of the rule at step t, and 0 where the average does
    not move. The weights before the first step count as the iterate of step 0.
    For the rules of this package it is computed in closed form, so that runs of
    any length take no longer.

    Args:
        rule: A `Rule`.
        n: Int, at least 1, the number of optimizer steps.
        steps: Array of ints.

    Returns:
        A float64 array of the shape of `steps`, 0 for negative steps and 1 from
        n on.

    Example:

    >>> from polyak_model import ExponentialAverage, UniformAverage
    >>> cumulative_share(UniformAverage(), 4, np.arange(-1, 6))
    array([0.  , 0.  , 0.25, 0.5 , 0.75, 1.  , 1.  ])
    >>> cumulative_share(ExponentialAverage(0.5, debias=False), 3, np.arange(4))
    array([0.125, 0.25 , 0.5  , 1.   ])
    """
    start, every = rule.start_step, rule.update_every
    steps = np.asarray(steps)
    last = (n - start) // every
    if last < 1:
        # The average still equals one iterate.
        return (steps >= min(n, start)).astype("float64")
    moves = np.clip((steps - start) // every, 0, last).astype("float64")
    with np.errstate(divide="ignore"):
        growth = rule._log_growth(np.append(moves, float(last)))
    return np.where(steps >= start, np.exp(growth[:-1] - growth[-1]), 0.0)


def kept_shares(weights):
    """Returns the share of each iterate that later ones leave."""
    return np.append(np.cumprod(1 - weights[:0:-1])[::-1], 1.0)


def memory(rule, step):
    """Returns the mean age of the iterates and the sum of the squares of their shares.

    Over the moves of the average, with the weight w_m of move m,

        age_m = (1 - w_m) * (age_{m-1} + 1)
        square_m = (1 - w_m)**2 * square_{m-1} + w_m**2
    """
    steps = np.asarray(step)
    if steps.dtype.kind not in "iu" or (steps < 0).any():
        raise ValueError(
            f"`step` counts optimizer steps: it must be an int of at least 0, or an array of them. "
            f"Received: step={step!r}."
        )
    since_start = np.maximum(steps - rule.start_step, 0)
    moves, since_move = np.divmod(since_start, rule.update_every)
    ends, positions = np.unique(moves, return_inverse=True)
    age, square, done, found = 0.0, 1.0, 0, []
    for end in ends:
        while done < end:
            block = np.arange(done + 1, min(end, done + BLOCK) + 1)
            t = rule.start_step + rule.update_every * block
            weights = rule.weight(t, rule.update_every)
            kept = kept_shares(weights)
            remaining = kept[0] * (1 - weights[0])
            age = remaining * (age + len(block)) + (weights * kept) @ (block[-1] - block)
            square = remaining**2 * square + (weights * kept) @ (weights * kept)
            done = block[-1]
        found.append((age, square))
    ages, squares = np.array(found).T[:, positions.reshape(steps.shape)]
    ages = rule.update_every * ages + since_move
    return (float(ages), float(squares)) if steps.ndim == 0 else (ages, squares)
