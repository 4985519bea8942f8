"""Where the state of a model is: in its variables, or in the scope of a step.

A step on JAX is a function of the state. Keras opens a scope for it, in which
variables have the values that the step was given; what is assigned to them
stays in that scope, which does not see one around it.
"""

import contextlib

import jax
import keras
from jax._src.core import trace_state_clean
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

Tracer = jax.core.Tracer

__all__ = [
    "Tracer",
    "branch",
    "get_stateless_scope",
    "groups_of",
    "in_stateless_scope",
    "in_symbolic_scope",
    "outside_scopes",
    "run_stateless",
    "trace_state_clean",
    "values_of",
]


def groups_of(model, step):
    """Returns the variables that a step of Keras takes and returns, a list of lists.

    Args:
        model: A `keras.Model`.
        step: `"train_step"`, `"test_step"` or `"predict_step"`.
    """
    groups = [model.trainable_variables, model.non_trainable_variables]
    if step == "train_step":
        groups.append(model.optimizer.variables)
    if step != "predict_step":
        groups.append(model.metrics_variables)
    return groups


def values_of(groups):
    """Returns the current values of groups of variables, a tuple of lists."""
    return tuple([variable.value for variable in group] for group in groups)


def run_stateless(function, groups, state):
    """Calls a function that assigns to variables, without changing them.

    Args:
        function: `() -> outputs`.
        groups: Lists of all variables that it reads or assigns to.
        state: Their values, likewise.

    Returns:
        Tuple of the outputs and the new values.
    """
    pairs = [
        pair
        for group, values in zip(groups, state, strict=True)
        for pair in zip(group, values, strict=True)
    ]
    with keras.StatelessScope(state_mapping=pairs, collect_losses=True) as scope:
        outputs = function()
    return outputs, tuple([scope.get_current_value(v) for v in group] for group in groups)


@contextlib.contextmanager
def branch():
    """Opens a scope for a branch that may not be taken; yields `() ->` what it has assigned.

    The branch starts from the values of the current scope. The result is a dict
    from the `id` of a variable to its new value.
    """
    before = get_stateless_scope().state_mapping
    with keras.StatelessScope(collect_losses=True) as scope:
        scope.state_mapping.update(before)
        yield lambda: {k: v for k, v in scope.state_mapping.items() if v is not before.get(k)}


@contextlib.contextmanager
def outside_scopes():
    """While open, operations are executed now, and assignments to variables last."""
    names = ("stateless_scope", "symbolic_scope")
    scopes = {name: global_state.get_global_attribute(name) for name in names}
    for name in names:
        global_state.set_global_attribute(name, None)
    try:
        with jax.ensure_compile_time_eval():
            yield
    finally:
        for name, scope in scopes.items():
            global_state.set_global_attribute(name, scope)
