"""Running averages of the weights of Keras models."""

import importlib
import sys
import typing

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
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
    "ExponentialAverage",
    "PolyakModel",
    "PolynomialAverage",
    "PowerAverage",
    "Rule",
    "UniformAverage",
    "rescale_decay",
]


def __getattr__(name):
    # Importing Keras takes seconds, and a command that finds its arguments wrong needs none of it.
    if name not in __all__:
        raise AttributeError(f"module 'polyak_model' has no attribute '{name}'")
    home = "polyak_model.model" if name == "PolyakModel" else "polyak_model.rules"
    return getattr(importlib.import_module(home), name)


def __dir__():
    return [*globals(), *__all__]


if "keras" in sys.modules:
    # Registers the classes, so that `keras.models.load_model` finds them.
    importlib.import_module("polyak_model.model")
