"""Snapshots of the averages during training, from which others are rebuilt afterwards."""

import os
import pathlib
import typing

import keras

from polyak_model import backend
from polyak_model.errors import check_integer
from polyak_model.model import PolyakModel
from polyak_model.snapshots.folder import list_snapshots, snapshot_name
from polyak_model.snapshots.reading import AverageReader, find_readers
from polyak_model.snapshots.record import Record, write_snapshot
from polyak_model.snapshots.thinning import find_spacing, find_superfluous
from polyak_model.weight_files.atomic_write import atomic_file, make_folder

# In bytes. Snapshots that a later spacing removes stay in memory up to this limit.
_MOST_PENDING = 2**27


class AverageSnapshots(keras.callbacks.Callback):
    """Saves the averages of a `PolyakModel` at spaced steps of a training.

    From these snapshots `polyak_model.snapshots.rebuild` computes an average of
    any other length, at any step up to the last. With `PowerAverage.pair()` the
    error is smallest; a single average works, too, less exactly.

    Snapshots are kept at every s-th step. When there are twice `count` of them, s
    is doubled and every second one is removed. So there are `count` to twice
    `count` of them however long the training is, and one more at its end. If the
    length of the training is known, small snapshots that will be removed are
    written only if it ends early.

    Snapshots are written in the background, in a thread, while training goes on. It
    waits only if the next is due before the last is written; at its end; and before
    the model is saved, as by `keras.callbacks.BackupAndRestore`, or loads weights. An
    error of the thread is raised then.

    The factors of LoRA are saved one by one, and merged into the kernel where an
    average is rebuilt.

    A training that is resumed goes on in the same folder. Files that this callback
    did not write are left alone.

    Args:
        folder: Path of a folder, which is created if it does not exist. It
            contains the snapshots of one training.
        count: Int of at least 1. Defaults to 16.
        every: Int of at least 1: a snapshot is kept every so many optimizer
            steps, and none is removed. Defaults to None: as `count` says.

    Raises:
        ValueError: If an argument is out of its range. When training begins: if
            the folder contains snapshots of another training, or a layer saves
            weights in a form of its own.
        TypeError: When training begins, if the model is not a `PolyakModel`.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> from polyak_model import PowerAverage, snapshots
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model = PolyakModel(model, average=PowerAverage.pair())
    >>> model.compile(optimizer="sgd", loss="mse")
    >>> folder = tempfile.mkdtemp()
    >>> x, y = np.ones((100, 3)), np.ones((100, 1))
    >>> history = model.fit(x, y, batch_size=1, callbacks=[AverageSnapshots(folder)], verbose=0)
    >>> rebuilt = snapshots.rebuild(folder, PowerAverage.from_relative_width(0.10))
    >>> rebuilt.step, rebuilt.snapshots, round(rebuilt.walk_error, 4)
    (100, 25, 0.0004)
    """

    def __init__(
        self, folder: str | os.PathLike, count: int = 16, every: int | None = None
    ) -> None:
        super().__init__()
        self.folder = pathlib.Path(folder)
        self.count = check_integer("count", count, at_least=1, counts="snapshots")
        self.every = every if every is None else check_integer("every", every, at_least=1)
        self._paths: dict[int, pathlib.Path] = {}  # By step, in the current period.
        # By step: contents of files that are likely to be superfluous.
        self._pending: dict[int, tuple] = {}
        self._readers: dict[str, AverageReader] = {}
        self._position = _Position(0, 0)
        self._period = self._sequence = self._last_step = 0
        self._is_first_epoch = True
        self._batches_left = 0
        self._last_batch = -1

    def on_train_begin(self, logs=None):
        if not isinstance(self.model, PolyakModel):
            raise TypeError(
                "AverageSnapshots saves the averages of a PolyakModel. Received: the fit of a "
                f"{type(self.model).__name__}. Wrap the model: "
                "PolyakModel(model, average=PowerAverage.pair())."
            )
        self._is_first_epoch = True

    def on_epoch_begin(self, epoch, logs=None):
        # Not in on_train_begin, where BackupAndRestore may still have to load its backup.
        if self._is_first_epoch:
            self._resume()
            self._is_first_epoch = False
        self._last_batch = -1

    def on_train_batch_end(self, batch, logs=None):
        # With steps_per_execution, one call stands for several batches.
        self._batches_left -= batch - self._last_batch
        self._last_batch = batch
        if self._batches_left > 0:
            return
        # A batch takes one step at most. Reading the step, or the model, may wait for the device.
        before, position = self._position.step, _find_position(self.model)
        if position.step < before:
            before = 0
            self._restart()
        self._position = position
        spacing = self._spacing(position.step)
        if position.step // spacing > before // spacing:
            last_spacing = self._spacing(max(position.step, self._last_step))
            self._add(is_lasting=position.step // last_spacing > before // last_spacing)
            self._remove(spacing)
        self._batches_left = spacing - position.step % spacing

    def on_train_end(self, logs=None):
        if self._is_first_epoch:
            # A finished training that is resumed has no epoch left.
            self._resume()
        position = _find_position(self.model)
        # It is earlier if the best weights were restored.
        newest = backend.in_one_process(
            self.model, lambda: max({**self._paths, **self._pending}, default=0)
        )
        if position.step > newest:
            self._position = position
            self._add(is_lasting=True)
        self._remove(self._spacing(self._position.step))
        backend.in_one_process(self.model, self._end)

    def _end(self):
        for step in sorted(self._pending):
            self._write(step, *self._pending.pop(step))
        self.model.shadow.background.wait()

    def _spacing(self, step):
        return self.every or find_spacing(step, self.count)

    def _resume(self):
        position = _find_position(self.model)
        self._paths, self._pending, self._readers = {}, {}, {}
        self._position, self._batches_left = position, 0
        planned = self.params.get("epochs", 0) * (self.params.get("steps") or 0)
        self._last_step = position.step + planned
        backend.in_one_process(self.model, lambda: self._find_past(position))

    def _find_past(self, position):
        """Finds which snapshots in the folder belong to the past of this training."""
        # Of a training that was interrupted.
        self.model.shadow.background.wait()
        make_folder(self.folder)
        run, found = self.model.shadow.run, list_snapshots(self.folder)
        for other in found:
            if other.record.run != run:
                raise ValueError(
                    f"`folder` must contain the snapshots of one training. Received: "
                    f"{str(self.folder)!r}, in which {other.path.name!r} is of another one. Choose "
                    "a new folder."
                )
        if not found:
            self._period = self._sequence = 0
            return
        newest = found[-1].record
        self._sequence, self._period = newest.sequence, newest.period
        if position.steps_before > newest.iterations - newest.step:
            self._restart()
            return
        paths = {f.record.step: f.path for f in found if f.record.period == self._period}
        self._paths = {step: path for step, path in paths.items() if step <= position.step}
        for step in paths.keys() - self._paths.keys():
            # Training goes back, and what followed is no longer its past.
            paths[step].unlink(missing_ok=True)

    def _restart(self):
        self._period += 1
        self._paths, self._pending = {}, {}

    def _add(self, is_lasting):
        """Takes a snapshot.

        Args:
            is_lasting: Bool. Whether it stays if training goes on as planned.
        """
        averages = self.model.average_models.values()
        # A generator: to list the variables of a model takes long, and one process needs no list.
        variables = (v for model in (*averages, self.model.shadow) for v in model.variables)
        backend.in_one_process(self.model, lambda: self._take(is_lasting), variables)

    def _take(self, is_lasting):
        step, iterations = self._position
        self._readers = self._readers or find_readers(self.model)
        self._sequence += 1
        rules = {name: reader.rule for name, reader in self._readers.items()}
        run = self.model.shadow.run
        weights = {name: reader.read() for name, reader in self._readers.items()}
        groups = next(iter(self._readers.values())).groups
        record = Record(run, step, iterations, self._period, self._sequence, rules, groups=groups)
        size = sum(weight.array.nbytes for each in weights.values() for weight in each)
        if is_lasting or size * 2 * self.count > _MOST_PENDING:
            self._write(step, record, weights)
        else:
            self._pending[step] = (record, weights)

    def _write(self, step, record, weights):
        path = self.folder / snapshot_name(step)
        # HDF5 and the record add less to each variable.
        size = sum(weight.array.nbytes + 4096 for each in weights.values() for weight in each)

        def write():
            with atomic_file(path, size) as partial:
                write_snapshot(partial, record, weights)

        self.model.shadow.background.write(write)
        self._paths[step] = path

    def _remove(self, spacing):
        for step in find_superfluous({**self._paths, **self._pending}, spacing):
            self._pending.pop(step, None)
            if step in self._paths:
                self._paths.pop(step).unlink(missing_ok=True)


class _Position(typing.NamedTuple):
    step: int
    iterations: int

    @property
    def steps_before(self):
        """The steps of the same optimizer before averaging was restarted."""
        return self.iterations - self.step


def _find_position(model):
    return _Position(model.average_step, int(backend.optimizer_step(model.raw_model)))
