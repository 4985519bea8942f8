"""Devices: averages may be on another one than their weights.

PyTorch has no replicas in one process. Each process of `DistributedDataParallel` updates an average
of its own, all alike.
"""

import contextlib

import keras

from polyak_model.backend.torch.values import value_of


def device(name):
    if name is None:
        return contextlib.nullcontext()
    # PyTorch has one CPU; under a number, Keras would create variables that are no parameters.
    return keras.device("cpu" if name.lower().startswith("cpu:") else name)


def strategy_scope(model):
    return contextlib.nullcontext()


def place_like(variable, other):
    pass  # A variable is on one device.


def on_each_replica(model, function):
    function()


def once(function):
    function()


def replicas():
    return 1


def synchronize(variables):
    return [value_of(variable) for variable in variables]
