"""The exponential average, whose memory has a fixed length."""

import math
import typing
from typing import Any

import numpy as np

from polyak_model.errors import check_decay, check_positive
from polyak_model.rules.rule import LOG_TINY, Rule, float64

if typing.TYPE_CHECKING:
    from typing_extensions import Self


class ExponentialAverage(Rule):
    """Exponential moving average: the share of an iterate shrinks by `decay` at each step.

    With `debias=True` the weight at step t and stride k is

        (1 - decay**k) / (1 - decay**t)

    so that the average is the weighted mean of the iterates with weights
    proportional to `decay**age`, without the weights before the first step. With
    `debias=False` it is `1 - decay**k`, and the average starts from the weights
    before the first step. With `warmup=True` it is

        1 - min(decay, (1 + n) / (10 + n))**k

    where n is the number of updates before this one, and `debias` has no effect.

    Args:
        decay: Float in [0, 1). Defaults to 0.999.
        debias: Bool. Defaults to True.
        warmup: Bool. Defaults to False.
        start_step: Int. Steps for which the average mirrors the raw weights.
            Defaults to 0.
        update_every: Int. Steps between two moves of the average; the half-life
            in optimizer steps stays the same. Defaults to 1.

    Raises:
        ValueError: If `decay` is not a number in [0, 1), or `start_step` or
            `update_every` is not an int in its range.

    Example:

    >>> rule = ExponentialAverage(0.9)
    >>> rule.weight(1), round(rule.weight(2), 4), round(rule.weight(1000), 4)
    (1.0, 0.5263, 0.1)

    Reference:
        Kingma & Ba 2015, Adam, section 3 and section 7.2 (temporal averaging);
        `debias=False` and `warmup=True`: `tf.train.ExponentialMovingAverage`
        without and with `num_updates`.
    """

    def __init__(
        self,
        decay: float = 0.999,
        debias: bool = True,
        warmup: bool = False,
        start_step: int = 0,
        update_every: int = 1,
    ) -> None:
        super().__init__(start_step, update_every)
        self.decay = check_decay(decay)
        self.debias = bool(debias)
        self.warmup = bool(warmup)
        self._log_decay = math.log(self.decay) if self.decay > 0 else -math.inf

    @classmethod
    def from_half_life(
        cls,
        steps: float | None = None,
        *,
        epochs: float | None = None,
        steps_per_epoch: float | None = None,
        debias: bool = True,
        warmup: bool = False,
        start_step: int = 0,
        update_every: int = 1,
    ) -> "Self":
        """Returns the rule with a half-life in optimizer steps or in epochs.

            decay = 0.5 ** (1 / steps),    steps = epochs * steps_per_epoch

        Args:
            steps: Float above 0, in optimizer steps. Defaults to None: given in
                epochs.
            epochs: Float above 0. Defaults to None: given in steps.
            steps_per_epoch: Float above 0, the optimizer steps of an epoch.
                Needed with `epochs`.
            debias: Bool, as in `ExponentialAverage`. Defaults to True.
            warmup: Bool, as in `ExponentialAverage`. Defaults to False.
            start_step: Int, as in `ExponentialAverage`. Defaults to 0.
            update_every: Int, as in `ExponentialAverage`. Defaults to 1.

        Returns:
            An `ExponentialAverage`.

        Raises:
            ValueError: If the half-life is not a positive finite number, or is
                given neither or both ways.

        Example:

        >>> round(ExponentialAverage.from_half_life(1000).decay ** 1000, 12)
        0.5
        >>> round(ExponentialAverage.from_half_life(epochs=2, steps_per_epoch=312).half_life, 9)
        624.0
        """
        if (steps is None) != (epochs is not None) or (epochs is None) != (steps_per_epoch is None):
            raise ValueError(
                "`from_half_life()` needs either `steps`, or `epochs` and `steps_per_epoch`. "
                f"Received: steps={steps!r}, epochs={epochs!r}, "
                f"steps_per_epoch={steps_per_epoch!r}."
            )
        if steps is None:
            steps = check_positive("epochs", epochs, "the half-life in epochs") * check_positive(
                "steps_per_epoch", steps_per_epoch, "the number of optimizer steps in an epoch"
            )
        steps = check_positive("steps", steps, "the half-life in optimizer steps")
        return cls(0.5 ** (1 / steps), debias, warmup, start_step, update_every)

    @property
    def half_life(self) -> float:
        return -math.log(2) / self._log_decay

    def _share(self, t, k, xp):
        if self.warmup:
            n = t / k - 1
            log_ramp = xp.log1p(-9 / (10 + n))
            log_decay = float64(self._log_decay, xp)
            return -xp.expm1(k * xp.where(log_decay < log_ramp, log_decay, log_ramp))
        share = -xp.expm1(float64(k * self._log_decay, xp))
        if self.debias:
            return share / -xp.expm1(t * self._log_decay)
        return share

    def _log_growth(self, moves):
        k, log_decay = self.update_every, max(self._log_decay, LOG_TINY)
        if self.warmup:
            # The ramp (1 + n) / (10 + n) is below `decay` for the first moves; its product over
            # n < m telescopes to 9! m! / (m + 9)!.
            ramp = math.ceil(max(10 * self.decay - 1, 0) / (1 - self.decay))
            m = np.minimum(moves, ramp)
            factors = np.arange(1.0, 10.0)
            logs = np.log1p(m[:, None] / factors).sum(1)
            return k * (logs - (moves - m) * log_decay)
        growth = -moves * k * log_decay
        if self.debias:
            growth += np.log(-np.expm1(-growth))
        return growth

    def get_config(self) -> dict[str, Any]:
        config = {"decay": self.decay, "debias": self.debias, "warmup": self.warmup}
        return {**config, **super().get_config()}


def rescale_decay(decay: float, batch_ratio: float) -> float:
    """Returns the decay with the same half-life in examples at another batch size.

        decay ** batch_ratio

    Args:
        decay: Float in [0, 1), the decay at the old batch size.
        batch_ratio: Float above 0, the new batch size divided by the old one.

    Returns:
        A float, the decay at the new batch size.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> round(rescale_decay(0.999, 4), 6)
    0.996006

    Reference:
        Busbridge et al. 2023, How to scale your EMA, definition 1.2.
    """
    ratio = check_positive("batch_ratio", batch_ratio, "the new batch size divided by the old one")
    return check_decay(decay) ** ratio
