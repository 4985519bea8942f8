"""Which averages can be rebuilt from stored ones, and what it would take to rebuild another."""

import math
import typing

import numpy as np

from polyak_model import rules
from polyak_model.posthoc.basis import Basis, Stored

_MOST_SNAPSHOTS = 128
_GRID = 81
_SMALL_BUDGET = 2**18


class Family(typing.NamedTuple):
    """Rules that differ in their length alone.

    Attributes:
        label: What the length is called.
        make: Function from a length to a rule.
        lowest: Float, the smallest length to try.
        highest: Float, the largest.
        length: Float, the length of the rule that the family was made for.
    """

    label: str
    make: typing.Callable
    lowest: float
    highest: float
    length: float

    def describe(self, length):
        """Returns a length with its label, a string."""
        return f"{self.label} {length:.3g}"


def relative_widths():
    """Returns the `Family` of power averages, by relative width."""
    return _power_family(rules.PowerAverage())


def half_lives(step):
    """Returns the `Family` of exponential averages, by half-life.

    Args:
        step: Int, the length of the run.
    """
    return _exponential_family(rules.ExponentialAverage(), step)


def family_of(rule, step):
    """Returns the `Family` of a rule, or None if the length of such a rule is unknown.

    Args:
        rule: A `polyak_model.rules.Rule`.
        step: Int, the length of the run.

    Example:

    >>> family_of(rules.UniformAverage(start_step=75), 100).length
    25
    """
    if type(rule) is rules.PowerAverage:
        return _power_family(rule)
    if type(rule) is rules.ExponentialAverage:
        return _exponential_family(rule, step)
    if type(rule) is rules.UniformAverage:
        every = rule.update_every

        def tail(length):
            return rules.UniformAverage(step - round(length), every)

        return Family("window in steps", tail, 1, step, step - rule.start_step)
    return None


def _power_family(rule):
    schedule = {"start_step": rule.start_step, "update_every": rule.update_every}

    def make(width):
        return rules.PowerAverage.from_relative_width(width, **schedule)

    return Family("relative width", make, 0.002, 12**-0.5, rule.relative_width)


def _exponential_family(rule, step):
    config = {name: value for name, value in rule.get_config().items() if name != "decay"}
    half_life = math.log(0.5) / math.log(rule.decay) if rule.decay else 0.1

    def make(steps):
        return rules.ExponentialAverage.from_half_life(steps, **config)

    return Family("half-life in steps", make, 0.1, 10.0 * step, half_life)


def find_reachable(basis, family, max_errors):
    """Finds the lengths of a family whose walk error is at most some value.

    Args:
        basis: A `Basis`.
        family: A `Family`.
        max_errors: Iterable of floats.

    Returns:
        A list with, for each of them, a list of ranges `(shortest, longest)`.
    """
    grid = np.geomspace(family.lowest, family.highest, _GRID)
    # Rounding must not leave the range.
    grid = np.clip(grid, family.lowest, family.highest)
    errors = np.array([basis.combine(family.make(x)).walk_error for x in grid])
    return [_ranges(grid, errors <= most) for most in max_errors]


def _ranges(grid, mask):
    edges = np.diff(np.concatenate([[0], mask.astype("int64"), [0]]))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    return list(zip(grid[starts].tolist(), grid[ends].tolist(), strict=True))


def find_nearest(basis, target, max_error):
    """Finds the length closest to a target's whose walk error is at most `max_error`.

    Args:
        basis: A `Basis`.
        target: A `polyak_model.rules.Rule`.
        max_error: Float.

    Returns:
        A string such as `relative width 0.026`; None if there is none.
    """
    family = family_of(target, basis.step)
    if family is None:
        return None
    (ranges,) = find_reachable(basis, family, [max_error])
    lengths = [length for each in ranges for length in each]
    if not lengths:
        return None
    length = max(family.length, family.lowest)
    return family.describe(min(lengths, key=lambda x: abs(math.log(x / length))))


def find_count(basis, target, max_error):
    """Finds how many evenly spaced snapshots of the same rules a target takes.

    Args:
        basis: A `Basis`.
        target: A `polyak_model.rules.Rule`.
        max_error: Float, the largest walk error.

    Returns:
        An int, a power of two; None if 128 are not enough.
    """
    averages = {each.name: each.rule for each in basis.stored}
    count = 8
    while count < _MOST_SNAPSHOTS:
        count *= 2
        steps = {max(1, basis.step * i // count) for i in range(1, count + 1)}
        stored = [Stored(step, name, rule) for step in steps for name, rule in averages.items()]
        fitted = Basis(stored, basis.step, _SMALL_BUDGET).combine(target)
        if fitted.walk_error <= max_error:
            return count
    return None
