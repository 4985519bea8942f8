"""What cannot be trained on PyTorch where it is placed."""

import keras

from polyak_model.backend.keras_internals import flatten_layers
from polyak_model.backend.torch import placement


def check_placement(model, device):
    _check_statistics(model)
    if device is not None:
        _check_device(device)


def _check_statistics(model):
    for layer in flatten_layers(model):
        for module in layer.modules():
            if getattr(module, "running_mean", None) is not None:
                raise ValueError(
                    f"PyTorch's {type(module).__name__} keeps running statistics in buffers, which "
                    "are no weights of Keras, so that an average cannot follow them. Received: the "
                    f"layer '{layer.name}' of the model '{model.name}'. Use "
                    "keras.layers.BatchNormalization, or track_running_stats=False."
                )


def _check_device(device):
    try:
        with placement.device(device):
            kind = keras.ops.zeros((0,)).device.type
    # Each kind of device that is missing has an error of its own.
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            "`device` must be a device of this machine that PyTorch can use, such as 'cpu' or "
            f"'cuda:0'. Received: device={device!r}, where PyTorch fails: {error}"
        ) from error
    if kind == "meta":
        raise ValueError(
            "`device` must be one that stores values. Received: device='meta', on which PyTorch "
            "computes shapes only. Pass 'cpu' or leave `device` out."
        )


def check_compilation(
    model, arguments, run_eagerly=False, jit_compile="auto", steps_per_execution=1, **_
):
    pass


def check_method(model, method):
    pass
