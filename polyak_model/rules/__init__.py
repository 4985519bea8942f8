"""Averaging rules: the weight of the newest iterate in the average. They need NumPy alone."""

from polyak_model.errors import is_number
from polyak_model.rules.exponential import ExponentialAverage, rescale_decay
from polyak_model.rules.growing import PolynomialAverage, PowerAverage, UniformAverage
from polyak_model.rules.profiles import cumulative_share, shares
from polyak_model.rules.rate_decay import decay_shares
from polyak_model.rules.rule import Rule

__all__ = [
    "ExponentialAverage",
    "PolynomialAverage",
    "PowerAverage",
    "Rule",
    "UniformAverage",
    "cumulative_share",
    "decay_shares",
    "get",
    "rescale_decay",
    "shares",
]

for _rule in (ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage):
    _rule.__module__ = __name__  # The name in files of every format.


def get(average: float | Rule) -> Rule:
    """Returns the rule given by `average`, where a float is a decay.

    Args:
        average: A float in [0, 1), the decay of an `ExponentialAverage`, or a
            rule.

    Returns:
        A `Rule`.

    Raises:
        ValueError: If it is neither.

    Example:

    >>> get(0.99).decay
    0.99
    """
    if isinstance(average, Rule):
        return average
    if is_number(average):
        return ExponentialAverage(average)
    hint = ""
    if isinstance(average, type) and issubclass(average, Rule):
        hint = f" Pass an instance: {average.__name__}()."
    raise ValueError(
        "`average` must be a decay in [0, 1) or a rule such as UniformAverage(). "
        f"Received: average={average!r}.{hint}"
    )
