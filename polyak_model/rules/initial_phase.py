"""Warns of averages that remember the initial phase of a run."""

import warnings
from collections.abc import Mapping

from polyak_model.rules import Rule

# An average over the second half of a run has a mean age of a quarter of it, one over the whole
# run of a half.
_OLDEST = 1 / 3


def warn_of_initial_phase(rules: Mapping[str, Rule], step: int, stacklevel: int = 2) -> None:
    """Warns for each average that remembers the initial phase of a run.

    It does if the mean age of its iterates is above a third of the run, or its
    half-life is longer than the run.

    Args:
        rules: A dict from the name of each average to its rule.
        step: Int, the optimizer steps of the run.
        stacklevel: As in `warnings.warn`. Defaults to 2, the caller.

    Example:

    >>> from polyak_model import PowerAverage, UniformAverage
    >>> rules = {"uniform": UniformAverage(), "power": PowerAverage()}
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_of_initial_phase(rules, step=3000)
    >>> [str(each.message).partition(":")[0] for each in caught]
    ["The average 'uniform' remembers the initial phase of training"]
    """
    for name, rule in rules.items():
        age, half_life = rule.mean_age(step), rule.half_life
        if age <= _OLDEST * step and (half_life is None or half_life <= step):
            continue
        length = "" if half_life is None else f" and its half-life is {half_life:,.0f} steps"
        warnings.warn(
            f"The average {name!r} remembers the initial phase of training: after {step:,} steps "
            f"the mean age of its iterates is {age:,.0f} steps{length}. Use PowerAverage(), whose "
            "memory is a fraction of the run; a shorter half-life, such as "
            f"ExponentialAverage.from_half_life({max(1, step // 10)}); or a later start, "
            f"start_step={step // 2}.",
            stacklevel=stacklevel,
        )
