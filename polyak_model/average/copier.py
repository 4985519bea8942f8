"""Copies objects by structure, so that copy and original share nothing that is assigned to.

Like `copy.deepcopy`, a `Copier` follows all references with a memo. Unlike it,
it keeps a queue, so that a deep graph needs no deep stack, and it follows the
rules of Keras and of the backend for their objects. Nothing is built, computed
or drawn at random.
"""

import collections
import contextlib
import copyreg
import enum
import functools
import inspect
import random
import sys
import types
import weakref
from collections.abc import Callable

import keras
import numpy as np

from polyak_model import backend
from polyak_model.backend import structure
from polyak_model.backend.structure import LEFT_OUT


class CannotCopyError(TypeError):
    """An object supports no copies; the message says which, and what holds it."""


class Copier:
    """Copies objects that refer to each other.

    Args:
        known: Pairs `(original, copy)` of what was copied before. Defaults to
            none.
        optimizer: `() ->` what takes the place of an optimizer. Defaults to
            nothing: the attribute, list or dict that holds one does without.
    """

    def __init__(self, known=(), optimizer=lambda: LEFT_OUT):
        self.optimizer = optimizer
        self._copies = {}  # By the `id` of the original.
        self._originals = []  # Keeps them alive, so that no `id` is used twice.
        self._queue, self._last = collections.deque(), collections.deque()
        self._place = "The value"
        for original, copy in known:
            self.add(original, copy)

    def run(self, value):
        """Returns the copy of a value.

        Args:
            value: Anything.

        Raises:
            CannotCopyError: If a part of it cannot be copied.
        """
        with backend.lift():
            copy = self.whole(value)
            self._empty(self._last)
        return copy

    def whole(self, value):
        """Returns the copy of a value for code that reads it at once."""
        place = self._place
        copy = self(value)
        self._empty(self._queue)
        self._place = place
        return copy

    def _empty(self, tasks):
        while tasks:
            self._place, task = tasks.popleft()
            task()

    def __call__(self, value):
        """Returns the copy of a value, whose parts may be missing until `run` is over."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        place = self._place
        try:
            return _copy.dispatch(type(value))(value, self)
        except CannotCopyError:
            raise
        except Exception as error:
            # Classes of other libraries may raise anything where they support no copies.
            reason = f"{place} holds {_name(value)}, which cannot be copied: {error}."
            raise CannotCopyError(reason) from error

    def add(self, original, copy, fill=None, *args):
        """Remembers a copy, to be completed later by `fill(original, copy, *args)`."""
        self._copies[id(original)] = copy
        self._originals.append(original)
        if fill is not None:
            self.later(fill, original, copy, *args)
        return copy

    def later(self, task, *args):
        """Calls `task(*args)` once the value under way has a copy."""
        self._queue.append((self._place, functools.partial(task, *args)))

    def at_the_end(self, task, *args):
        """Calls `task(*args)` once everything else has been copied."""
        self._last.append((self._place, functools.partial(task, *args)))

    def known(self, originals):
        """Returns the copies of those originals that have been copied."""
        return [self._copies[id(each)] for each in originals if id(each) in self._copies]

    def fill(self, old, new, fixed=types.MappingProxyType({})):
        """Copies the attributes of an object.

        Args:
            old: The original.
            new: Its copy.
            fixed: Attributes to set instead of copying them, a dict by name.
        """
        self.set_attributes(old, new, {k: v for k, v in vars(old).items() if k not in fixed})
        vars(new).update({k: v for k, v in fixed.items() if v is not LEFT_OUT})

    def set_attributes(self, old, new, attributes):
        """Sets the copies of some attributes of the original, a dict by name."""
        place = self._place
        for name, value in attributes.items():
            if not backend.is_bookkeeping(name):
                self._place = f"The attribute `{name}` of {_name(old)}"
                copy = self(value)
                if copy is not LEFT_OUT:
                    vars(new)[name] = copy
        self._place = place
        if attributes:
            self.at_the_end(backend.track_copies, old, new, self)

    def all(self, values):
        """Returns the copies of values, without those that are left out."""
        return [copy for copy in map(self, values) if copy is not LEFT_OUT]

    def id_of_copy(self, key):
        """Returns the `id` of the copy of the object with the `id` `key`, or else the key."""
        return id(self._copies[key]) if key in self._copies else key


def _name(value):
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"'{value.name}' of class {kind}" if isinstance(value, keras.Layer) else f"a {kind}"


def _share(value, copier):
    return value


@functools.singledispatch
def _copy(value, copier):
    """Copies an object of any other class."""
    root = type(value).__module__.partition(".")[0]
    # Of the standard library: locks, files, loggers and the like.
    if root in sys.stdlib_module_names or backend.is_shared(value):
        return value
    return _copy_by_protocol(value, copier)


def _copy_by_protocol(value, copier):
    # What `copy` and `pickle` do with an object, by its own account.
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):  # The name of a global.
        return value
    make, args, state, items, entries = [*reduced, None, None, None][:5]
    # Without arguments, nothing has to be whole: each hook of PyTorch's modules is such an object.
    plain = not args or (make is copyreg.__newobj__ and len(args) == 1)
    args = args if plain else copier.whole(args)
    return copier.add(value, make(*args), _fill, state, items or (), entries or (), copier)


def _fill(old, new, state, items, entries, copier):
    if state is not None and hasattr(type(new), "__setstate__"):
        new.__setstate__(copier.whole(state))
    elif state is not None:
        attributes, slots = state if isinstance(state, tuple) else (state, {})
        copier.set_attributes(old, new, attributes or {})
        for name, value in slots.items():
            object.__setattr__(new, name, copier(value))
    # The methods of the base class: those of a subclass may act on what they are given.
    kinds = (list, collections.deque, collections.OrderedDict, dict)
    kind = next((kind for kind in kinds if isinstance(new, kind)), type(new))
    if items := copier.all(items):
        kind.extend(new, items)
    for key, item in entries:
        item = copier(item)
        if item is not LEFT_OUT:
            kind.__setitem__(new, _key(key, copier), item)
    if isinstance(new, dict) and any(type(key) is int for key in new):
        copier.at_the_end(_translate_ids, new, kind, copier)


def _key(key, copier):
    # A key that hashes by value is as good as its copy, which may not be complete yet.
    by_identity = type(key).__hash__ is object.__hash__
    return copier(key) if by_identity or isinstance(key, tuple) else key


def _translate_ids(new, kind, copier):
    # A dict by `id(layer)` is one by the `id` of the copy.
    entries = [(copier.id_of_copy(key), item) for key, item in new.items()]
    kind.clear(new)
    for key, item in entries:
        kind.__setitem__(new, key, item)


def _copy_set(value, copier):
    def fill(old, new):
        copier.set_attributes(old, new, getattr(old, "__dict__", {}))
        set.update(new, [_key(item, copier) for item in old])

    return copier.add(value, set.__new__(type(value)), fill)


def _copy_tuple(value, copier):
    copies = [None if copy is LEFT_OUT else copy for copy in map(copier, value)]
    unchanged = all(one is other for one, other in zip(copies, value, strict=True))
    return value if unchanged else tuple.__new__(type(value), copies)


def _copy_method(value, copier):
    owner = copier(value.__self__)
    return LEFT_OUT if owner is LEFT_OUT else types.MethodType(value.__func__, owner)


def _copy_weak_reference(value, copier):
    target = copier(value())
    return LEFT_OUT if target is LEFT_OUT else value if target is None else weakref.ref(target)


def _copy_function(value, copier):
    # One that holds nothing to copy, as most do, is shared.
    new = types.FunctionType(
        value.__code__,
        value.__globals__,
        value.__name__,
        copier(value.__defaults__),
        copier(value.__closure__),
    )
    new.__kwdefaults__ = {k: copier(v) for k, v in (value.__kwdefaults__ or {}).items()} or None
    copier.add(value, new)
    pairs = [(value.__defaults__, new.__defaults__)]
    pairs += [(v, new.__kwdefaults__[k]) for k, v in (value.__kwdefaults__ or {}).items()]
    for cell, copy in zip(value.__closure__ or (), new.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # An empty cell.
            held = cell.cell_contents
            # A function that reads the learning rate must read that of the training.
            is_optimizer = isinstance(held, keras.optimizers.Optimizer)
            copy.cell_contents = held if is_optimizer else copier(held)
            pairs.append((held, copy.cell_contents))
    if all(one is other for one, other in pairs):
        return copier.add(value, value)
    for name in ("__doc__", "__module__", "__qualname__"):
        setattr(new, name, getattr(value, name))
    copier.set_attributes(value, new, vars(value))
    return new


def _copy_view(value, copier):
    return copier.add(value, types.MappingProxyType(copier(dict(value))))


def _copy_cell(value, copier):
    return copier.add(value, types.CellType())


_RULES: dict[type, Callable] = {
    **dict.fromkeys((bytes, complex, float, int, str, type(None)), _share),
    **dict.fromkeys((enum.Enum, inspect.Signature, np.generic, type), _share),
    **dict.fromkeys((bytearray, collections.deque, dict, list), _copy_by_protocol),
    **dict.fromkeys((functools.partial, random.Random, types.SimpleNamespace), _copy_by_protocol),
    **dict.fromkeys(
        (collections.ChainMap, collections.UserDict, collections.UserList), _copy_by_protocol
    ),
    set: _copy_set,
    frozenset: lambda value, copier: type(value)(_key(item, copier) for item in value),
    np.ndarray: lambda value, copier: copier.add(value, value.copy()),
    tuple: _copy_tuple,
    types.CellType: _copy_cell,
    types.FunctionType: _copy_function,
    types.MappingProxyType: _copy_view,
    types.MethodType: _copy_method,
    weakref.ref: _copy_weak_reference,
}

for _kind, _rule in {**_RULES, **structure.RULES, **backend.copy_rules()}.items():
    _copy.register(_kind, _rule)
