"""Several processes that train one model, whose variables are spread over all of them.

They meet at the coordination service of JAX rather than in operations on devices,
which would bring down all processes if one of them came an hour late.
"""

import builtins
import contextlib
import itertools
import json

import jax
import keras
from jax._src.distributed import global_state as distributed
from jax.experimental import multihost_utils
from keras import ops

from polyak_model.backend.jax.tracing import updates_dropped

__all__ = ["fetch", "in_one_process", "is_writer"]

# Milliseconds. All processes train in step, but only one of them writes a file.
_LONGEST_DELAY = 30 * 60 * 1000
_LONGEST_WRITE = 24 * 60 * 60 * 1000

_calls = itertools.count()


def fetch(value):
    value = ops.convert_to_tensor(value)
    if _is_here(value):
        return ops.convert_to_numpy(value)
    return multihost_utils.process_allgather(value, tiled=True)


def _is_here(value):
    return (
        not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated
    )


def is_writer(model):
    return jax.process_index() == _processes(model)[0]


def _processes(model):
    """Returns the sorted indices of the processes that train a model."""
    layout = model.variables[0]._layout if jax.process_count() > 1 else None
    if layout is None:
        return [jax.process_index()]
    sharding = getattr(layout, "backend_layout", layout)
    return sorted({device.process_index for device in sharding.device_set})


def in_one_process(model, function, variables=()):
    processes = _processes(model)
    if len(processes) == 1:
        return function()
    key = f"polyak_model/{processes[0]}/{next(_calls)}"
    client = distributed.client
    try:
        client.wait_at_barrier(f"{key}/begin", _LONGEST_DELAY, processes)
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"All of the {len(processes)} processes that train a model must save it together, and "
            "fit it with the same callbacks. Received: a call in process "
            f"{jax.process_index()} for which the others did not come. Make it in all of them; one "
            "of them writes the file."
        ) from error
    with _gathered(variables, keep=is_writer(model)):
        if is_writer(model):
            return _told(client, key, function)
    return _heard(json.loads(client.blocking_key_value_get(key, _LONGEST_WRITE)))


@contextlib.contextmanager
def _gathered(variables, keep):
    """While open, variables that are spread over processes have their whole values.

    Args:
        variables: `keras.Variable`s.
        keep: Bool. Whether this process needs the values: all take part in
            collecting them, one variable after another.
    """
    spread = {id(variable): variable for variable in variables if not _is_here(variable.value)}
    before = [(variable, variable.value) for variable in spread.values()]
    distribution = keras.distribution.distribution()
    try:
        for variable, value in before:
            whole = fetch(value)
            if keep:
                variable._value = whole
        # Keras creates variables while it saves, which all processes would have to do.
        keras.distribution.set_distribution(None)
        with updates_dropped():
            yield
    finally:
        keras.distribution.set_distribution(distribution)
        for variable, value in before:
            variable._value = value


def _told(client, key, function):
    """Calls a function and tells the other processes what came of it."""
    told = {"error": ["RuntimeError", "it was interrupted"]}
    try:
        told = {"result": function()}
        return told["result"]
    except Exception as error:
        told = {"error": [type(error).__name__, str(error)]}
        raise
    finally:
        client.key_value_set(key, json.dumps(told))


def _heard(told):
    if "error" in told:
        name, message = told["error"]
        kind = getattr(builtins, name, RuntimeError)
        raise kind(f"In the process that writes for all: {message}")
    return told["result"]
