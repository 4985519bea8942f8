"""One call at a time works on the variables of a model.

On JAX a call of `fit`, `evaluate` or `predict` takes the state out of the variables
and hands it from step to step. The other threads wait for it, except that a
training lets them in while it runs callbacks: one of these may wait for such a
thread. The state is in the variables then, and a copy of it goes to the next step,
since a step destroys what it is given.
"""

import contextlib
import itertools
import threading
import weakref

import jax
import keras

from polyak_model.backend.jax.interrupts import results_kept
from polyak_model.backend.jax.state import in_stateless_scope


class _Gate:
    """Lets one thread in at a time, in the order in which they came.

    Attributes:
        active: The models whose state is outside of their variables, a list;
            None stands for a call that only reads.
        lent: Those of them whose next step must not destroy what the variables
            hold.
        is_guest: Whether the thread inside came while another one had paused.
    """

    def __init__(self):
        self.active = []
        self.lent = weakref.WeakSet()
        self.is_guest = False
        self._condition = threading.Condition()
        self._tickets = itertools.count()
        self._waiting = {}
        self._paused = {}
        self._owner = None
        self._depth = 0

    def enter(self, may_enter=lambda: True, depth=1):
        me = threading.get_ident()
        with self._condition:
            if self._owner == me:
                self._depth += depth
                return
            ticket = next(self._tickets)
            self._waiting[ticket] = may_enter
            try:
                self._condition.wait_for(lambda: self._is_next(ticket))
            finally:
                del self._waiting[ticket]
            self._owner, self._depth = me, depth
            self.is_guest = bool(self.active) and me not in self._paused

    def _is_next(self, ticket):
        ready = (other for other, may_enter in self._waiting.items() if may_enter())
        return self._owner is None and min(ready, default=None) == ticket

    def leave(self):
        with self._condition:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._condition.notify_all()

    def pause(self):
        """Lets others in until this thread calls `resume`."""
        me = threading.get_ident()
        with self._condition:
            if self._owner == me:
                self._paused[me], self._owner = self._depth, None
                self._condition.notify_all()

    def resume(self):
        me = threading.get_ident()
        if me in self._paused:
            self.enter(depth=self._paused[me])
            del self._paused[me]

    def lend(self):
        """Puts the state of the call that has paused into the variables."""
        for model in self.active if self.is_guest else ():
            if model is not None:
                model.jax_state_sync()
                self.lent.add(model)


_gates: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _gate(model):
    return _gates.setdefault(model, _Gate())


@contextlib.contextmanager
def exclusive_call(model, route):
    gate = _gate(model)
    # A training lets everybody in but another training.
    gate.enter(lambda: route is not model or not gate.active)
    gate.lend()
    gate.active.append(route)
    try:
        with contextlib.nullcontext() if route is None else _called(gate, route):
            yield
    finally:
        gate.resume()  # A callback may have failed.
        gate.active.pop()
        gate.leave()


@contextlib.contextmanager
def _called(gate, route):
    is_guest = gate.is_guest

    def get_state(purge_model_variables=False, **groups):
        copies = is_guest or route in gate.lent
        gate.lent.discard(route)
        purge = purge_model_variables and not copies
        get = type(route)._get_jax_state
        state = get(route, purge_model_variables=purge, **groups)
        return jax.tree.map(jax.numpy.copy, state) if copies else state

    def sync_metrics():
        # The others are as they were, unless the call that has paused changed them.
        state = getattr(route, "_jax_state", None) or {}
        route._jax_state = {k: state[k] for k in state if k == "metrics_variables"}
        type(route).jax_state_sync(route)

    own = {"_get_jax_state": get_state} | ({"jax_state_sync": sync_metrics} if is_guest else {})
    variables = [*route.variables, *route.metrics_variables]
    values = [variable.value for variable in variables]
    before = {name: vars(route)[name] for name in own if name in vars(route)}
    vars(route).update(own)
    try:
        with results_kept(route):
            yield
    except BaseException:
        # Keras leaves variables empty, as it does during the call.
        route.jax_state_sync()
        for variable, value in zip(variables, values, strict=True):
            if variable._value is None:
                variable.assign(value)
        raise
    finally:
        for name in own:
            del vars(route)[name]
        vars(route).update(before)


def sync(model):
    if in_stateless_scope():  # Inside a step, variables have the values of that step.
        return
    gate = _gate(model)
    gate.enter()
    try:
        gate.lend()
        model.jax_state_sync()
    finally:
        gate.leave()


class _Pause(keras.callbacks.Callback):
    """Calls a function at each event of a training, but for the batches of its validation."""

    async_safe = True  # It leaves it to the other callbacks how Keras calls them.

    def __init__(self, function):
        super().__init__()
        for event in ("train", "epoch", "train_batch", "test"):
            for moment in ("begin", "end"):
                setattr(self, f"on_{event}_{moment}", lambda *args, **kwargs: function())


def interruptible(model, callbacks):
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    gate = _gate(model)
    return [_Pause(gate.pause), *keras.tree.flatten(callbacks or []), _Pause(gate.resume)]
