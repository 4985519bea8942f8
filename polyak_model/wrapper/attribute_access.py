"""Attributes of the raw model, read and set through its wrapper."""

import keras

# Arguments of `PolyakModel` that act when the model is wrapped, and what to do later instead.
_FIXED = {
    "average": "Set model.rule = ExponentialAverage(decay), or another rule.",
    "clone_function": "It was called when the model was wrapped. Wrap the raw model again.",
    "combine": "Wrap the raw model again: PolyakModel(model.raw_model, combine=...).",
    "compensated": "Wrap the raw model again: PolyakModel(model.raw_model, compensated=...).",
    "exclude": "Wrap the raw model again: PolyakModel(model.raw_model, exclude=...).",
    "device": "Wrap the raw model again: PolyakModel(model.raw_model, device=...).",
    "share_frozen": "Wrap the raw model again: PolyakModel(model.raw_model, share_frozen=...).",
    "non_trainable": "Wrap the raw model again: PolyakModel(model.raw_model, non_trainable=...).",
}


class RawAttributes(keras.Model):
    """Reads and sets on the raw model what the wrapper itself lacks.

    So a callback that sets `self.model.beta` or assigns to `self.model.gamma`
    acts as on the bare model. A method is not forwarded: the raw and the average
    model have one each.
    """

    def __getattr__(self, name):
        # Called only where the wrapper itself has no such attribute.
        own = _own_attributes(self)
        if name in own:
            return own[name]
        raw = own.get("raw_model")
        missing = f"'{type(self).__name__}' object has no attribute '{name}'"
        if raw is None or name.startswith("_") or not hasattr(raw, name):
            raise AttributeError(missing)
        value = getattr(raw, name)
        if callable(value) and not isinstance(value, (keras.Layer, keras.Variable)):
            raise AttributeError(
                f"{missing}. Its raw model and its average model have one each: call "
                f"model.raw_model.{name} or model.average_model.{name}."
            )
        return value

    def __setattr__(self, name, value):
        wrapped = vars(self).get("_wrapped", False)
        if wrapped and name in _FIXED:
            raise AttributeError(
                f"`{name}` cannot be changed after a model was wrapped. Received: "
                f"{name}={value!r}. {_FIXED[name]}"
            )
        if wrapped and name == "optimizer" and value is not self.raw_model.optimizer:
            self.raw_model.optimizer = value  # Both models have one.
        own = name.startswith("_") or name in _own_attributes(self) or hasattr(type(self), name)
        if wrapped and not own and hasattr(self.raw_model, name):
            setattr(self.raw_model, name, value)
        else:
            super().__setattr__(name, value)


def _own_attributes(model):
    # PyTorch keeps the layers among them in a dict.
    return vars(model) | vars(model).get("_modules", {})
