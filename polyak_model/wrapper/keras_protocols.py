"""What tools ask of a Keras model besides training: to describe, build and plot it."""

import inspect
import math
import weakref

import keras
from keras import ops, tree

from polyak_model import backend
from polyak_model.average import cloning
from polyak_model.backend import keras_internals
from polyak_model.backend.keras_internals import build_on_placeholders
from polyak_model.inference.routes import ALIAS

_CANNOT_QUANTIZE = (
    "Neither a PolyakModel nor its `raw_model` and `average_model` can be quantized: averages of "
    "quantized weights are not defined, and those before the change would be lost. To train a "
    "quantized model, quantize it first, then wrap it. To serve one, quantize a copy: "
    "served = clone_model(model.average_model), then served.quantize('int8')."
)


class KerasProtocols(keras.Model):
    """Describes and builds a PolyakModel as its raw model describes and builds itself."""

    def __call__(self, *args, **kwargs):
        if not args and kwargs:
            # `call` takes the first argument by any name that the raw model has for it.
            first = next(iter(inspect.signature(self.raw_model.call).parameters), None)
            args = (kwargs.pop(first),) if first in kwargs else ()
        if not self.built:
            self._start_on_call(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _start_on_call(self, *args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name != "training"}
        if not cloning.has_weights(self.raw_model) and (len(args) > 1 or kwargs):
            # Keras would call `build`, which knows the first argument alone.
            args, kwargs = tree.map_structure(_as_placeholder, (args, kwargs))
            with backend.strategy_scope(self):
                backend.once(lambda: build_on_placeholders(self.raw_model, *args, **kwargs))
            backend.once(self._start_if_built)

    def get_build_config(self):
        return self.raw_model.get_build_config()

    def build_from_config(self, config):
        if not self.shadow.started:
            self.raw_model.build_from_config(config)
            self._start_if_built()

    @property
    def layers(self):
        """The layers of the raw model, which tools read and `get_layer` finds."""
        return self.raw_model.layers

    def count_params(self):
        """Returns the number of weights of the raw model and of its averages, shared ones once."""
        self._check_built("count_params")
        pairs = [p for pairing in self.shadow.pairings for p in pairing.own]
        return self.raw_model.count_params() + sum(math.prod(p.average.shape) for p in pairs)

    def summary(self, line_length=None, positions=None, print_fn=None, *args, **kwargs):
        """Prints the summary of the raw model, and the rule, step and size of each average.

        Args:
            line_length: As in `keras.Model.summary`, like all arguments.
            positions: See there.
            print_fn: See there.
            *args: See there.
            **kwargs: See there.

        Example:

        >>> from polyak_model import PolyakModel, UniformAverage
        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> model = PolyakModel(inner, UniformAverage())
        >>> lines = []
        >>> model.summary(print_fn=lines.append)
        >>> print(lines[-1])
         Average: UniformAverage(start_step=0, update_every=1), step 0, 8 params (32.00 B)
        """
        self.raw_model.summary(line_length, positions, print_fn, *args, **kwargs)
        show = print_fn or keras_internals.print_message
        for average in self.shadow.averages.values():
            show(self._describe(average))

    def _describe(self, average):
        size = "not built"
        if average.pairing is not None:
            pairs = average.pairing.own
            stored = [v for p in pairs for v in (p.average, p.master, p.residual) if v is not None]
            size = keras_internals.describe_size([p.average for p in pairs], stored)
            if average.pairing.shared:
                size += f" beside {len(average.pairing.shared)} shared weights"
        name = "" if average.name == ALIAS else f" '{average.name}'"
        step = self.average_step - int(ops.convert_to_numpy(average.origin))
        return f" Average{name}: {average.rule!r}, step {step}, {size}"

    def quantize(self, *args, **kwargs):
        """Raises `ValueError`: quantized weights cannot be averaged."""
        raise ValueError(_CANNOT_QUANTIZE)

    def _refuse_quantization(self):
        wrapper = weakref.ref(self)

        def check():
            if wrapper() is not None:
                raise ValueError(_CANNOT_QUANTIZE)

        for model in (self.raw_model, *self.shadow.models):
            keras_internals.check_before_quantizing(model, check)


def _as_placeholder(value):
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return keras.KerasTensor(tuple(value.shape), keras.backend.standardize_dtype(value.dtype))
    return value
