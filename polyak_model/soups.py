"""Greedy soups: selects which of several fine-tuned weights to average, without Keras.

Reference:
    Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned
    models improves accuracy without increasing inference time (Recipe 1).
"""

import math
import operator
import typing
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from polyak_model.errors import check_choice

MODES = ("max", "min")


class Trial(typing.NamedTuple):
    """The result of one candidate.

    Attributes:
        name: Its name.
        own_score: The score of its own weights.
        soup_score: The score of the average with it.
        kept: Bool. Whether it is in the soup.
    """

    name: str
    own_score: float
    soup_score: float
    kept: bool


class Soup(typing.NamedTuple):
    """The result of `greedy_soup`.

    Attributes:
        weights: List of arrays: the uniform average of the kept candidates, in
            float64; arrays of other dtypes are those of the last kept.
        score: Its score.
        trials: List with a `Trial` for each candidate, the best first.
    """

    weights: list[np.ndarray]
    score: float
    trials: list[Trial]


def greedy_soup(
    candidates: Mapping[str, Callable[[], Iterable[np.ndarray]]],
    score: Callable[[list[np.ndarray]], float],
    mode: str = "max",
) -> Soup:
    """Averages those of several weights that do not make the average worse.

    The candidates are tried in the order of their own scores, the best first.
    Each is kept if the uniform average of the kept ones scores no worse with it
    than without it. So the soup is never worse than the best candidate.

    Two sets of weights are in memory beside the candidate that is read: the
    average of the kept ones, with and without it.

    Args:
        candidates: Dict from names to functions without arguments, each of which
            returns an iterable of arrays. It is called twice.
        score: Callable from a list of arrays to a number.
        mode: `"max"` or `"min"`: whether a larger or a smaller score is better.
            NaN is worse than any score. Defaults to `"max"`.

    Returns:
        A `Soup`.

    Raises:
        ValueError: If there is no candidate, all scores are NaN, two candidates
            have arrays of different shapes, or weights are quantized.

    Example:

    >>> weights = {"a": 0.0, "b": 4.0, "c": 9.0}
    >>> candidates = {name: (lambda w=w: [np.array(w)]) for name, w in weights.items()}
    >>> soup = greedy_soup(candidates, score=lambda weights: abs(weights[0] - 3), mode="min")
    >>> [(trial.name, trial.kept) for trial in soup.trials]
    [('b', True), ('a', True), ('c', False)]
    >>> float(soup.weights[0]), soup.score
    (2.0, 1.0)
    """
    check_choice("mode", mode, MODES)
    own_scores = {
        name: float(score(_with(None, name, read(), 1))) for name, read in candidates.items()
    }
    first, *others = _best_first(own_scores, mode)
    mean, best, count = _with(None, first, candidates[first](), 1), own_scores[first], 1
    trials = [Trial(first, best, best, True)]
    no_worse = operator.ge if mode == "max" else operator.le
    for name in others:
        mixed = _with(mean, name, candidates[name](), count + 1)
        soup_score = float(score(mixed))
        kept = no_worse(soup_score, best)
        if kept:
            mean, best, count = mixed, soup_score, count + 1
        trials.append(Trial(name, own_scores[name], soup_score, kept))
    return Soup(mean, best, trials)


def _best_first(scores, mode):
    numbers = [name for name, score in scores.items() if not math.isnan(score)]
    if not numbers:
        raise ValueError(
            "At least one of `candidates` must have a score other than NaN. "
            f"Received: {scores}. Check the candidates and the data they are scored on."
        )
    ranked = sorted(numbers, key=scores.get, reverse=mode == "max")
    return ranked + [name for name in scores if name not in numbers]


def _with(mean, name, arrays, count):
    """Returns the mean of `count` candidates, the newest of which has `arrays`."""
    arrays = map(np.asarray, arrays)
    if mean is None:
        return [array.astype("float64") if _is_float(array) else array for array in arrays]
    joined = []
    for kept, array in zip(mean, arrays, strict=True):
        if kept.shape != array.shape:
            raise ValueError(
                f"All `candidates` must have arrays of the same shapes. Received: {array.shape} in "
                f"{name!r} in place of {kept.shape}. Leave it out: it is of another architecture."
            )
        if array.dtype in ("int8", "uint8") and not np.array_equal(kept, array):
            raise ValueError(
                "Quantized `candidates` have no average. Received: different arrays of dtype "
                f"{array.dtype} in {name!r}. Use weights from before `quantize`."
            )
        joined.append(_step(kept, array, count) if _is_float(array) else array)
    return joined


def _step(mean, array, count):
    # Unlike with a sum, the mean of equal weights is those weights, bit for bit.
    with np.errstate(invalid="ignore"):
        return mean + (array.astype("float64") - mean) / count


def _is_float(array):
    return np.issubdtype(array.dtype, np.floating)
