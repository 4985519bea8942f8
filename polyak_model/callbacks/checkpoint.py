"""Checkpoints of an average model, the raw model or the whole, saved with their score."""

import functools
import math
import os
import pathlib
import string
import warnings
import zlib

import keras

from polyak_model import backend
from polyak_model.backend.keras_internals import metric_direction
from polyak_model.errors import check_choice, check_integer
from polyak_model.model import PolyakModel
from polyak_model.saving.checkpoint_history import CheckpointHistory, Position, has_placeholders
from polyak_model.saving.saveable_model import size_in_file, state_variables
from polyak_model.saving.score_record import write_record
from polyak_model.saving.staging import save, stage
from polyak_model.weight_files.atomic_write import atomic_file, make_folder

WHOLE = "both"
_LARGE = 4096  # Entries.


class AverageCheckpoint(keras.callbacks.Callback):
    """Saves an average model, the raw model or the whole `PolyakModel` during training.

    Each file is written atomically and records the score of its weights. A
    training that is resumed by `BackupAndRestore`, `load_model` or
    `load_weights` continues with the best score it had at that point; scores
    of epochs after that point no longer count. Files of other trainings are
    neither read for scores nor removed. At the end of an epoch with validation,
    the file is saved before other callbacks can change the weights.

    Args:
        filepath: Path that ends with `.keras` (models) or `.weights.h5`
            (weights), with placeholders as in `keras.callbacks.ModelCheckpoint`:
            `"{epoch:02d}-{val_loss:.3f}.keras"`.
        contents: `"average"` (the first), the name of an average or `"raw"`,
            plain Keras models; or `"both"`, the `PolyakModel`, from which
            training can be resumed. Defaults to `"average"`.
        monitor: Name of the score in the logs. Defaults to `"val_loss"`.
        mode: `"min"`, `"max"` or `"auto"`: whether a lower or a higher score is
            better. Defaults to `"auto"`: by the name or the metric.
        save_best_only: Bool. Whether to save only when the score is better than
            all before. The score must be that of the contents. Defaults to
            False.
        save_freq: `"epoch"`, or an int of at least 1, the number of batches
            between two files. Defaults to `"epoch"`.
        keep_last: Int of at least 1, how many files to keep; the files of this
            training that were written before them are removed. Defaults to
            None: all.
        save_on_background: Bool. If True, training goes on while a thread writes
            the file, from a copy of the weights in the memory of the host. It
            waits only if the next file is due before the last is written, at
            its end, and before the `PolyakModel` is saved or loads weights. An
            error of the thread is raised then. If False, training waits for
            each file, which needs no copy: for callbacks that read a file right
            after the epoch. Defaults to True, as in
            `keras.callbacks.OrbaxCheckpoint`.

    Raises:
        ValueError: If an argument is out of its range. When training begins: if
            `save_best_only` would save another model than the one scored.
        TypeError: When training begins, if the model is not a `PolyakModel`.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
    >>> model.compile(optimizer="sgd", loss="mse")
    >>> path = f"{tempfile.mkdtemp()}/best.keras"
    >>> best = AverageCheckpoint(path, save_best_only=True)
    >>> x, y = np.ones((8, 3)), np.ones((8, 1))
    >>> history = model.fit(x, y, epochs=3, validation_data=(x, y), callbacks=[best], verbose=0)
    >>> float(best.best) == min(history.history["val_loss"])
    True
    >>> keras.models.load_model(path).count_params()
    4
    """

    def __init__(
        self,
        filepath: str | os.PathLike,
        contents: str = "average",
        monitor: str = "val_loss",
        mode: str = "auto",
        save_best_only: bool = False,
        save_freq: int | str = "epoch",
        keep_last: int | None = None,
        save_on_background: bool = True,
    ) -> None:
        super().__init__()
        self.filepath = os.fspath(filepath)
        self.contents = _check_contents(contents)
        self.monitor = monitor
        self.mode = check_choice("mode", mode, ("auto", "min", "max"))
        self.save_best_only = bool(save_best_only)
        self.save_freq = _check_frequency(save_freq, self.save_best_only)
        self.keep_last = keep_last if keep_last is None else _check_kept(keep_last, self.filepath)
        self.save_on_background = bool(save_on_background)
        if not self.filepath.endswith((".keras", ".weights.h5")):
            raise ValueError(
                "`filepath` must end with '.keras', for models, or '.weights.h5', for weights. "
                f"Received: filepath={self.filepath!r}."
            )
        saved = f"{contents} {monitor if self.save_best_only else 'every'}"
        self._history = CheckpointHistory(
            self.filepath, f"{os.path.basename(self.filepath)} {saved}"
        )
        self._saved = None  # What `contents` is in this model.
        self._epoch = None  # The current epoch, from 1; None once its end has been handled.
        self._is_first_epoch = True
        self._training_logs: dict[str, float] = {}
        self._unsaved = 0
        self._last_batch = -1

    @property
    def best(self) -> float | None:
        """The best score of this training so far, a float, or None before the first."""
        return self._history.best

    def on_train_begin(self, logs=None):
        if not isinstance(self.model, PolyakModel):
            raise TypeError(
                "AverageCheckpoint saves the models of a PolyakModel. Received: the fit of a "
                f"{type(self.model).__name__}. Wrap the model, PolyakModel(model), or use "
                "keras.callbacks.ModelCheckpoint."
            )
        self._saved = self._find_saved()
        route = self._scored_route()
        if self.save_best_only and self._saved not in (WHOLE, route):
            prefix = "" if self.model.inference == self._saved else f"{self.contents}_"
            raise ValueError(
                "The file must contain the model that was scored. Received: contents="
                f"{self.contents!r} and monitor={self.monitor!r}, a score of the {route} model"
                f"{'s' * (route == 'ensemble')}. Monitor 'val_{prefix}loss' (it is reported with "
                f"PolyakModel(report=...) that names {self.contents!r}), or save contents='both'."
            )
        self._is_first_epoch = True

    def on_epoch_begin(self, epoch, logs=None):
        # Not in on_train_begin, where BackupAndRestore may still have to load its backup.
        if self._is_first_epoch:
            self._wait()  # For the files of a training that was interrupted.
        self._history.resume(self.model.shadow.run, self._position(), reread=self._is_first_epoch)
        self._epoch, self._last_batch, self._is_first_epoch = epoch + 1, -1, False

    def on_train_batch_end(self, batch, logs=None):
        if self.save_best_only and self.mode == "auto":
            # Metrics are not built before the first batch.
            self.mode = self._find_mode()
        self._training_logs = logs or {}
        # With steps_per_execution, one call stands for several batches.
        self._unsaved += batch - self._last_batch
        self._last_batch = batch
        if self.save_freq != "epoch" and self._unsaved >= self.save_freq:
            self._unsaved = 0
            self._save({"epoch": self._epoch, "batch": batch + 1}, self._training_logs)

    def on_test_end(self, logs=None):
        # No other callback can have changed the weights since they were scored.
        scores = {f"val_{name}": value for name, value in (logs or {}).items()}
        logs = {**self._training_logs, **scores}
        if self._epoch is not None and self._has_all(logs):
            self._end_epoch(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._epoch is not None:
            self._end_epoch(logs or {})
        self._history.leave(self._position())

    def on_train_end(self, logs=None):
        self._wait()
        # Weights may have been restored, and a finished training that is resumed has no epoch left.
        self._history.resume(self.model.shadow.run, self._position(), reread=self._is_first_epoch)

    def _wait(self):
        backend.in_one_process(self.model, self.model.shadow.background.wait)

    def _find_saved(self):
        names = list(self.model.rules)
        if self.contents == "average":
            return names[0]
        return check_choice("contents", self.contents, (*names, "raw", WHOLE))

    def _has_all(self, logs):
        # Other callbacks may add to the logs until the end of the epoch.
        named = {field for _, field, _, _ in string.Formatter().parse(self.filepath) if field}
        needed = named | {self.monitor} if self.save_best_only else named
        return needed <= {"epoch", *logs}

    def _end_epoch(self, logs):
        epoch, self._epoch = self._epoch, None
        if self.save_freq == "epoch" and (not self.save_best_only or self._improves(epoch, logs)):
            self._save({"epoch": epoch}, logs)

    def _position(self):
        iterations = int(backend.optimizer_step(self.model.raw_model))
        checksum = _sample_checksum(self.model.raw_model.weights)
        return Position(iterations, self.model.average_step, checksum)

    def _scored_route(self):
        if not self.monitor.startswith("val_"):
            return "raw"
        for route in self.model.reported:
            if self.monitor.startswith(f"val_{route}_") and route != self.model.inference:
                return route
        return self.model.inference

    def _find_mode(self):
        name = self.monitor.removeprefix("val_")
        if name.endswith("loss"):
            return "min"
        groups = (getattr(metric, "metrics", [metric]) for metric in self.model.metrics)
        for metric in (metric for group in groups for metric in group):
            direction = metric_direction(metric)
            if direction and (name == metric.name or name.endswith(f"_{metric.name}")):
                return direction
        raise ValueError(
            f"`mode` must be 'min' or 'max' for monitor={self.monitor!r}: Keras does not know "
            "whether a higher value is better. Received: mode='auto'."
        )

    def _improves(self, epoch, logs):
        # Other processes may not see the files in which the best score is.
        return backend.in_one_process(self.model, lambda: self._improves_here(epoch, logs))

    def _improves_here(self, epoch, logs):
        score = logs.get(self.monitor)
        validated = any(name.startswith("val_") for name in logs)
        if score is None and (validated or not self.monitor.startswith("val_")):
            raise ValueError(
                f"`monitor` must be in the logs. Received: monitor={self.monitor!r}. The logs "
                f"have {sorted(logs)}."
            )
        if score is None:
            warnings.warn(
                f"Nothing was saved after epoch {epoch}: there is no {self.monitor!r} "
                "without validation. Pass validation_data to fit.",
                stacklevel=2,
            )
            return False
        if self.best is None or math.isnan(score):
            return not math.isnan(score)
        return bool(score < self.best if self.mode == "min" else score > self.best)

    def _save(self, moment, logs):
        path = pathlib.Path(self.filepath.format(**{**logs, **moment}))
        best = float(logs[self.monitor]) if self.save_best_only else None
        record = {**self._history.record(path, self._position(), best), **moment}
        if self._saved in (WHOLE, self._scored_route()) and self.monitor in logs:
            record.update(monitor=self.monitor, score=float(logs[self.monitor]))
        own = {"raw": self.model.raw_model, WHOLE: self.model}
        model = {**self.model.average_models, **own}[self._saved]

        start = functools.partial(self._start_writing, model, path, record)
        backend.in_one_process(self.model, start, state_variables(model))
        if not backend.is_writer(self.model):
            self._history.add(record)

    def _start_writing(self, model, path, record):
        background = self.model.shadow.background
        background.wait()
        make_folder(path.parent)
        if self.save_on_background:
            staged = stage(model, path.suffix)
            write_model, size = staged.write, staged.size
        else:
            write_model, size = functools.partial(save, model), size_in_file(model)
        take_back = self._history.add(record)

        def write():
            try:
                with atomic_file(path, size) as partial:
                    write_model(partial)
                    write_record(partial, record)
            except BaseException:
                take_back()
                raise
            if self.keep_last:
                self._history.remove_older(self.keep_last)

        if self.save_on_background:
            background.write(write)
        else:
            write()


def _sample_checksum(weights):
    # An optimizer step changes every weight, so a few entries of a large one are enough.
    checksum = 0
    for weight in weights:
        is_large = math.prod(weight.shape) > _LARGE
        sample = keras.ops.reshape(weight, (-1,))[:_LARGE] if is_large else weight
        checksum = zlib.crc32(backend.fetch(sample).tobytes(), checksum)
    return checksum


def _check_contents(contents):
    if not isinstance(contents, str):
        raise ValueError(
            "`contents` must be 'average', the name of an average, 'raw' or 'both'. Received: "
            f"contents={contents!r}."
        )
    return contents


def _check_frequency(save_freq, save_best_only):
    if save_freq == "epoch":
        return save_freq
    if save_best_only:
        raise ValueError(
            "`save_best_only` needs the score of a whole epoch. Received: save_best_only=True with "
            f"save_freq={save_freq!r}. Use save_freq='epoch', or keep_last to limit the files."
        )
    return check_integer("save_freq", save_freq, at_least=1, counts="batches, if not 'epoch'")


def _check_kept(keep_last, filepath):
    if not has_placeholders(filepath):
        raise ValueError(
            "`keep_last` needs a filepath with a placeholder, or each file replaces the one "
            f"before. Received: filepath={filepath!r}. Use e.g. '{{epoch:03d}}.keras'."
        )
    return check_integer("keep_last", keep_last, at_least=1, counts="files")
