"""What Keras's BackupAndRestore writes is one state, whenever the process is killed.

The callback writes the weights and then, into a file of its own, the epoch that
comes next. In between, the two do not belong together, and a fit that goes on
from them repeats an epoch. So the weights carry a record of the epoch.
"""

import contextlib
import json
import pathlib

import keras
from keras import tree

from polyak_model.saving.score_record import read_record, write_record
from polyak_model.weight_files.atomic_write import atomic_file


class Backups:
    """The BackupAndRestore callbacks of a fit under way."""

    def __init__(self):
        self._callbacks = ()

    @contextlib.contextmanager
    def watched(self, callbacks):
        """While open, knows the callbacks of a fit; before, makes their files agree.

        Args:
            callbacks: What `fit` takes.
        """
        kind = keras.callbacks.BackupAndRestore
        listed = tree.flatten(getattr(callbacks, "callbacks", callbacks))
        previous, self._callbacks = self._callbacks, [x for x in listed if isinstance(x, kind)]
        try:
            for callback in self._callbacks:
                _mend(callback)
            yield
        finally:
            self._callbacks = previous

    def record(self, path, partial):
        """Records in a file of weights, if it is a backup, the epoch that comes next.

        Args:
            path: Where the file shall be.
            partial: Where it lies.
        """
        for callback in self._callbacks:
            if str(path) == str(_weights(callback)):
                epoch, batch = callback._current_epoch, callback._last_batch_seen
                write_record(partial, {"epoch": epoch, "batch": batch})


def _weights(callback):
    return pathlib.Path(callback.backup_dir, "latest.weights.h5")


def _mend(callback):
    weights = _weights(callback)
    metadata = weights.with_name("training_metadata.json")
    if not weights.exists():
        # Killed while Keras removed a backup that was no longer needed, or wrote the first one.
        metadata.unlink(missing_ok=True)
    elif record := read_record(weights):
        with atomic_file(metadata) as partial:
            partial.write_text(json.dumps(record), encoding="utf-8")
