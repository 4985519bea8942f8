"""Reads the averages of a `PolyakModel` as they are written to a snapshot."""

import typing

import keras
import numpy as np

from polyak_model import backend
from polyak_model.average.shared_files import unmerged
from polyak_model.saving import layout
from polyak_model.saving.variable_paths import find_saved_values
from polyak_model.snapshots.record import Weight


class _Source(typing.NamedTuple):
    """What is stored at a path: a variable, with what rounding took from it, or an array."""

    path: str
    value: typing.Any
    residual: typing.Any
    dtype: str
    averaged: bool

    def read(self):
        """Returns a copy of the values, floats in 32 bits at least."""
        array = np.array(backend.fetch(self.value))
        if self.residual is not None:
            # Only float64 holds both.
            return array.astype("float64") + backend.fetch(self.residual)
        is_half = "float" in self.dtype and array.dtype.itemsize < 4
        return array.astype("float32") if is_half else array


class AverageReader:
    """Reads one average.

    Args:
        average: A `polyak_model.average.average.Average` that is built.

    Raises:
        ValueError: If Keras saves an averaged weight in another form.
    """

    def __init__(self, average):
        self._average = average
        self._find_sources()

    def _find_sources(self):
        pairing = self._average.pairing
        with unmerged(pairing.average_model):
            values, self.groups = find_saved_values(pairing.average_model)
        saved = {id(value) for value in values.values()}
        for pair in pairing.averaged:
            if id(pair.average) not in saved:
                raise ValueError(
                    "AverageSnapshots needs weights that Keras saves as they are. Received: the "
                    f"weight {pair.average.path!r}, which its layer saves in another form. Let its "
                    "`save_own_variables` store the variable itself."
                )
        for path in filter(layout.is_lora_alpha, values):
            kernel = values[f"{path.rpartition('/')[0]}/0"]
            if "float" not in str(kernel.dtype):
                raise ValueError(
                    "AverageSnapshots needs kernels into which LoRA can be merged. Received: the "
                    f"quantized weight {kernel.path!r}. Train without quantization."
                )
        pairs = {id(pair.average): pair for pair in pairing.averaged}
        self._sources = [_find_source(path, v, pairs.get(id(v))) for path, v in values.items()]
        self._are_constant = all(
            isinstance(value, keras.Variable) or layout.is_lora_alpha(path)
            for path, value in values.items()
        )

    @property
    def rule(self):
        """The rule of the average, with steps counted as by the other averages."""
        rule = self._average.rule
        start_step = rule.start_step + int(self._average.origin.numpy())
        return type(rule).from_config({**rule.get_config(), "start_step": start_step})

    def read(self):
        """Returns the `Weight`s of the average as it is now, copies."""
        if not self._are_constant:
            # Arrays that a layer computes when it is saved.
            self._find_sources()
        return [Weight(s.path, s.read(), s.dtype, s.averaged) for s in self._sources]


def _find_source(path, value, pair):
    dtype = str(getattr(value, "dtype", "float32"))
    if pair is None:
        return _Source(path, value, None, dtype, averaged=False)
    return _Source(path, pair.target, pair.residual, dtype, averaged=pair.learned)


def find_readers(model):
    """Returns an `AverageReader` for each average of a `PolyakModel`, a dict by name.

    Args:
        model: A `PolyakModel` that is built.
    """
    return {name: AverageReader(average) for name, average in model.shadow.averages.items()}
