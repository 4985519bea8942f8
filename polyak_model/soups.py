"""Greedy soups: which of several fine-tuned weights to average; knows no Keras.

Reference:
    Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned
    models improves accuracy without increasing inference time (Recipe 1).
"""

import math
import operator
import typing

import numpy as np

from polyak_model.errors import check_choice

MODES = ("max", "min")


class Tasting(typing.NamedTuple):
    """What came of one candidate.

    Attributes:
        name: Its name.
        own_score: The score of its weights alone.
        soup_score: The score of the average of those kept before with it.
        kept: Bool. Whether it stayed in the soup.
    """

    name: str
    own_score: float
    soup_score: float
    kept: bool


class Soup(typing.NamedTuple):
    """A soup and how it was made.

    Attributes:
        weights: List of arrays: the uniform average of the candidates kept, in
            float64; of arrays that are no floats, those of the last kept.
        score: Its score.
        tastings: List with a `Tasting` for each candidate, the best first.
    """

    weights: list
    score: float
    tastings: list


def greedy_soup(candidates, score, mode="max"):
    """Averages those of several weights that do not make the average worse.

    The candidates are tried in the order of their own scores, the best first.
    Each stays if the uniform average of those kept so far with it scores no
    worse than without it. So the soup is never worse than the best candidate.

    At any time two sets of weights are held beside the candidate that is read:
    the average of those kept, and the trial.

    Args:
        candidates: Dict from names to functions without arguments, each of which
            returns an iterable of arrays. It is called twice.
        score: Callable from a list of arrays to a number.
        mode: `"max"` or `"min"`: whether a larger or a smaller score is better.
            One that is not a number is worse than any. Defaults to `"max"`.

    Returns:
        A `Soup`.

    Raises:
        ValueError: If there is no candidate, none has a score that is a number,
            or two have arrays of different shapes.

    Example:

    >>> weights = {"a": 0.0, "b": 4.0, "c": 9.0}
    >>> candidates = {name: (lambda w=w: [np.array(w)]) for name, w in weights.items()}
    >>> soup = greedy_soup(candidates, score=lambda weights: abs(weights[0] - 3), mode="min")
    >>> [(tasting.name, tasting.kept) for tasting in soup.tastings]
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
    tastings = [Tasting(first, best, best, True)]
    no_worse = operator.ge if mode == "max" else operator.le
    for name in others:
        trial = _with(mean, name, candidates[name](), count + 1)
        soup_score = float(score(trial))
        kept = no_worse(soup_score, best)
        if kept:
            mean, best, count = trial, soup_score, count + 1
        tastings.append(Tasting(name, own_scores[name], soup_score, kept))
    return Soup(mean, best, tastings)


def _best_first(scores, mode):
    numbers = [name for name, score in scores.items() if not math.isnan(score)]
    if not numbers:
        raise ValueError(
            "At least one of `candidates` must have a score that is a number. "
            f"Received: {scores}. Check the candidates and what they are scored on."
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
        joined.append(_step(kept, array, count) if _is_float(array) else array)
    return joined


def _step(mean, array, count):
    # Not by way of the sum, so that the mean of equal weights is those weights, bit for bit.
    with np.errstate(invalid="ignore"):
        return mean + (array.astype("float64") - mean) / count


def _is_float(array):
    return np.issubdtype(array.dtype, np.floating)
