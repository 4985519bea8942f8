"""Eager execution and traced functions."""

import contextlib
import contextvars

import jax
import jax.numpy as jnp
from jax._src.interpreters import ad

from polyak_model.backend.common import symbolic
from polyak_model.backend.jax.open_packs import join_parts, split_arrays
from polyak_model.backend.jax.state import (
    Tracer,
    branch,
    get_stateless_scope,
    in_stateless_scope,
    in_symbolic_scope,
    outside_scopes,
    trace_state_clean,
)

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
    "updates_dropped",
    "variables_are_current",
    "when",
]

# JAX names them differently from version to version.
_DIFFERENTIATED = tuple(
    getattr(ad, name) for name in ("JVPTracer", "LinearizeTracer") if hasattr(ad, name)
)
_dropped = contextvars.ContextVar("dropped", default=False)


def when(condition, function):
    condition = jnp.asarray(condition)
    if not isinstance(condition, Tracer):
        if condition:
            function()
        return
    state, changed = get_stateless_scope().state_mapping, []

    def then():
        with branch() as assigned:
            function()
            values = assigned()
        changed[:] = values
        return join_parts(values)

    # It is traced before the other branch.
    joined = jax.lax.cond(condition, then, lambda: join_parts({key: state[key] for key in changed}))
    state.update(split_arrays(changed, joined))


def compiled(function):
    return function  # It is compiled with the step that calls it.


def double_precision():
    return jax.enable_x64(True)


def runs_eagerly():
    return variables_are_current() and trace_state_clean()


def scalar(value):
    return value


def variables_are_current():
    return not in_stateless_scope()


@contextlib.contextmanager
def updates_dropped():
    """While open, assignments do not last, since variables hold values for a file alone."""
    token = _dropped.set(True)
    try:
        yield
    finally:
        _dropped.reset(token)


def is_differentiated(variables):
    return any(isinstance(variable.value, _DIFFERENTIATED) for variable in variables)


def keeps_updates():
    if in_symbolic_scope() or _dropped.get():
        return False
    # Elsewhere in a trace, an assignment would leave a tracer in the variable.
    return in_stateless_scope() or trace_state_clean()


def traces_for_export():
    return False


def lift():
    return outside_scopes()


def outside_trace(function):
    function()
