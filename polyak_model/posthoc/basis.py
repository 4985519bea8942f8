"""Averages as linear combinations of stored averages: profiles, coefficients and errors.

An average gives each iterate a share, and its profile is all its shares. From
profiles alone, without any weights, follow the coefficients with which stored
averages add up to another one, and the errors to expect.

Reference:
    Karras et al. 2024, Analyzing and improving the training dynamics of
    diffusion models, section 3 and appendix C.
"""

import math
import typing

import numpy as np

from polyak_model.posthoc.cells import Cells

# In numbers of float64. Beyond it, iterates are joined into cells.
BUDGET = 2**21
# A profile that is closer to the span of later ones, relative to its norm, is left out: its
# coefficient would multiply the rounding errors of the stored averages.
_SPANNED = 1e-6
# More make no average that is asked for more exact.
_EVEN, _LATE = 64, 32


class Stored(typing.NamedTuple):
    """An average that was stored after a step.

    Attributes:
        step: Int, optimizer steps since averaging (re)started.
        name: String.
        rule: Its `polyak_model.rules.Rule`.
    """

    step: int
    name: str
    rule: typing.Any


class Combination(typing.NamedTuple):
    """A linear combination of stored averages that comes close to a target.

    Attributes:
        coefficients: Dict from `(step, name)` to a float. They sum to 1.
        profile_error: Float, the L2 norm of the error of the shares, relative to
            that of the target's shares: the relative error if iterates are white
            noise.
        walk_error: Float, the expected error relative to the target's distance
            from the raw weights if iterates walk at random.
        rounding: Float, the sum of the absolute coefficients, by which rounding
            errors of the stored averages are multiplied at most.
    """

    coefficients: dict
    profile_error: float
    walk_error: float
    rounding: float


class Basis:
    """The span of the averages that were stored up to a step.

    Of more than a hundred steps, some are chosen: evenly over the run, and
    denser towards its end.

    Args:
        stored: `Stored` averages of one run.
        step: Int, the step of the targets. Later averages do not count.
        budget: Int. A smaller one makes long runs faster and less exact.

    Raises:
        ValueError: If there is no average of that step or before.

    Example:

    >>> from polyak_model.rules import PowerAverage
    >>> rules = PowerAverage.pair()
    >>> stored = [Stored(n, name, rules[name]) for n in (50, 100) for name in rules]
    >>> combination = Basis(stored, 100).combine(PowerAverage.from_relative_width(0.10))
    >>> round(math.fsum(combination.coefficients.values()), 12)
    1.0
    >>> round(combination.profile_error, 3), round(combination.walk_error, 3)
    (0.301, 0.293)
    """

    def __init__(self, stored, step, budget=BUDGET):
        # What later averages span already is left out.
        stored = sorted((each for each in stored if each.step <= step), key=lambda s: -s.step)
        if not stored:
            raise ValueError(
                f"`stored` must contain an average of step {step} or before. Received: none."
            )
        chosen = _choose([each.step for each in stored])
        stored = [each for each in stored if each.step in chosen]
        self.step = step
        self._cells = Cells(stored, step, budget)
        columns = np.stack([self._cells.cumulate(each.rule, each.step) for each in stored], 1)
        profiles = self._cells.profile(columns)
        norms = np.linalg.norm(profiles, axis=0)
        _, triangle = np.linalg.qr(profiles / norms)
        kept = np.abs(np.diagonal(triangle)) > _SPANNED
        self.stored = [each for each, is_kept in zip(stored, kept, strict=False) if is_kept]
        kept = np.flatnonzero(kept)
        self._columns, self._scales = columns[:, kept], 1 / norms[kept]
        self._q, self._r = np.linalg.qr(profiles[:, kept] * self._scales)

    def combine(self, target):
        """Returns the `Combination` whose profile is closest to that of a target at `step`.

        With the profiles P of the stored averages and p of the target,

            minimize |P c - p|**2   subject to   sum(c) = 1

        Args:
            target: A `polyak_model.rules.Rule`.
        """
        cumulated = self._cells.cumulate(target, self.step)
        profile = self._cells.profile(cumulated)
        free = np.linalg.solve(self._r, self._q.T @ profile)
        # The bordered system: along this direction the sum changes at the least cost.
        along = np.linalg.solve(self._r, np.linalg.solve(self._r.T, self._scales))
        scaled = free + along * (1 - self._scales @ free) / (self._scales @ along)
        coefficients = scaled * self._scales
        largest = np.argmax(np.abs(coefficients))
        coefficients[largest] += 1 - math.fsum(coefficients)
        difference = self._columns @ coefficients - cumulated
        profile_error = np.linalg.norm(self._cells.profile(difference)) / np.linalg.norm(profile)
        wandered, distance = map(self._cells.walk, (difference, cumulated))
        walk_error = wandered / distance if distance else math.inf
        keys = [(each.step, each.name) for each in self.stored]
        return Combination(
            dict(zip(keys, coefficients.tolist(), strict=True)),
            float(profile_error),
            float(walk_error),
            float(np.abs(coefficients).sum()),
        )


def _choose(steps):
    """Returns at most a hundred of the steps, a set."""
    steps = np.unique(steps)
    last = len(steps) - 1
    if last < _EVEN + _LATE:
        return set(steps.tolist())
    even = np.linspace(0, last, _EVEN)
    late = last + 1 - np.geomspace(1, last + 1, _LATE)
    return set(steps[np.concatenate([even, late]).astype("int64")].tolist())
