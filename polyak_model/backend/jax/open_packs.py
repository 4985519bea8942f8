"""Packed averages within a step: an array, and variables that hold its parts.

The array of a pack and its parts are known to be equal, so that an operation on all
parts can be one on the array. Where something else was assigned to a part, the parts
are joined anew.
"""

import contextlib
import contextvars
import operator
import typing

from keras import ops

_open: contextvars.ContextVar[tuple] = contextvars.ContextVar("open", default=())


class OpenPack:
    """A pack in a step; as `value` and `assign` it has those of a variable.

    Args:
        pack: A `packing.Pack`.
        variables: List of the variables whose values are its parts.
    """

    def __init__(self, pack, variables):
        self.variables = variables
        self._pack = pack
        self._known = []

    def split(self, array):
        parts = self._pack.split(array)
        self._known.append((array, parts))
        return parts

    def join(self, parts):
        for array, known in self._known:
            if all(map(operator.is_, parts, known)):
                return array
        return self._pack.join(parts)

    @property
    def value(self):
        return self.join([variable.value for variable in self.variables])

    def assign(self, array):
        for variable, part in zip(self.variables, self.split(array), strict=True):
            variable.assign(part)

    def join_raw(self, values):
        return self._pack.join([ops.cast(value, "float32") for value in values])


class Pair(typing.NamedTuple):
    """A pair of `interface.Pair`s that are one, with `OpenPack`s instead of variables."""

    raw: typing.Any
    target: OpenPack
    residual: OpenPack | None


@contextlib.contextmanager
def opened(packs):
    """While open, operations on all parts of these `OpenPack`s become one on their arrays."""
    token = _open.set(tuple(packs))
    try:
        yield
    finally:
        _open.reset(token)


def merge(pairs):
    """Returns pairs in which those whose targets make up an open pack are one."""
    packs = {id(pack.variables[0]): pack for pack in _open.get()}
    single = {id(pair.target): pair for pair in pairs}
    merged = []
    for pack in packs.values():
        if all(id(variable) in single for variable in pack.variables):
            own = [single.pop(id(variable)) for variable in pack.variables]
            residual = own[0].residual
            residual = None if residual is None else packs[id(residual)]
            merged.append(Pair(pack.join_raw([pair.raw for pair in own]), pack, residual))
    return [*merged, *single.values()]


def join_parts(values):
    """Joins those of some values that make up open packs.

    Args:
        values: Dict from the `id` of a variable to its value.

    Returns:
        Tuple of a list of arrays, one for each such pack, and a list of the
        other values.
    """
    packs, rest = _packs_of(values)
    return [pack.join([values[id(v)] for v in pack.variables]) for pack in packs], [
        values[key] for key in rest
    ]


def split_arrays(keys, joined):
    """Returns the dict with these keys, in their order, that `join_parts` has joined."""
    packs, rest = _packs_of(keys)
    arrays, others = joined
    values = dict(zip(rest, others, strict=True))
    for pack, array in zip(packs, arrays, strict=True):
        values.update(zip(map(id, pack.variables), pack.split(array), strict=True))
    return values


def _packs_of(keys):
    packs = [pack for pack in _open.get() if all(id(v) in keys for v in pack.variables)]
    packed = {id(variable) for pack in packs for variable in pack.variables}
    return packs, [key for key in keys if key not in packed]
