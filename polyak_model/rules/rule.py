"""What all averaging rules have in common.

A rule maps the number of optimizer steps since averaging began to the weight
`c` of the update

    average += c * (iterate - average)

This is scalar mathematics in float64, without cancellation: `1 - d**t` is
computed as `-expm1(t * log(d))`. For a tensor, the same formulas are computed
with `keras.ops`.
"""

import abc
import numbers
import sys
import typing
from typing import Any

import numpy as np

from polyak_model.errors import check_integer
from polyak_model.rules.profiles import BLOCK, memory

if typing.TYPE_CHECKING:
    from typing_extensions import Self

LOG_TINY = -745.0  # Its exponential is the smallest positive float.


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

        >>> from polyak_model import UniformAverage
        >>> UniformAverage().weight(4)
        0.25
        >>> UniformAverage(start_step=3).weight(4)
        1.0
        """
        xp = _namespace(step)
        t = float64(step, xp) - float(self.start_step)
        k = float(stride)
        with np.errstate(divide="ignore"):
            # Where Keras takes the maximum, it may round to float32.
            share = self._share(xp.where(t < k, k, t), k, xp)
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

        >>> from polyak_model import UniformAverage
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

        >>> from polyak_model import ExponentialAverage, UniformAverage
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

        >>> from polyak_model import PowerAverage, UniformAverage
        >>> round(UniformAverage().mean_age(101), 9)
        50.0
        >>> round(PowerAverage.from_relative_width(0.10).mean_age(10_000) / 10_000, 3)
        0.112
        """
        return memory(self, step)[0]

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

        >>> from polyak_model import ExponentialAverage, UniformAverage
        >>> round(UniformAverage().effective_iterates(100), 9)
        100.0
        >>> round(ExponentialAverage(0.99).effective_iterates(10_000))
        199
        """
        return 1 / memory(self, step)[1]

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
        for start in range(0, most, BLOCK):
            m = np.arange(start + 1, min(start + BLOCK, most) + 1)
            weights = self.weight(self.start_step + m * self.update_every, self.update_every)
            with np.errstate(divide="ignore"):
                # A weight of 1 forgets the past: its infinite logarithm would remain in the sum.
                logs = np.maximum(np.log1p(-weights), LOG_TINY)
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


def _namespace(x):
    # Tensors exist only where Keras has been imported.
    keras = sys.modules.get("keras")
    return keras.ops if keras is not None and keras.ops.is_tensor(x) else np


def float64(x, xp):
    convert = np.asarray if xp is np else xp.convert_to_tensor
    return convert(x, dtype="float64")
