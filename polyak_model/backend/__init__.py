"""The current backend of Keras; `interface` documents what is here.

This is the one place that chooses a backend.
"""

import importlib
import pkgutil
import typing

import keras

from polyak_model.backend import interface

if typing.TYPE_CHECKING:
    from polyak_model.backend.interface import *

_current = keras.backend.backend()
_supported = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
if _current not in _supported:
    raise ImportError(
        f"polyak_model runs on these backends of Keras: {', '.join(_supported)}. Received: the "
        f"backend '{_current}'. Set the environment variable KERAS_BACKEND={_supported[0]} before "
        "Keras is imported."
    )

__all__ = [name for names in interface.MODULES.values() for name in names]
for _module, _names in interface.MODULES.items():
    _implementation = importlib.import_module(f"{__name__}.{_current}.{_module}")
    globals().update({name: getattr(_implementation, name) for name in _names})
