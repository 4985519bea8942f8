"""Averages whose memory grows with the run: uniform, polynomial and power averages."""

import math
import typing
from typing import Any

import numpy as np

from polyak_model.errors import check_exponent, is_number
from polyak_model.rules.rule import Rule

if typing.TYPE_CHECKING:
    from typing_extensions import Self

# Names and relative widths of the averages that `PowerAverage.pair` and `.triple` propose.
_PAIR = {"short": 0.03, "long": 0.20}
_TRIPLE = {"short": 0.03, "medium": 0.10, "long": 0.25}


class UniformAverage(Rule):
    """The Polyak average: the uniform mean of all iterates.

    The weight at step t and stride k is `k / t`.

    Args:
        start_step: Int. Steps for which the average mirrors the raw weights.
            Defaults to 0.
        update_every: Int. Steps between two moves of the average; it is then
            the mean of every `update_every`-th iterate. Defaults to 1.

    Example:

    >>> [round(UniformAverage().weight(step), 3) for step in (1, 2, 3)]
    [1.0, 0.5, 0.333]

    Reference:
        Polyak & Juditsky 1992, Acceleration of stochastic approximation by
        averaging; Ruppert 1988.
    """

    def _share(self, t, k, xp):
        return k / t

    def _log_growth(self, moves):
        return np.log(moves)


class PolynomialAverage(Rule):
    """Polynomial-decay averaging: weights grow polynomially with the step.

    With n updates before this one, the weight is `(eta + 1) / (n + 1 + eta)`.
    `eta=0` is the uniform mean.

    Args:
        eta: Float, at least 0. Defaults to 3.
        start_step: Int. Steps for which the average mirrors the raw weights.
            Defaults to 0.
        update_every: Int. Steps between two moves of the average. Defaults to 1.

    Raises:
        ValueError: If `eta` is not a finite number of at least 0.

    Example:

    >>> [round(PolynomialAverage(eta=3).weight(step), 3) for step in (1, 2, 3)]
    [1.0, 0.8, 0.667]

    Reference:
        Shamir & Zhang 2013, Stochastic gradient descent for non-smooth
        optimization, section 4.
    """

    def __init__(self, eta: float = 3, start_step: int = 0, update_every: int = 1) -> None:
        super().__init__(start_step, update_every)
        self.eta = check_exponent("eta", eta)

    def _share(self, t, k, xp):
        n = t / k - 1
        return (self.eta + 1) / (n + 1 + self.eta)

    def _log_growth(self, moves):
        return _log_rising(moves, self.eta + 1)

    def get_config(self) -> dict[str, Any]:
        return {"eta": self.eta, **super().get_config()}


class PowerAverage(Rule):
    """Power-function average: its width grows in proportion to the run.

    The weight at step t and stride k is `1 - (1 - k / t)**(gamma + 1)`. The
    shares of past iterates follow a power of the step, so their standard
    deviation stays a constant fraction of the run so far.

    Args:
        gamma: Float, at least 0. Defaults to 6.94, a relative width of 0.10.
        start_step: Int. Steps for which the average mirrors the raw weights.
            Defaults to 0.
        update_every: Int. Steps between two moves of the average. Defaults to 1.

    Raises:
        ValueError: If `gamma` is not a finite number of at least 0.

    Example:

    >>> [round(PowerAverage(gamma=1).weight(step), 3) for step in (1, 2, 3)]
    [1.0, 0.75, 0.556]

    Reference:
        Karras et al. 2024, Analyzing and improving the training dynamics of
        diffusion models, equation 127.
    """

    def __init__(self, gamma: float = 6.94, start_step: int = 0, update_every: int = 1) -> None:
        super().__init__(start_step, update_every)
        self.gamma = check_exponent("gamma", gamma)

    @classmethod
    def from_relative_width(
        cls, sigma_rel: float, *, start_step: int = 0, update_every: int = 1
    ) -> "Self":
        """Returns the rule whose profile has this standard deviation.

        `gamma` solves `sigma_rel**2 * (gamma + 2)**2 * (gamma + 3) = gamma + 1`.

        Args:
            sigma_rel: Float in (0, 12**-0.5]: the standard deviation of the
                profile, as a fraction of the steps so far.
            start_step: Int, as in `PowerAverage`. Defaults to 0.
            update_every: Int, as in `PowerAverage`. Defaults to 1.

        Returns:
            A `PowerAverage`.

        Raises:
            ValueError: If `sigma_rel` is out of its range.

        Example:

        >>> round(PowerAverage.from_relative_width(0.10).gamma, 2)
        6.94
        """
        if not is_number(sigma_rel) or not 0 < sigma_rel <= 12**-0.5:
            raise ValueError(
                "`sigma_rel` must be in (0, 0.2887]; 0.2887 = 12**-0.5 is the uniform mean. "
                f"Received: sigma_rel={sigma_rel!r}."
            )
        s = sigma_rel**-2.0
        gamma = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max()
        return cls(max(float(gamma), 0.0), start_step, update_every)

    @property
    def relative_width(self):
        """The standard deviation of the profile, as a fraction of the steps so far.

        Example:

        >>> round(PowerAverage(gamma=6.937203937602).relative_width, 12)
        0.1
        """
        return math.sqrt((self.gamma + 1) / (self.gamma + 3)) / (self.gamma + 2)

    @classmethod
    def pair(cls, **kwargs):
        """Returns the two averages to keep if the length is chosen after training.

        Any other power average of relative width 0.03 to 0.25 can be rebuilt from
        snapshots of these two. Of all pairs tried, this one has the smallest
        worst error over these widths: with 16 snapshots 0.5 % of the distance
        from the raw weights for iterates that walk at random, where 0.05 and 0.10
        have 2 %, and with coefficients of the smallest absolute sum.

        Args:
            **kwargs: The other arguments of `PowerAverage`.

        Returns:
            A dict from name to `PowerAverage`: `"short"` of relative width 0.03
            and `"long"` of 0.20.

        Example:

        >>> {name: round(rule.gamma, 2) for name, rule in PowerAverage.pair().items()}
        {'short': 30.32, 'long': 1.83}
        """
        return {name: cls.from_relative_width(w, **kwargs) for name, w in _PAIR.items()}

    @classmethod
    def triple(cls, **kwargs):
        """Returns the three averages to keep if the length is chosen after training.

        With two thirds of the snapshots of `pair`, on the same disk space, the
        worst error over relative widths of 0.03 to 0.25 is a third of that of
        `pair`.

        Args:
            **kwargs: The other arguments of `PowerAverage`.

        Returns:
            A dict from name to `PowerAverage`: `"short"` of relative width 0.03,
            `"medium"` of 0.10 and `"long"` of 0.25.

        Example:

        >>> {name: round(rule.gamma, 2) for name, rule in PowerAverage.triple().items()}
        {'short': 30.32, 'medium': 6.94, 'long': 0.72}
        """
        return {name: cls.from_relative_width(w, **kwargs) for name, w in _TRIPLE.items()}

    def _share(self, t, k, xp):
        return -xp.expm1((self.gamma + 1) * xp.log1p(-k / t))

    def _log_growth(self, moves):
        return (self.gamma + 1) * np.log(moves)

    def get_config(self) -> dict[str, Any]:
        return {"gamma": self.gamma, **super().get_config()}


def _log_rising(x, a):
    """Returns `log(gamma(x + a) / gamma(x))` for an array x, without cancellation."""
    shift = np.arange(16.0)
    low = np.log1p(a / (x[:, None] + shift)).sum(1)
    x = x + len(shift)
    y = x + a
    stirling = (y - 0.5) * np.log1p(a / x) + a * np.log(x) - a + _stirling(y) - _stirling(x)
    # gamma(x + a) / gamma(x) has the factors (x + a) / x, which the shift takes out.
    return stirling - low


def _stirling(x):
    return 1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5) - 1 / (1680 * x**7)
