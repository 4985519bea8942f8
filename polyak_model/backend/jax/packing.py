"""Many small averages are one array between the steps of a training.

Each array that a compiled step takes and returns costs more time than the arithmetic on
a small weight. Keras hands what a step returns on to the next one, and iterates over it
when it writes the state back to the variables: only then are averages taken apart.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp

from polyak_model.backend.jax.open_packs import OpenPack, opened

# The most entries of a small weight: on larger ones, the arithmetic takes most of the time.
SMALL = 1 << 14
# The fewest weights that are packed. Each saves a few microseconds per step, and to pack and unpack
# them is compiled for each shape, when training begins and when the variables are first read.
FEW = 32

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("enabled", default=True)


@dataclasses.dataclass(frozen=True)
class Pack:
    """Which values of a list are one array: their positions and shapes, two tuples."""

    positions: tuple
    shapes: tuple

    def join(self, parts):
        return jnp.concatenate([jnp.ravel(part) for part in parts])

    def split(self, array):
        begins = itertools.accumulate(map(math.prod, self.shapes[:-1]), initial=0)
        return [_part(array, *part) for part in zip(begins, self.shapes, strict=True)]


# A function that returns hundreds of slices takes XLA seconds to compile.
@functools.partial(jax.jit, static_argnums=2)
def _part(array, begin, shape):
    return jnp.reshape(jax.lax.dynamic_slice(array, [begin], [math.prod(shape)]), shape)


@functools.partial(jax.jit, static_argnums=0)
def _join(packs, values):
    return [pack.join([values[n] for n in pack.positions]) for pack in packs]


@jax.tree_util.register_pytree_node_class
class Packed:
    """A list of values of which some are kept in arrays; iterate over it for all values.

    Args:
        packs: Tuple of `Pack`s.
        arrays: List of their arrays.
        rest: List of the values that are in no pack, in order.
    """

    def __init__(self, packs, arrays, rest):
        self.packs = packs
        self.arrays = arrays
        self.rest = rest

    def tree_flatten(self):
        return (self.arrays, self.rest), self.packs

    @classmethod
    def tree_unflatten(cls, packs, children):
        return cls(packs, *children)

    def __iter__(self):
        return iter(self.unpack(self.packs))

    def unpack(self, splitters):
        """Returns the list of all values, with `splitters` in place of the packs."""
        values = {}
        for pack, splitter, array in zip(self.packs, splitters, self.arrays, strict=True):
            values.update(zip(pack.positions, splitter.split(array), strict=True))
        rest, length = iter(self.rest), len(values) + len(self.rest)
        return [values[n] if n in values else next(rest) for n in range(length)]


def _rest(packs, values):
    packed = {n for pack in packs for n in pack.positions}
    return [value for n, value in enumerate(values) if n not in packed]


def run_packed(step, groups, state):
    """Calls a training step with values of which some are packed, and packs the new ones.

    Args:
        step: `state -> (logs, new state)`, traced.
        groups: The variables of the state, see `state.groups_of`.
        state: Their values, the non-trainable ones `Packed`.

    Returns:
        Tuple of the logs and the new state.
    """
    trainable, packed, *others = state
    packs = [OpenPack(pack, [groups[1][n] for n in pack.positions]) for pack in packed.packs]
    with opened(packs):
        logs, (trainable, values, *others) = step((trainable, packed.unpack(packs), *others))
    arrays = [
        opener.join([values[n] for n in pack.positions])
        for opener, pack in zip(packs, packed.packs, strict=True)
    ]
    packed = Packed(packed.packs, arrays, _rest(packed.packs, values))
    return logs, (trainable, packed, *others)


def packing(model, train):
    """Returns a `train_function` of Keras that packs averages before its first step.

    Args:
        model: A `keras.Model` whose `_moved_pairs()` returns lists of the pairs
            that a step updates with one weight.
        train: The `train_function` that Keras has made.
    """

    def train_function(state, iterator):
        trainable, values, *others = state
        if isinstance(values, Packed) or not _enabled.get():
            return train(state, iterator)
        packs = _find_packs(model.non_trainable_variables, model._moved_pairs())
        if not packs:
            return train(state, iterator)
        packed = Packed(packs, _join(packs, values), _rest(packs, values))
        outputs = train((trainable, packed, *others), iterator)
        for pack in packs:
            for n in pack.positions:
                values[n].delete()  # As a step does with what it is given.
        return outputs

    return train_function


def _find_packs(variables, moved):
    positions = {id(variable): n for n, variable in enumerate(variables)}
    groups = []
    for pairs in moved:
        small = [pair for pair in pairs if _is_small(pair.target) and id(pair.target) in positions]
        groups.append([pair.target for pair in small])
        groups.append([pair.residual for pair in small if pair.residual is not None])
    return tuple(
        Pack(tuple(positions[id(v)] for v in group), tuple(tuple(v.shape) for v in group))
        for group in groups
        if len(group) >= FEW
    )


def _is_small(variable):
    return variable.dtype == "float32" and math.prod(variable.shape) <= SMALL


@contextlib.contextmanager
def unpacked():
    """While open, a training packs nothing, since it takes a single step."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)
