"""Keeps the weights and the epoch number of Keras's BackupAndRestore consistent.

The callback writes the weights first, and then the number of the next epoch to
a second file. If the process is killed in between, the two disagree, and the
resumed training repeats an epoch. So the file of the weights records the epoch,
too, and the second file is corrected from it before training resumes.
"""

import contextlib
import functools
import json
import pathlib

import keras
from keras import tree

from polyak_model import backend
from polyak_model.backend.keras_internals import backup_in_one_process, backup_position
from polyak_model.saving.score_record import read_record, write_record
from polyak_model.weight_files.atomic_write import atomic_file


class Backups:
    """The BackupAndRestore callbacks of the current fit."""

    def __init__(self):
        self._callbacks = ()

    @contextlib.contextmanager
    def watched(self, model, callbacks):
        """Corrects the files of the BackupAndRestore callbacks, then knows them while open.

        Args:
            model: The model that `fit` trains.
            callbacks: The argument `callbacks` of `fit`.
        """
        kind = keras.callbacks.BackupAndRestore
        listed = tree.flatten(getattr(callbacks, "callbacks", callbacks))
        previous, self._callbacks = self._callbacks, [x for x in listed if isinstance(x, kind)]
        try:
            with contextlib.ExitStack() as stack:
                for callback in self._callbacks:
                    alone = functools.partial(backend.in_one_process, model)
                    alone(functools.partial(_correct_epochs, callback))
                    # All processes collect the weights.
                    join = functools.partial(model.save_weights, _weights_path(callback))
                    save = None if backend.is_writer(model) else join
                    stack.enter_context(backup_in_one_process(callback, alone, save))
                yield
        finally:
            self._callbacks = previous

    def record(self, path, partial):
        """Records the next epoch in a file of weights, if that file is a backup.

        Args:
            path: Path of the file once it is complete.
            partial: Path of the temporary file that has just been written.
        """
        for callback in self._callbacks:
            if pathlib.Path(path) == _weights_path(callback):
                epoch, batch = backup_position(callback)
                write_record(partial, {"epoch": epoch, "batch": batch})


def _weights_path(callback):
    return pathlib.Path(callback.backup_dir, "latest.weights.h5")


def _correct_epochs(callback):
    for ending in ("", ".bkp"):  # Written with `double_checkpoint`.
        _correct_epoch(callback, ending)


def _correct_epoch(callback, ending):
    weights = pathlib.Path(f"{_weights_path(callback)}{ending}")
    metadata = weights.with_name(f"training_metadata.json{ending}")
    if not weights.exists():
        # Killed while Keras removed a finished training's backup, or before the first weights.
        metadata.unlink(missing_ok=True)
    elif record := read_record(weights):
        with atomic_file(metadata) as partial:
            partial.write_text(json.dumps(record), encoding="utf-8")
