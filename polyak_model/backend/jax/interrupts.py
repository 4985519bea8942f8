"""Ctrl-C during a compiled step loses nothing, except in the first, which compiles.

A step destroys the state that it is given. Python raises `KeyboardInterrupt` when the
compiled step returns, before Keras has stored the new state, so that a bare model would
be left without weights.
"""

import contextlib
import signal
import threading

_GROUPS = ("trainable_variables", "non_trainable_variables")
_NAMES = {
    2: _GROUPS,
    3: (*_GROUPS, "metrics_variables"),
    4: (*_GROUPS, "optimizer_variables", "metrics_variables"),
}


@contextlib.contextmanager
def results_kept(model):
    """While open, what Keras compiles for a model keeps its results if it is interrupted."""
    if "_make_function" in vars(model):
        yield
        return
    make = model._make_function

    def make_function(step, *args, **kwargs):
        return make(_keeping(model, step), *args, **kwargs)

    vars(model)["_make_function"] = make_function
    try:
        yield
    finally:
        del vars(model)["_make_function"]


def _keeping(model, step):
    if model.run_eagerly or not model.jit_compile:
        return step
    is_compiled = False

    def keeping(state, data):
        nonlocal is_compiled
        # The first call may compile for minutes, and is interrupted at once.
        with _interrupt_held() if is_compiled else contextlib.nullcontext():
            outputs, state = step(state, data)
            # As Keras does when the step has returned.
            vars(model)["_jax_state"] = dict(zip(_NAMES[len(state)], state, strict=True))
        is_compiled = True
        return outputs, state

    return keeping


@contextlib.contextmanager
def _interrupt_held():
    """Raises `KeyboardInterrupt` at the end of the block if SIGINT arrives within it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    arrived = []
    signal.signal(signal.SIGINT, lambda *_: arrived.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if arrived:
        raise KeyboardInterrupt
