"""Checkpoints of the average, the raw model or both, in files that hold what had the score."""

import glob
import math
import os
import pathlib
import string
import warnings

import keras

from polyak_model.errors import check_choice, check_integer
from polyak_model.model import PolyakModel
from polyak_model.saving.saveable_model import size_in_file
from polyak_model.saving.score_record import read_record, write_record
from polyak_model.weight_files.atomic_write import atomic_file

CONTENTS = ("average", "raw", "both")


class AverageCheckpoint(keras.callbacks.Callback):
    """Saves the average model, the raw model, or the wrapper that holds both, while it trains.

    Each file is written whole or not at all. It carries a record of the score
    that its weights had, so that a training that is resumed, by
    `BackupAndRestore`, `load_model` or `load_weights`, goes on from the best
    score of its files. Files of other trainings are neither minded nor removed.
    At the end of an epoch with validation it saves before any other callback can
    change the weights that were scored.

    Args:
        filepath: Path that ends with `.keras` (models) or `.weights.h5`
            (weights), with placeholders as in `keras.callbacks.ModelCheckpoint`:
            `"{epoch:02d}-{val_loss:.3f}.keras"`.
        contents: `"average"` or `"raw"`, plain Keras models; or `"both"`, the
            `PolyakModel`, from which training resumes. Defaults to `"average"`.
        monitor: Name in the logs of the score. Defaults to `"val_loss"`.
        mode: `"min"`, `"max"` or `"auto"`: which scores are better. Defaults to
            `"auto"`, by the name or the metric.
        save_best_only: Bool. Whether to save only what scores better than
            everything before. The score must be that of the contents. Defaults
            to False.
        save_freq: `"epoch"`, or an int: after so many batches. Defaults to
            `"epoch"`.
        keep_last: Int, how many files to keep; older ones of this training are
            removed after a new one is written. Defaults to None: all.

    Raises:
        ValueError: If an argument is out of its range. When training begins: if
            `save_best_only` would score one model and save the other.
        TypeError: When training begins, if the model is no `PolyakModel`.

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
        filepath,
        contents="average",
        monitor="val_loss",
        mode="auto",
        save_best_only=False,
        save_freq="epoch",
        keep_last=None,
    ):
        super().__init__()
        self.filepath = os.fspath(filepath)
        self.contents = check_choice("contents", contents, CONTENTS)
        self.monitor = monitor
        self.mode = check_choice("mode", mode, ("auto", "min", "max"))
        self.save_best_only = bool(save_best_only)
        self.save_freq = _check_frequency(save_freq, self.save_best_only)
        self.keep_last = keep_last if keep_last is None else _check_kept(keep_last, self.filepath)
        if not self.filepath.endswith((".keras", ".weights.h5")):
            raise ValueError(
                "`filepath` must end with '.keras', for models, or '.weights.h5', for weights. "
                f"Received: filepath={self.filepath!r}."
            )
        self.best = None
        self._run = None
        self._epoch = None  # The number of the epoch under way, from 1, until it was dealt with.
        self._training_logs = {}
        self._unsaved = 0
        self._last_batch = -1

    def on_train_begin(self, logs=None):
        if not isinstance(self.model, PolyakModel):
            raise TypeError(
                "AverageCheckpoint saves the models of a PolyakModel. Received: the fit of a "
                f"{type(self.model).__name__}. Wrap the model, PolyakModel(model), or use "
                "keras.callbacks.ModelCheckpoint."
            )
        route = self._scored()
        if self.save_best_only and self.contents not in ("both", route):
            prefix = "" if self.model.inference == self.contents else f"{self.contents}_"
            raise ValueError(
                f"The file must hold the weights that had the score. Received: contents="
                f"{self.contents!r} and monitor={self.monitor!r}, a score of the {route} model"
                f"{'s' * (route == 'ensemble')}. Monitor 'val_{prefix}loss' (it is reported with "
                f"PolyakModel(report=...) that names {self.contents!r}), or save contents='both'."
            )

    def on_epoch_begin(self, epoch, logs=None):
        # By now every callback has restored what it restores.
        self._epoch, self._last_batch = epoch + 1, -1
        self._recall()

    def on_train_batch_end(self, batch, logs=None):
        if self.save_best_only and self.mode == "auto":
            # With the first batch the metrics are built; this is the earliest to tell.
            self.mode = self._direction()
        self._training_logs = logs or {}
        # With steps_per_execution, batches come in bunches.
        self._unsaved += batch - self._last_batch
        self._last_batch = batch
        if self.save_freq != "epoch" and self._unsaved >= self.save_freq:
            self._unsaved = 0
            self._save({"epoch": self._epoch, "batch": batch + 1}, self._training_logs)

    def on_test_end(self, logs=None):
        # Here no other callback can have changed the weights since they were scored.
        scores = {f"val_{name}": value for name, value in (logs or {}).items()}
        logs = {**self._training_logs, **scores}
        if self._epoch is not None and self._has_all(logs):
            self._end_epoch(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._epoch is not None:
            self._end_epoch(logs or {})

    def _has_all(self, logs):
        # Other callbacks may add to the logs until the end of the epoch.
        named = {field for _, field, _, _ in string.Formatter().parse(self.filepath) if field}
        needed = named | {self.monitor} if self.save_best_only else named
        return needed <= {"epoch", *logs}

    def _end_epoch(self, logs):
        epoch, self._epoch = self._epoch, None
        if self.save_freq == "epoch" and (not self.save_best_only or self._improves(epoch, logs)):
            self._save({"epoch": epoch}, logs)

    def on_train_end(self, logs=None):
        self._recall()  # There may have been no epoch left to run.

    def _recall(self):
        if self._run != self.model.shadow.run:
            self._run, self.best = self.model.shadow.run, None
        # The files know more than this object after the process was killed, and the newest is best.
        files = self._files().values() if self.save_best_only else ()
        if newest := max(files, key=lambda record: record["step"], default=None):
            self.best = newest["score"]

    def _scored(self):
        # The route whose score is monitored.
        if not self.monitor.startswith("val_"):
            return "raw"
        for route in self.model.report or ():
            if self.monitor.startswith(f"val_{route}_") and route != self.model.inference:
                return route
        return self.model.inference

    def _direction(self):
        name = self.monitor.removeprefix("val_")
        if name.endswith("loss"):
            return "min"
        groups = (getattr(metric, "metrics", [metric]) for metric in self.model.metrics)
        for metric in (metric for group in groups for metric in group):
            direction = getattr(metric, "_direction", None)
            if direction and (name == metric.name or name.endswith(f"_{metric.name}")):
                return {"up": "max", "down": "min"}[direction]
        raise ValueError(
            f"`mode` must be 'min' or 'max' for monitor={self.monitor!r}, of which Keras does not "
            "tell whether more is better. Received: mode='auto'."
        )

    def _improves(self, epoch, logs):
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
        improves = self._is_better(score)
        if improves:
            self.best = float(score)
        return improves

    def _is_better(self, score):
        if self.best is None or math.isnan(score):
            return not math.isnan(score)
        return score < self.best if self.mode == "min" else score > self.best

    def _files(self):
        # The files that this callback wrote in this training, with their records.
        records = {path: read_record(path) for path in glob.glob(_pattern(self.filepath))}
        return {path: record for path, record in records.items() if self._own < record.items()}

    @property
    def _own(self):
        name = os.path.basename(self.filepath)
        what = f"{name} {self.contents} {self.monitor if self.save_best_only else 'every'}"
        return {"run": self._run, "callback": what}.items()

    def _save(self, moment, logs):
        path = pathlib.Path(self.filepath.format(**{**logs, **moment}))
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {**dict(self._own), "step": self.model.average_step, **moment}
        if self.contents in ("both", self._scored()) and self.monitor in logs:
            record.update(monitor=self.monitor, score=float(logs[self.monitor]))
        model = {
            "average": self.model.average_model,
            "raw": self.model.raw_model,
            "both": self.model,
        }[self.contents]
        with atomic_file(path, size_in_file(model)) as partial:
            if path.name.endswith(".keras"):
                keras.saving.save_model(model, partial)
            else:
                keras.Model.save_weights(model, partial)
            write_record(partial, record)
        if self.keep_last:
            files = self._files()
            newest_first = sorted(files, key=lambda name: files[name]["step"], reverse=True)
            for old in newest_first[self.keep_last :]:
                os.remove(old)


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
    if _pattern(filepath) == glob.escape(filepath):
        raise ValueError(
            "`keep_last` needs a filepath that differs from file to file. Received: "
            f"filepath={filepath!r}. Use e.g. '{{epoch:03d}}.keras'."
        )
    return check_integer("keep_last", keep_last, at_least=1, counts="files")


def _pattern(filepath):
    # 'a/{epoch:02d}.keras' becomes 'a/*.keras'.
    parts = string.Formatter().parse(filepath)
    return "".join(glob.escape(text) + "*" * (field is not None) for text, field, _, _ in parts)
