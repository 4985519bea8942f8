"""Reads the averages of a `PolyakModel` as they are written to a snapshot."""

import keras
import numpy as np

from polyak_model.average.pairing import AVERAGED
from polyak_model.saving.variable_paths import find_saved_values
from polyak_model.snapshots.record import Weight


class AverageReader:
    """Reads one average.

    Args:
        average: A `polyak_model.average.average.Average` that is built.

    Raises:
        ValueError: If Keras saves an averaged weight in another form.
    """

    def __init__(self, average):
        self._average = average
        self._pairing = pairing = average.pairing
        self._values, self.groups = find_saved_values(pairing.average_model)
        saved = {id(value) for value in self._values.values()}
        for pair in pairing.averaged:
            if id(pair.average) not in saved:
                raise ValueError(
                    "AverageSnapshots needs weights that Keras saves as they are. Received: the "
                    f"weight {pair.average.path!r}, which it saves in another form, as with LoRA. "
                    "Merge it before the model is wrapped."
                )
        self._are_variables = all(isinstance(v, keras.Variable) for v in self._values.values())

    @property
    def rule(self):
        """The rule of the average, with steps counted as by the other averages."""
        rule = self._average.rule
        start_step = rule.start_step + int(self._average.origin.numpy())
        return type(rule).from_config({**rule.get_config(), "start_step": start_step})

    def read(self):
        """Returns the `Weight`s of the average as it is now, copies."""
        if not self._are_variables:
            # Arrays that a layer computes when it is saved.
            self._values, self.groups = find_saved_values(self._pairing.average_model)
        pairs = {id(pair.average): pair for pair in self._pairing.pairs}
        return [_read(path, value, pairs.get(id(value))) for path, value in self._values.items()]


def find_readers(model):
    """Returns an `AverageReader` for each average of a `PolyakModel`, a dict by name.

    Args:
        model: A `PolyakModel` that is built.
    """
    return {name: AverageReader(average) for name, average in model.shadow.averages.items()}


def _read(path, value, pair):
    dtype = str(getattr(value, "dtype", "float32"))
    averaged = pair is not None and pair.how == AVERAGED
    array = np.array(keras.ops.convert_to_numpy(pair.target if averaged else value))
    if averaged and pair.residual is not None:
        # Only float64 holds both.
        array = array.astype("float64") + keras.ops.convert_to_numpy(pair.residual)
    elif keras.backend.is_float_dtype(dtype) and array.dtype.itemsize < 4:
        array = array.astype("float32")
    return Weight(path, array, dtype, averaged and pair.learned)
