"""A model whose files are written atomically, and loaded as a whole or not at all."""

import contextlib
import contextvars
import math
import os

import keras
import numpy as np

from polyak_model import backend
from polyak_model.backend.common import optimizers_of
from polyak_model.errors import InputError
from polyak_model.saving import layout
from polyak_model.saving.backup_and_restore import Backups
from polyak_model.saving.wrapper_reader import find_wrappers, read_description
from polyak_model.weight_files.atomic_write import atomic_file
from polyak_model.weight_files.reader import open_weights

# The model whose attributes Keras visits next to save or load them, and their names.
_visited = contextvars.ContextVar("visited", default=(None, ()))


class _Ordered(str):
    """A name of an attribute that Keras, which sorts them, visits in a given order.

    The raw model is loaded before averages that share weights with it.
    """

    __slots__ = ("order",)

    def __lt__(self, other):
        return self.order < other.order


def _in_order(names):
    ordered = list(map(_Ordered, names))
    for order, name in enumerate(ordered):
        name.order = order
    return ordered


class SaveableModel(keras.Model):
    """Saves and loads as any Keras model does, and loses nothing when that fails."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._backups = Backups()

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Saves both models, the optimizer, the step and the rule, as `keras.Model.save` does.

        The file is written atomically: if anything fails, an older file at
        `filepath` stays. Where several processes train the model, all of them
        save it: one writes the file, the others wait.

        Args:
            filepath: Path that ends with `.keras`.
            overwrite: Bool. Whether to replace a file without asking. Defaults
                to True.
            zipped: As in `keras.Model.save`. Defaults to None.
            **kwargs: As in `keras.Model.save`.

        Raises:
            ValueError: If the path ends with neither `.keras` nor a format that
                can be loaded again.
            OSError: If the file cannot be written.
        """
        _check_loadable(filepath)
        save = super().save

        def write():
            if zipped is False or not _is_written_here(filepath, ".keras", overwrite):
                save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
            else:
                with atomic_file(filepath, size_in_file(self)) as partial:
                    save(partial, **kwargs)

        self._write_alone(write)

    def _write_alone(self, write):
        with backend.exclusive_call(self, None), self._file_ended():
            backend.sync(self)
            # Keras swallows what a property raises while it collects the state.
            self.shadow.catch_up()
            backend.in_one_process(self, lambda: self._write_in_order(write), state_variables(self))

    def _write_in_order(self, write):
        # A backup must not be ahead of the snapshots that a training resumed from it counts on.
        self.shadow.background.wait()
        write()

    @contextlib.contextmanager
    def _file_ended(self):
        try:
            yield
        finally:
            self.shadow.end_file()

    def __dir__(self):
        # Keras visits the attributes that `dir` lists, right after it has called one of the two
        # methods below, and names groups after them.
        model, names = _visited.get()
        if model is not self:
            return super().__dir__()
        _visited.set((None, ()))
        return names

    def save_own_variables(self, store):
        # Also as a part of a larger model, which Keras saves.
        backend.sync(self)
        self.shadow.catch_up()
        store[layout.DESCRIPTION] = layout.encode(self.shadow.describe())
        groups = map(layout.average_group, self.shadow.averages)
        self.shadow.begin_saving()
        _visited.set((self, _in_order([layout.RAW, *groups, layout.STATE])))

    def load_own_variables(self, store):
        _visited.set((self, ()))  # Nothing is loaded if this fails.
        self.shadow.begin_loading(None)
        if layout.DESCRIPTION not in set(store.keys()):
            groups = layout.layer_groups_of_format_1(type(self.raw_model).__name__)
            self.__dict__.update(zip(groups, (self.raw_model, self.shadow), strict=True))
            _visited.set((self, [layout.AVERAGE_1, *groups]))
            return
        described = layout.decode(store[layout.DESCRIPTION])
        layout.check_names(described, list(self.shadow.averages))
        layout.check_compensated(described, self.shadow.compensated)
        self.shadow.begin_loading(described)
        common = [name for name in described["averages"] if name in self.shadow.averages]
        groups = map(layout.average_group, common)
        _visited.set((self, _in_order([layout.RAW, *groups, layout.STATE])))

    def save_weights(self, filepath, overwrite=True, **kwargs):
        """Saves the weights of both models, the optimizer and the step, in `.weights.h5`.

        The file is written atomically. Sharded files are written by Keras, one
        after the other.

        Args:
            filepath: Path that ends with `.weights.h5`.
            overwrite: Bool. Whether to replace a file without asking. Defaults
                to True.
            **kwargs: As in `keras.Model.save_weights`.

        Raises:
            OSError: If the file cannot be written.
        """
        save_weights = super().save_weights

        def write():
            if kwargs or not _is_written_here(filepath, ".weights.h5", overwrite):
                save_weights(filepath, overwrite=overwrite, **kwargs)
            else:
                with atomic_file(filepath, size_in_file(self)) as partial:
                    save_weights(partial)
                    self._backups.record(filepath, partial)

        self._write_alone(write)

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """Loads what `save` or `save_weights` wrote: both models, optimizer, step and seeds.

        Args:
            filepath: Path of a `.weights.h5`, `.weights.json` or `.keras` file.
            skip_mismatch: As in `keras.Model.load_weights`. Defaults to False.
            **kwargs: As in `keras.Model.load_weights`.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it contains no average, or another architecture, or a
                newer version of this package wrote it. Whatever is raised, the
                model is unchanged.
        """
        self._check_built("load_weights")
        # A callback may load what another one is writing in the background.
        self.shadow.background.wait()
        if os.path.isfile(filepath):
            self._check_file(filepath, skip_mismatch)
        with self._file_ended(), self._unchanged_on_failure():
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def _check_file(self, filepath, skip_mismatch):
        try:
            with open_weights(filepath) as file:
                wrapper = next((each for each in find_wrappers(file) if not each.path), None)
                description = wrapper and read_description(file, wrapper)
                optimizer = f"{wrapper.raw}/{layout.OPTIMIZER}/" if wrapper else ""
                saved = [path for path in file.variables if path.startswith(optimizer)]
        except InputError as error:
            # As Keras does, so that BackupAndRestore falls back on an older file.
            raise OSError(str(error)) from error
        except ValueError as error:
            raise ValueError(f"Cannot load {str(filepath)!r}. {error}") from error
        if wrapper is None:
            raise ValueError(
                f"{str(filepath)!r} contains no average: it was saved from a plain model. Load it "
                "into the raw model, model.raw_model.load_weights(...), and forget the past with "
                "model.reset_average()."
            )
        if description is not None:
            try:
                self._check_description(description, skip_mismatch)
            except ValueError as error:
                raise ValueError(f"Cannot load {str(filepath)!r}. {error}") from error
        # Keras loads no state into an optimizer without any.
        optimizer = self.optimizer if self.compiled else None
        if optimizer is not None and len(saved) > len(optimizer.variables):
            self._build_optimizer()

    def _check_description(self, description, skip_mismatch):
        if not skip_mismatch:
            layout.check_weights(description, self.raw_model.weights)
        if "averages" in description:
            layout.check_names(description, list(self.shadow.averages))
            layout.check_compensated(description, self.shadow.compensated)

    @contextlib.contextmanager
    def _unchanged_on_failure(self):
        variables = state_variables(self)
        values = [backend.fetch(variable) for variable in variables]
        run = self.shadow.run
        try:
            yield
        except BaseException:
            backend.assign(zip(variables, values, strict=True))
            self.shadow.run = run
            raise


def state_variables(model):
    """Returns all variables that Keras saves with a model, each once.

    Args:
        model: A `keras.Model`.
    """
    optimizers = [v for optimizer in optimizers_of(model) for v in optimizer.variables]
    found = [*model.variables, *model.metrics_variables, *optimizers]
    return list({id(variable): variable for variable in found}.values())


def size_in_file(model):
    """Returns the largest size that a file of a model can have, in bytes.

    Args:
        model: A `keras.Model`.
    """
    overhead = 4096  # HDF5 and the config add less to each variable.
    sizes = [
        math.prod(variable.shape) * np.dtype(str(variable.dtype)).itemsize
        for variable in state_variables(model)
    ]
    return sum(sizes) + overhead * (len(sizes) + 16)


def _check_loadable(filepath):
    if str(filepath).endswith((".h5", ".hdf5")):
        raise ValueError(
            "A PolyakModel is saved as a '.keras' file; Keras cannot load one from the legacy HDF5 "
            f"format. Received: filepath={str(filepath)!r}. Use model.save('model.keras'), or "
            "model.save_weights('model.weights.h5') for the weights alone."
        )


def _is_written_here(filepath, ending, overwrite):
    # The rest is Keras's: remote places, endings it refuses, and asking before it overwrites.
    is_local = "://" not in str(filepath)
    return (
        is_local and str(filepath).endswith(ending) and (overwrite or not os.path.exists(filepath))
    )
