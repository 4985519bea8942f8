"""Selects weight files to average: the last ones, or the best ones of a history."""

import csv
import io
import math
import os
import pathlib
import re

from polyak_model.errors import InputError
from polyak_model.weight_files.reader import ENDINGS
from polyak_model.weight_files.refusal import converting, in_one_line, open_regular, reason

_NUMBER = re.compile(r"([0-9]+)")
_DECIMAL = re.compile(r"[0-9]+\.[0-9]+")
_EPOCH = re.compile(r"epochs?[-_=. ]?([0-9]+)", re.IGNORECASE)
_SHARD = re.compile(r"_\d{5}\.weights\.h5$")
_LONGEST_HISTORY = 16 * 2**20


def list_folder(folder, output):
    """Finds the weight files in a folder.

    Args:
        folder: Its path.
        output: A path that is left out, even if it exists.

    Returns:
        A list of paths, in the order of `in_order`.

    Raises:
        InputError: If there are none, or of several kinds.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise _folder_error(folder, reason(error)) from error
    sharded = {name.removesuffix(".weights.json") for name in names}
    found = [
        pathlib.Path(folder, name)
        for name in names
        if name.endswith(ENDINGS) and _SHARD.sub("", name) not in sharded - {name}
    ]
    found = [path for path in found if os.path.realpath(path) != os.path.realpath(output)]
    kinds = [kind for kind in ENDINGS if any(path.name.endswith(kind) for path in found)]
    if len(kinds) != 1:
        problem = (
            f"it contains files in {' and '.join(kinds)}"
            if kinds
            else "it contains no weight files"
        )
        raise _folder_error(folder, problem)
    return in_order(found)


def in_order(paths):
    """Sorts files by name, with the numbers in names ordered by value.

    Args:
        paths: Paths.

    Returns:
        A list of them.

    Example:

    >>> in_order(["epoch-10.keras", "epoch-9.keras"])
    ['epoch-9.keras', 'epoch-10.keras']
    """

    def key(path):
        # Texts and numbers alternate.
        parts = _NUMBER.split(os.path.basename(path))
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)

    return sorted(paths, key=key)


def choose_last(paths, count):
    """Chooses the last files in the order of their names.

    Args:
        paths: Paths.
        count: Int, at least 2.

    Returns:
        A list of `count` paths, the last by name at the end.

    Raises:
        InputError: If there are fewer, or `count` is less than 2.
    """
    _check_count("--last", count, len(paths))
    return in_order(paths)[-count:]


def choose_best(paths, count, history, column, mode):
    """Chooses the files of the best epochs of a history.

    Args:
        paths: Paths whose names contain the epoch, counted from 1 as by
            `keras.callbacks.ModelCheckpoint`: the number after the word `epoch`,
            or the only number that is not a decimal fraction.
        count: Int, at least 2.
        history: Path of a file written by `keras.callbacks.CSVLogger`, with a
            column `epoch` counted from 0.
        column: The column to compare, such as `val_loss`. Epochs without a
            number in it are skipped.
        mode: `"min"` or `"max"`.

    Returns:
        A list of `count` paths in the order of their epochs; of equal scores,
        that of the earlier epoch is chosen.

    Raises:
        InputError: If files and rows cannot be matched one to one, or there
            are fewer than `count`.
    """
    scores = _read_history(history, column)
    epochs = {}
    for path in paths:
        epoch = _find_epoch(path)
        if epoch in epochs:
            raise InputError(
                f"{str(epochs[epoch])!r} and {str(path)!r} are both of epoch {epoch}. "
                "Leave one of them out."
            )
        if epoch - 1 not in scores:
            raise InputError(
                f"{str(path)!r} is of epoch {epoch}, counted from 1, but {str(history)!r} has no "
                f"row of epoch {epoch - 1}, counted from 0. Leave it out, or name its history."
            )
        epochs[epoch] = path
    sign = 1 if mode == "min" else -1
    ranked = sorted(
        (sign * scores[epoch - 1], epoch) for epoch in epochs if not math.isnan(scores[epoch - 1])
    )
    _check_count("--best", count, len(ranked))
    return [epochs[epoch] for epoch in sorted(epoch for _, epoch in ranked[:count])]


def _find_epoch(path):
    name = os.path.basename(path)
    stem = name[: -len(next((e for e in ENDINGS if name.endswith(e)), "")) or None]
    numbers = _EPOCH.findall(stem) or _NUMBER.findall(_DECIMAL.sub("", stem))
    if len(numbers) != 1:
        found = f"the numbers {', '.join(numbers)}" if numbers else "no number"
        raise InputError(
            f"Cannot find the epoch of {str(path)!r}: its name contains {found}. "
            "Expected one, as in epoch-07.keras."
        )
    return int(numbers[0])


def _read_history(path, column):
    """Reads a dict from epoch to score, NaN where it is not a number."""

    def unreadable(error):
        return _history_error(path, f"it cannot be read ({reason(error)})")

    scores = {}
    with converting(unreadable), open_regular(path) as file:
        if file.seek(0, io.SEEK_END) > _LONGEST_HISTORY:
            raise _history_error(path, f"it is longer than {_LONGEST_HISTORY:,} bytes")
        file.seek(0)
        rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        for name in ("epoch", column):
            if name not in (rows.fieldnames or ()):
                columns = in_one_line(", ".join(rows.fieldnames or ["none"]))
                raise _history_error(path, f"it has no column {name!r} but {columns}")
        for row in rows:
            epoch = _parse_epoch(row["epoch"], path)
            if epoch in scores:
                raise _history_error(path, f"it has two rows of epoch {epoch}")
            scores[epoch] = _parse_score(row[column])
    return scores


def _parse_epoch(text, path):
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise _history_error(path, f"an epoch in it is {in_one_line(text)!r}") from error


def _parse_score(text):
    # CSVLogger writes NA in an epoch without validation.
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _check_count(option, count, available):
    if count < 2:
        raise InputError(f"`{option}` must be at least 2. Received: {count}. Try {option} 5.")
    if count > available:
        raise InputError(
            f"`{option}` must be at most the number of files to choose from. Received: {count}, "
            f"but there are {available}. Choose fewer."
        )


def _folder_error(folder, problem):
    return InputError(
        f"Cannot choose from the folder {str(folder)!r}: {problem}. Name the files themselves."
    )


def _history_error(path, problem):
    return InputError(
        f"Cannot choose by {str(path)!r}: {problem}. "
        "Expected a file that keras.callbacks.CSVLogger wrote."
    )
