"""Which checkpoint was written last, and which score is the best of a training's past.

No counter of a training orders its files: `average_step` falls after
`reset_average`, the optimizer's when the model is compiled again, and both when
training goes on from an earlier file or backup. Clocks differ between machines.
So each file records a sequence number, which only grows, and the improvements
of the score that led to it. When training goes back, the improvements after
that point belong to an abandoned branch and no longer count.
"""

import glob
import pathlib
import string
import typing
import warnings

from polyak_model.saving.score_record import read_record

# HDF5 limits an attribute to 64 KiB. Training may go back by this many improvements.
_LONGEST = 256


class Position(typing.NamedTuple):
    """Where a training is.

    Attributes:
        iterations: Int, optimizer steps, as the optimizer counts them.
        step: Int, optimizer steps since averaging (re)started.
        weights: Int, a checksum of the raw weights.
    """

    iterations: int
    step: int
    weights: int


class _Improvement(typing.NamedTuple):
    iterations: int
    step: int
    weights: int | None
    score: float

    def is_ahead_of(self, position):
        # Either counter alone restarts while training goes on.
        return self.iterations > position.iterations and self.step > position.step


class CheckpointHistory:
    """The files that one callback writes in one training, and the best score so far.

    Args:
        filepath: Path with placeholders, as in `keras.callbacks.ModelCheckpoint`.
        callback: String that differs between callbacks that write to one folder.

    Example:

    >>> history = CheckpointHistory("{epoch}.keras", "best average")
    >>> history.resume("a training", Position(0, 0, 0))
    >>> take_back = history.add(history.record("1.keras", Position(8, 8, 1234), best=0.5))
    >>> history.best
    0.5
    """

    def __init__(self, filepath, callback):
        self._pattern = _file_pattern(filepath)
        self._depth = _varying_depth(filepath)
        self._callback = callback
        self._run = None
        self._weights = None
        self._sequence = 0
        self._improvements = []
        self._has_warned = False

    @property
    def best(self):
        """The best score of the training's past, or None."""
        return self._improvements[-1].score if self._improvements else None

    def resume(self, run, position, reread=True):
        """Finds the best score of the past of a training, and the last sequence number.

        Args:
            run: String that identifies the training.
            position: The `Position` from which it goes on.
            reread: Bool. Whether to read the files even where training goes on
                from the position that `leave` was given. Defaults to True.
        """
        goes_on = run == self._run and position.weights == self._weights
        if goes_on and not reread:
            return
        branches = [(self._sequence, self._improvements)] if run == self._run else []
        self._run = run
        records = sorted(self.files().values(), key=_order, reverse=True)
        branches += [(_order(record)[0], _improvements(record)) for record in records]
        branches.sort(key=lambda branch: branch[0], reverse=True)
        self._sequence = branches[0][0] if branches else 0
        if not goes_on:
            self._improvements = _past([branch for _, branch in branches], position)
        self.leave(position)

    def leave(self, position):
        """Remembers where training is, so that `resume` can tell whether it was moved."""
        self._weights = position.weights

    def record(self, path, position, best=None):
        """Returns the record, a dict, of a file that is about to be written.

        Args:
            path: Path of the file.
            position: The `Position` of the training.
            best: Float, its score, if that is the best so far. Defaults to None.
        """
        improvements = self._improvements
        if best is not None:
            improvements = [*improvements, _Improvement(*position, best)]
        return {
            "run": self._run,
            "callback": self._callback,
            "file": self._varying_part(path),
            "sequence": self._sequence + 1,
            "iterations": position.iterations,
            "step": position.step,
            "improvements": improvements[-_LONGEST:],
        }

    def add(self, record):
        """Adds a file that is being written, and its score.

        Args:
            record: What `record` returned for it.

        Returns:
            A function that takes the score back, for a file that could not be
            written.
        """
        before = self._improvements
        self._sequence = record["sequence"]
        self._improvements = record["improvements"]

        def take_back():
            self._improvements = before

        return take_back

    def files(self):
        """Returns the records of the files that this callback wrote in this training, by path.

        Copies that the user made under other names are not among them.
        """
        records = {path: read_record(path) for path in glob.glob(self._pattern)}
        own = {"run": self._run, "callback": self._callback}.items()
        return {
            path: record
            for path, record in records.items()
            if own < record.items()
            and record.get("file", self._varying_part(path)) == self._varying_part(path)
        }

    def remove_older(self, keep):
        """Removes all files but those written last; warns once if one cannot be removed.

        Args:
            keep: Int, how many files stay.
        """
        files = self.files()
        for path in sorted(files, key=lambda path: _order(files[path]))[:-keep]:
            try:
                pathlib.Path(path).unlink(missing_ok=True)
            except OSError as error:
                if not self._has_warned:
                    warnings.warn(
                        f"Cannot remove the old checkpoint {path!r}: {error.strerror or error}. "
                        "Training goes on, and more files stay than `keep_last` says. Make the "
                        "folder writable, or remove old files by hand.",
                        stacklevel=2,
                    )
                self._has_warned = True

    def _varying_part(self, path):
        return "/".join(pathlib.PurePath(path).parts[-self._depth :])


def has_placeholders(path):
    """Returns whether a path has placeholders such as `{epoch}`.

    Example:

    >>> has_placeholders("{epoch:02d}.keras"), has_placeholders("best.keras")
    (True, False)
    """
    return any(field is not None for _, field, _, _ in string.Formatter().parse(path))


def _file_pattern(filepath):
    # 'a/{epoch:02d}.keras' becomes 'a/*.keras'.
    parts = string.Formatter().parse(filepath)
    return "".join(glob.escape(text) + "*" * (field is not None) for text, field, _, _ in parts)


def _varying_depth(filepath):
    # Folders may have placeholders, too.
    parts = pathlib.PurePath(filepath).parts
    return next((len(parts) - n for n, part in enumerate(parts) if has_placeholders(part)), 1)


def _order(record):
    # Early versions recorded no sequence number.
    return record.get("sequence", 0), record.get("step", 0)


def _improvements(record):
    if "improvements" in record:
        return [_Improvement(*entry) for entry in record["improvements"]]
    # Early versions recorded the score of the file alone.
    return [_Improvement(0, 0, None, record["score"])] if "score" in record else []


def _past(branches, position):
    # Weights identify a position exactly; counters only bound it, on the newest branch.
    for improvements in branches:
        for count in range(len(improvements), 0, -1):
            if improvements[count - 1].weights == position.weights:
                return improvements[:count]
    newest = branches[0] if branches else []
    reached = [n for n, each in enumerate(newest, 1) if not each.is_ahead_of(position)]
    return newest[: max(reached, default=0)]
