"""Running averages of the weights of Keras models."""

import importlib
import sys
import typing

__version__ = "0.2.0"

if typing.TYPE_CHECKING:
    from polyak_model.average.batch_norm import refresh_statistics
    from polyak_model.average.cloning import clone_model
    from polyak_model.callbacks import AverageCheckpoint, AverageMonitor, AverageSnapshots
    from polyak_model.model import PolyakModel
    from polyak_model.rules import (
        ExponentialAverage,
        PolynomialAverage,
        PowerAverage,
        Rule,
        UniformAverage,
        rescale_decay,
    )

__all__ = [
    "AverageCheckpoint",
    "AverageMonitor",
    "AverageSnapshots",
    "ExponentialAverage",
    "PolyakModel",
    "PolynomialAverage",
    "PowerAverage",
    "Rule",
    "UniformAverage",
    "clone_model",
    "refresh_statistics",
    "rescale_decay",
]
_HOMES = {
    "AverageCheckpoint": "polyak_model.callbacks",
    "AverageMonitor": "polyak_model.callbacks",
    "AverageSnapshots": "polyak_model.callbacks",
    "PolyakModel": "polyak_model.model",
    "clone_model": "polyak_model.average.cloning",
    "refresh_statistics": "polyak_model.average.batch_norm",
}


if not typing.TYPE_CHECKING:  # For type checkers, any name would exist.

    def __getattr__(name):
        # Importing Keras takes seconds, and a command that finds its arguments wrong needs none of
        # it.
        if name not in __all__:
            raise AttributeError(f"module 'polyak_model' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOMES.get(name, "polyak_model.rules")), name)


def __dir__():
    return [*globals(), *__all__]


if "keras" in sys.modules:
    # Registers the classes, so that `keras.models.load_model` finds them.
    importlib.import_module("polyak_model.model")
