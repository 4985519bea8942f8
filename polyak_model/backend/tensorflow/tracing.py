"""Eager execution, graphs, and graphs that are saved."""

import concurrent.futures
import contextlib
import sys

import tensorflow as tf

from polyak_model.backend.common import is_differentiated, symbolic
from polyak_model.backend.keras_internals import in_stateless_scope

__all__ = [
    "compiled",
    "double_precision",
    "is_differentiated",
    "keeps_updates",
    "lift",
    "outside_trace",
    "runs_eagerly",
    "scalar",
    "symbolic",
    "traces_for_export",
    "variables_are_current",
    "when",
]

# The modules that save a graph.
EXPORTERS = ("keras.src.export.", "tensorflow.python.saved_model.")


def when(condition, function):
    def call():
        function()
        return tf.constant(True)

    tf.cond(tf.convert_to_tensor(condition), call, lambda: tf.constant(False))


def compiled(function):
    return tf.function(function, jit_compile=True, autograph=False)


def double_precision():
    return contextlib.nullcontext()


def runs_eagerly():
    return tf.executing_eagerly()


def scalar(value):
    return value


def variables_are_current():
    return True


def keeps_updates():
    return not in_stateless_scope()


def traces_for_export():
    if tf.executing_eagerly():
        return False
    # Neither Keras nor TensorFlow has a flag for it, so look for the exporter among the callers.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(EXPORTERS):
            return True
        frame = frame.f_back
    return False


def lift():
    return tf.init_scope()


def outside_trace(function):
    # Inside `tf.init_scope` a read still adds the variable to those of the graph; in a thread
    # without a graph it does not.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(function).result()
