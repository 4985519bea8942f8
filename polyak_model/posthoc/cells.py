"""Cells of a run, in which profiles of averages are compared."""

import itertools
import math

import numpy as np

from polyak_model.rules import cumulative_share

_MOST = 2**15
_FEWEST = 8  # Between a knot and the middle before the next.


class Cells:
    """Intervals (a, b] of steps, in which every iterate counts as much as the others.

    Cells have one iterate each, unless the run is too long for that. Then they
    become larger with the distance from the steps at which averages begin or end,
    where profiles may be steep. Of iterates that the stored averages skip, each
    belongs to the next that they do not skip.

    Args:
        stored: Iterable of `Stored` averages.
        step: Int, where the last cell ends.
        budget: Int, the largest number of cells times stored averages with one
            iterate per cell.
    """

    def __init__(self, stored, step, budget):
        rarest = max((each.rule for each in stored), key=lambda rule: rule.update_every)
        self._every, self._start = rarest.update_every, rarest.start_step % rarest.update_every
        self._step = step
        budget //= len(stored)
        knots = {each.step for each in stored}
        knots |= {each.rule.start_step - offset for each in stored for offset in (0, 1)}
        if step <= budget * self._every:
            borders = np.arange(0, step + 1, self._every)
        else:
            borders = _graded(
                sorted({0, step, *(k for k in knots if 0 < k < step)}), min(budget, _MOST)
            )
        borders = np.union1d(borders, [knot for knot in knots if knot > 0])
        # Onto the steps at which the average that moves most rarely does.
        borders = (borders - self._start) // self._every * self._every + self._start
        first = min(self._start, 0) - self._every
        inner = np.unique(borders[(borders >= 0) & (borders < step)])
        self.borders = np.concatenate([[first], inner, [step]])
        self._counts = np.maximum(np.diff(self.borders) / self._every, 1.0)

    def cumulate(self, rule, n):
        """Returns the share of the iterates up to each border in the average after step n.

        Args:
            rule: A `polyak_model.rules.Rule`.
            n: Int.
        """
        return cumulative_share(rule, n, self.borders)

    def profile(self, cumulated):
        """Returns profiles, scaled such that their L2 norms are those of the shares.

        Args:
            cumulated: Array whose first axis is that of the borders.
        """
        shares = np.diff(cumulated, axis=0)
        return shares / np.sqrt(self._counts).reshape(-1, *[1] * (shares.ndim - 1))

    def walk(self, cumulated):
        """Returns the RMS of the average of a random walk, relative to its end.

        Each increment enters with the share of the iterates before it, which is
        linear in a cell.

        Args:
            cumulated: Array of shape (borders,).
        """
        before, total = cumulated[:-1], np.diff(cumulated)
        n = self._counts
        # The means of s / n and of its square over s = 0, ..., n - 1.
        mean, square = (n - 1) / (2 * n), (n - 1) * (2 * n - 1) / (6 * n**2)
        squares = before**2 + 2 * before * total * mean + total**2 * square
        return math.sqrt(n @ squares)


def _graded(knots, budget):
    """Returns borders that are denser near the knots."""
    count = max(budget // (2 * len(knots)), _FEWEST)
    borders = [knots]
    for a, b in itertools.pairwise(knots):
        distances = np.geomspace(1, max((b - a) / 2, 1), count).astype("int64")
        borders += [a + distances, b - distances]
    return np.unique(np.concatenate(borders))
