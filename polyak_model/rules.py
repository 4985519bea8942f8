"""Averaging rules: the weight of the newest iterate in the average.

A rule maps the number of optimizer steps since averaging began to the weight
`c` of the update

    average += c * (iterate - average)

This is scalar mathematics in float64, without cancellation: `1 - d**t` is
computed as `-expm1(t * log(d))`. The module imports NumPy alone; for a tensor,
the same formulas are computed with `keras.ops`.
"""

import abc
import math
import numbers
import sys
import typing
from typing import Any

import numpy as np

from polyak_model.errors import (
    check_choice,
    check_decay,
    check_exponent,
    check_integer,
    check_positive,
    is_number,
)

if typing.TYPE_CHECKING:
    from typing_extensions import Self

_LOG_TINY = -745.0  # Its exponential is the smallest positive float.
# In moves of an average, so that long runs take little memory.
_BLOCK = 2**16
# Names and relative widths of the averages that `PowerAverage.pair` and `.triple` propose.
_PAIR = {"short": 0.03, "long": 0.20}
_TRIPLE = {"short": 0.03, "medium": 0.10, "long": 0.25}
_DECAYS = {
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
}


class _ImmutableType(abc.ABCMeta):
    """Makes instances immutable as soon as the constructor of the subclass has returned."""

    def __call__(cls, *args, **kwargs):
        instance = super().__call__(*args, **kwargs)
        vars(instance)["_is_immutable"] = True
        return instance


class Rule(metaclass=_ImmutableType):
    """The weight of the newest iterate in the average at each step.

    To define a rule, subclass it: implement `_share(t, k, xp)`, the weight of
    the newest iterate at step `t` when the average last moved `k` steps ago, and
    extend `get_config`. Attributes can be set in the constructor only, since
    compiled training steps contain their values.

    Args:
        start_step: Int, at least 0. For that many optimizer steps the average
            mirrors the raw weights; then averaging begins with `t = 1`.
            Defaults to 0.
        update_every: Int, at least 1. The average moves at every
            `update_every`-th step after `start_step`. Defaults to 1.

    Example:

    >>> class RootAverage(Rule):
    ...     def _share(self, t, k, xp):
    ...         return xp.sqrt(k / t)
    >>> RootAverage(start_step=5).weight(9)
    0.5
    """

    def __init__(self, start_step: int = 0, update_every: int = 1) -> None:
        self.start_step = check_integer("start_step", start_step, at_least=0)
        self.update_every = check_integer("update_every", update_every, at_least=1)

    def weight(self, step: Any, stride: int = 1) -> Any:
        """Returns the weight of the newest iterate, in (0, 1].

        Args:
            step: Optimizer steps taken since averaging was (re)started, 1 after
                the first. An int, a NumPy array or a tensor.
            stride: Optimizer steps since the average last moved. Defaults to 1.

        Returns:
            A float for an int; otherwise a float64 array or tensor of the shape
            of `step`. It is 1 up to `start_step`.

        Example:

        >>> UniformAverage().weight(4)
        0.25
        >>> UniformAverage(start_step=3).weight(4)
        1.0
        """
        xp = _namespace(step)
        t = _float64(step, xp) - float(self.start_step)
        k = float(stride)
        with np.errstate(divide="ignore"):
            share = self._share(xp.maximum(t, k), k, xp)
        weight = xp.where(t <= 0, 1.0, share)
        return float(weight) if isinstance(step, numbers.Integral) else weight

    def moves_at(self, step: Any) -> Any:
        """Returns whether the average moves after this optimizer step.

        Args:
            step: Optimizer steps taken since averaging was (re)started. An int,
                a NumPy array or a tensor.

        Returns:
            A bool, or an array or tensor of booleans.

        Example:

        >>> [step for step in range(1, 9) if UniformAverage(2, 3).moves_at(step)]
        [1, 2, 5, 8]
        """
        if self.update_every == 1:
            return step == step  # True, in the shape of `step`.
        t = step - self.start_step
        return (t <= 0) | (t % self.update_every == 0)

    @property
    def half_life(self) -> float | None:
        """The age, in optimizer steps, at which the share of an iterate has halved.

        It is a float for an exponential average, where every share shrinks at the
        same rate, and None for other rules.

        Example:

        >>> round(ExponentialAverage(0.999).half_life), UniformAverage().half_life
        (693, None)
        """
        return None

    @typing.overload
    def mean_age(self, step: int) -> float: ...

    @typing.overload
    def mean_age(self, step: np.ndarray) -> np.ndarray: ...

    def mean_age(self, step):
        """Returns the mean age of the iterates in the average, weighted by their shares.

            sum over i of share_i * (step - i)

        where `i = 0` stands for the weights before the first step.

        Args:
            step: Optimizer steps taken since averaging was (re)started. An int
                of at least 0, or an array of them. It takes time in proportion
                to the largest.

        Returns:
            A float for an int, otherwise a float64 array of the shape of `step`,
            in optimizer steps.

        Example:

        >>> round(UniformAverage().mean_age(101), 9)
        50.0
        >>> round(PowerAverage.from_relative_width(0.10).mean_age(10_000) / 10_000, 3)
        0.112
        """
        return _memory(self, step)[0]

    @typing.overload
    def effective_iterates(self, step: int) -> float: ...

    @typing.overload
    def effective_iterates(self, step: np.ndarray) -> np.ndarray: ...

    def effective_iterates(self, step):
        """Returns how many iterates an equally precise uniform mean would have.

            1 / sum over i of share_i**2

        For iterates with independent errors it is the factor by which averaging
        divides their variance.

        Args:
            step: Optimizer steps taken since averaging was (re)started. An int
                of at least 0, or an array of them. It takes time in proportion
                to the largest.

        Returns:
            A float for an int, otherwise a float64 array of the shape of `step`.
            It is 1 while the average mirrors the raw weights.

        Example:

        >>> round(UniformAverage().effective_iterates(100), 9)
        100.0
        >>> round(ExponentialAverage(0.99).effective_iterates(10_000))
        199
        """
        return 1 / _memory(self, step)[1]

    def _share(self, t, k, xp):
        raise NotImplementedError(
            f"{type(self).__name__} does not implement `_share(t, k, xp)`. It must return the "
            "weight of the newest iterate at step `t`, `k` steps after the last move, computed "
            "with the functions of the namespace `xp` (numpy or keras.ops)."
        )

    def _log_growth(self, moves):
        """Returns `-log((1 - w_1) ... (1 - w_m))` up to a constant, for numbers m of moves.

        Subclasses may override this sum over all moves with a closed form.
        """
        most = int(moves.max())
        growth = np.zeros(most + 1)
        for start in range(0, most, _BLOCK):
            m = np.arange(start + 1, min(start + _BLOCK, most) + 1)
            weights = self.weight(self.start_step + m * self.update_every, self.update_every)
            with np.errstate(divide="ignore"):
                # A weight of 1 forgets the past: its infinite logarithm would remain in the sum.
                logs = np.maximum(np.log1p(-weights), _LOG_TINY)
            growth[m] = growth[start] - np.cumsum(logs)
        return growth[moves.astype("int64")]

    def __setattr__(self, name, value):
        self._check_mutable(name)
        super().__setattr__(name, value)

    def __delattr__(self, name):
        self._check_mutable(name)
        super().__delattr__(name)

    def _check_mutable(self, name):
        if "_is_immutable" in vars(self):
            kind = type(self).__name__
            raise AttributeError(
                f"Cannot change `{name}` of {self!r}: rules are immutable. "
                f"Set a new rule instead: model.rule = {kind}({name}=...)."
            )

    def get_config(self) -> dict[str, Any]:
        return {"start_step": self.start_step, "update_every": self.update_every}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Self":
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted(self.get_config().items()))))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


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
            return -xp.expm1(k * xp.minimum(_float64(self._log_decay, xp), log_ramp))
        share = -xp.expm1(_float64(k * self._log_decay, xp))
        if self.debias:
            return share / -xp.expm1(t * self._log_decay)
        return share

    def _log_growth(self, moves):
        k, log_decay = self.update_every, max(self._log_decay, _LOG_TINY)
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


def shares(rule: Rule, n: int) -> np.ndarray:
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

    >>> shares(UniformAverage(), 4)
    array([0.25, 0.25, 0.25, 0.25])
    >>> shares(ExponentialAverage(0.5, debias=False), 3)
    array([0.125, 0.25 , 0.5  ])
    """
    steps = np.arange(1, check_integer("n", n, at_least=1) + 1)
    weights = np.where(rule.moves_at(steps), rule.weight(steps, rule.update_every), 0.0)
    return weights * _kept(weights)


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


def _kept(weights):
    """Returns the share of each iterate that later ones leave."""
    return np.append(np.cumprod(1 - weights[:0:-1])[::-1], 1.0)


def _memory(rule, step):
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
            block = np.arange(done + 1, min(end, done + _BLOCK) + 1)
            t = rule.start_step + rule.update_every * block
            weights = rule.weight(t, rule.update_every)
            kept = _kept(weights)
            remaining = kept[0] * (1 - weights[0])
            age = remaining * (age + len(block)) + (weights * kept) @ (block[-1] - block)
            square = remaining**2 * square + (weights * kept) @ (weights * kept)
            done = block[-1]
        found.append((age, square))
    ages, squares = np.array(found).T[:, positions.reshape(steps.shape)]
    ages = rule.update_every * ages + since_move
    return (float(ages), float(squares)) if steps.ndim == 0 else (ages, squares)


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


def _namespace(x):
    # Tensors exist only where Keras has been imported.
    keras = sys.modules.get("keras")
    return keras.ops if keras is not None and keras.ops.is_tensor(x) else np


def _float64(x, xp):
    convert = np.asarray if xp is np else xp.convert_to_tensor
    return convert(x, dtype="float64")
