"""Scores averages of several lengths, rebuilt from the snapshots of one training."""

import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from polyak_model.errors import InputError, check_choice
from polyak_model.rules import Rule
from polyak_model.snapshots.folder import read_run
from polyak_model.snapshots.rebuilding import check_paths, find_combination, fit, write_several
from polyak_model.weight_files.output import writing
from polyak_model.weight_files.reader import open_weights

MODES = ("max", "min")
# In bytes. Averages that are rebuilt together take that much on disk at most, or are one.
_MOST_TOGETHER = 2**32


@dataclasses.dataclass
class Row:
    """One average of a sweep.

    Attributes:
        rule: Its rule.
        step: The step at which it ends, an int.
        score: Its score on the data, a float; None if its walk error is too large.
        standard_error: The standard error of the score, a float; None where the
            metric is no mean over examples.
        profile_error: As in `polyak_model.snapshots.rebuild`, like what follows.
        walk_error: A float.
        rounding: A float.
    """

    rule: Rule
    step: int
    score: float | None
    standard_error: float | None
    profile_error: float
    walk_error: float
    rounding: float


@dataclasses.dataclass
class Sweep:
    """The result of `sweep`.

    Attributes:
        rows: A list with a `Row` for each rule and step, in their order.
        best: The `Row` of the best score.
        close: The number of other rows whose score lies within one standard
            error of the best; 0 without standard errors.
        statistics: The names of the BatchNormalization layers, whose statistics
            are those of a snapshot unless they were refreshed.
        notes: Sentences about the snapshots.
    """

    rows: list
    best: Row
    close: int
    statistics: list
    notes: list


def sweep(
    folder: str | os.PathLike,
    rules: Iterable[Rule],
    data: tuple[Any, Any],
    metric: str,
    mode: str | None = None,
    *,
    like: str | os.PathLike,
    output: str | os.PathLike | None = None,
    steps: Iterable[int] | None = None,
    refresh: Any = None,
    max_error: float = 0.05,
    batch_size: int = 32,
    progress: Callable[[float], None] | None = None,
) -> Sweep:
    """Rebuilds several averages of one training, and scores each on held-out data.

    Args:
        folder: The folder of an `AverageSnapshots` callback.
        rules: Iterable of `polyak_model.Rule`s, the averages to rebuild.
        data: Tuple `(x, y)` of held-out arrays, or lists of arrays.
        metric: `"loss"`, a metric that the model in `like` is compiled with, or
            one that Keras knows by its name.
        mode: `"max"` or `"min"`: whether a larger or a smaller score is better.
            Defaults to None: as in Keras.
        like: A plain `.keras` file of the architecture.
        output: Where to write the best average: a `.keras` or `.weights.h5`
            file. Defaults to None: nothing is written.
        steps: Iterable of the steps at which the averages end. Defaults to None:
            that of the last snapshot.
        refresh: Inputs to refresh BatchNormalization statistics with, an array or
            a list of arrays of training data. Defaults to None: the statistics
            are those of the last snapshot.
        max_error: Float. Averages with a larger walk error are not scored.
            Defaults to 0.05.
        batch_size: Int, the number of examples per batch. Defaults to 32.
        progress: A function of the fraction done, a float up to 1, called now
            and then. Defaults to None.

    Returns:
        A `Sweep`.

    Raises:
        InputError: If the snapshots, the model or the data cannot be used, no
            average has a walk error of at most `max_error`, or the output cannot
            be written; what was at `output` is unchanged then.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from polyak_model import AverageSnapshots, PolyakModel, PowerAverage
    >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model = PolyakModel(inner, average=PowerAverage.from_relative_width(0.05))
    >>> model.compile(optimizer="sgd", loss="mse")
    >>> folder = tempfile.mkdtemp()
    >>> x, y = np.ones((100, 3)), np.ones((100, 1))
    >>> history = model.fit(x, y, batch_size=1, callbacks=[AverageSnapshots(folder)], verbose=0)
    >>> model.average_model.save(f"{folder}/model.keras")
    >>> rules = [PowerAverage.from_relative_width(width) for width in (0.05, 0.1, 0.2)]
    >>> result = sweep(folder, rules, (x, y), "loss", like=f"{folder}/model.keras")
    >>> [round(row.walk_error, 3) for row in result.rows]
    [0.0, 0.035, 0.009]
    """
    if mode is not None:
        check_choice("mode", mode, MODES)
    check_paths(output, like)
    run = read_run(folder)
    bases = [fit(run, step) for step in ([None] if steps is None else steps)]
    found = [find_combination(run, basis, rule) for basis in bases for rule in rules]
    exact = [each for each in found if each.walk_error <= max_error]
    if not exact:
        raise InputError(
            f"None of the {len(found)} averages can be rebuilt with an error of at most "
            f"{100 * max_error:.3g} %. Choose other lengths: `polyak-model inspect {folder}` lists "
            "those that can be."
        )
    # Keras takes seconds to import. Everything that can be checked without it comes before.
    from polyak_model.scoring import Scorer, load_model

    with open_weights(like) as weights:
        config = weights.config
    scorer = Scorer(load_model(like, config), data, metric, batch_size)
    mode = mode or scorer.direction()
    if mode is None:
        raise InputError(
            f"`mode` must be given for the metric {metric!r}, since Keras does not define whether "
            "larger or smaller values of it are better. Pass 'max' or 'min'."
        )
    names: list[str] = []
    scores: dict[int, tuple[float | None, float | None]] = {}
    for rebuilt, statistics in _rebuild(run, exact, like, scorer, refresh, progress):
        names = statistics
        scores[id(rebuilt)] = scorer.score_with_error()
    rows = [
        Row(
            each.rule,
            each.step,
            *scores.get(id(each), (None, None)),
            each.profile_error,
            each.walk_error,
            each.rounding,
        )
        for each in found
    ]
    best = _find_best(rows, mode)
    if output is not None:
        for _ in _rebuild(run, [found[rows.index(best)]], like, scorer, refresh):
            with writing(output) as partial:
                scorer.save(partial)
    return Sweep(rows, best, _count_close(rows, best), names, found[0].notes)


def _rebuild(run, found, like, scorer, inputs, progress=None):
    """Loads each average into the model; yields it and the names of its BatchNormalization layers.

    To rebuild an average counts as half of the progress, to score it as the other half.
    """
    report = progress or (lambda fraction: None)
    together = max(1, _MOST_TOGETHER // max(1, os.path.getsize(like)))
    for start in range(0, len(found), together):
        part = found[start : start + together]

        def report_part(fraction, start=start, part=part):
            report((start + len(part) * fraction / 2) / len(found))

        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder, f"{n}.weights.h5") for n in range(len(part))]
            combinations = [each.coefficients for each in part]
            statistics = write_several(
                run, combinations, paths, like, report_part, is_durable=False
            )
            for n, (rebuilt, path) in enumerate(zip(part, paths, strict=True)):
                report_part(1 + n / len(part))
                scorer.load(path)
                path.unlink()
                if inputs is not None:
                    # It imports Keras.
                    from polyak_model.snapshots.refreshing import refresh

                    refresh(scorer.model, inputs)
                yield rebuilt, statistics


def _find_best(rows, mode):
    scored = [row for row in rows if row.score is not None and not math.isnan(row.score)]
    if not scored:
        raise InputError(
            "Every score is NaN. Check the data, and whether the training has diverged."
        )
    choose = max if mode == "max" else min
    return choose(scored, key=lambda row: row.score)


def _count_close(rows, best):
    if best.standard_error is None:
        return 0
    scores = [row.score for row in rows if row is not best and row.score is not None]
    return sum(abs(score - best.score) <= best.standard_error for score in scores)
