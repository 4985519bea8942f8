"""Devices: on JAX, a distribution of Keras says where variables are.

There are no replicas: each operation is that of the whole batch, on one device or on many.
"""

import contextlib

from keras import ops

from polyak_model.backend.jax.state import outside_scopes


def device(name):
    return contextlib.nullcontext()


def place_like(variable, other):
    if variable._layout is not other._layout:
        variable._layout = other._layout
        variable.assign(variable.value)


def strategy_scope(model):
    return contextlib.nullcontext()


def on_each_replica(model, function):
    function()


def once(function):
    with outside_scopes():
        function()


def replicas():
    return 1


def synchronize(variables):
    return [ops.convert_to_tensor(variable) for variable in variables]
