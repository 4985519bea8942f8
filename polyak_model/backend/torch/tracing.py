"""Eager execution, which is all but what `torch.compile` and `torch.export` trace."""

import concurrent.futures
import contextlib

import torch

from polyak_model.backend.common import is_differentiated, symbolic
from polyak_model.backend.keras_internals import in_stateless_scope
from polyak_model.backend.torch.values import value_of

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


def when(condition, function):
    if condition:
        function()


def compiled(function):
    return torch.compile(function)


def double_precision():
    return contextlib.nullcontext()


def runs_eagerly():
    return not torch.compiler.is_compiling()


def scalar(value):
    return value if isinstance(value, int) else value_of(value).item()


def variables_are_current():
    return True


def keeps_updates():
    return not in_stateless_scope()


def traces_for_export():
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def lift():
    return torch.no_grad()


def outside_trace(function):
    # A trace is that of a thread.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(function).result()
