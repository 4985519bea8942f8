"""Many small averages are one array between the steps of a training.

Each array that a compiled step takes and returns costs more time than the arithmetic on
a small weight. Keras hands what a step returns on to the next one, and iterates over it
when it writes the state back to the variables: only then are averages taken apart.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from polyak_model.backend.jax.open_packs import OpenPack, opened

# The most entries of a small weight: on larger ones, the arithmetic takes most of the time.
SMALL = 1 << 14
# The fewest weights that are packed: each saves a few microseconds per step.
FEW = 32

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("enabled", default=True)


@dataclasses.dataclass(frozen=True)
class Pack:
    """Which values of a list are one array: their positions and shapes, two tuples."""

    positions: tuple
    shapes: tuple

    def join(self, parts, numpy=jnp):
        return numpy.concatenate([numpy.ravel(part) for part in parts])

    def split(self, array, numpy=jnp):
        ends = [*itertools.accumulate(map(math.prod, self.shapes))]
        parts = numpy.split(array, ends[:-1])
        return [numpy.reshape(part, shape) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclasses.dataclass(frozen=True)
class _PackOnHost:
    """The same between steps, by NumPy: XLA would take tens of milliseconds to compile a part."""

    pack: Pack

    def join(self, parts):
        return _put(self.pack.join(parts, np), parts[0])

    def split(self, array):
        return _put(self.pack.split(np.asarray(array), np), array)


def _put(values, beside):
    """Copies arrays of NumPy to the device on which an array of JAX is."""
    (device,) = beside.devices()
    with jax.default_device(device):
        return _copy(values)


# For hundreds of arrays, it takes a fourth of the time of `jax.device_put`.
_copy = jax.jit(lambda values: values)


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

    @classmethod
    def join(cls, packs, values, joiners):
        """Packs a list of values, each pack by the `join` of one of `joiners`."""
        arrays = [
            joiner.join([values[n] for n in pack.positions])
            for pack, joiner in zip(packs, joiners, strict=True)
        ]
        packed = {n for pack in packs for n in pack.positions}
        return cls(packs, arrays, [v for n, v in enumerate(values) if n not in packed])

    def split(self, splitters):
        """Returns the list of all values, each pack split by one of `splitters`."""
        values = {}
        for pack, splitter, array in zip(self.packs, splitters, self.arrays, strict=True):
            values.update(zip(pack.positions, splitter.split(array), strict=True))
        rest, length = iter(self.rest), len(values) + len(self.rest)
        return [values[n] if n in values else next(rest) for n in range(length)]

    def __iter__(self):
        return iter(self.split(map(_PackOnHost, self.packs)))

    def tree_flatten(self):
        return (self.arrays, self.rest), self.packs

    @classmethod
    def tree_unflatten(cls, packs, children):
        return cls(packs, *children)


def is_destroyed(state):
    """Returns whether a failed step has destroyed the state, a dict of Keras or None."""
    values = (state or {}).get("non_trainable_variables")
    return isinstance(values, Packed) and any(array.is_deleted() for array in values.arrays)


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
        logs, (trainable, values, *others) = step((trainable, packed.split(packs), *others))
    return logs, (trainable, Packed.join(packed.packs, values, packs), *others)


class PackingTrainFunction:
    """A `train_function` of Keras that packs averages before its first step.

    Args:
        model: A `keras.Model` whose `_moved_pairs()` returns lists of the pairs
            that a step updates with one weight.
        train: The `train_function` that Keras has made.
    """

    def __init__(self, model, train):
        self._model = model
        self._train = train
        self._packs = self._packed = ()
        self._length = None

    def __call__(self, state, iterator):
        trainable, values, *others = state
        if isinstance(values, Packed) or not _enabled.get():
            return self._train(state, iterator)
        # To list all variables takes about as long as to pack them.
        if len(values) != self._length or any(v.value is not values[n] for n, v in self._packed):
            self._length = len(values)
            self._find(self._model.non_trainable_variables, values)
        if not self._packs:
            return self._train(state, iterator)
        packed = Packed.join(self._packs, values, map(_PackOnHost, self._packs))
        outputs = self._train((trainable, packed, *others), iterator)
        for n, _ in self._packed:
            values[n].delete()  # As a step does with what it is given.
        return outputs

    def _find(self, variables, values):
        positions = {id(v): n for n, v in enumerate(variables) if _is_small(values[n])}
        groups = []
        for pairs in self._model._moved_pairs():
            small = [pair for pair in pairs if id(pair.target) in positions]
            groups.append([pair.target for pair in small])
            groups.append([pair.residual for pair in small if pair.residual is not None])
        groups = [group for group in groups if len(group) >= FEW]
        self._packs = tuple(
            Pack(tuple(positions[id(v)] for v in group), tuple(tuple(v.shape) for v in group))
            for group in groups
        )
        self._packed = [(positions[id(v)], v) for group in groups for v in group]


def _is_small(value):
    # What is spread over devices stays so where the distribution was dropped.
    return value.dtype == "float32" and value.size <= SMALL and len(value.devices()) == 1


@contextlib.contextmanager
def unpacked():
    """While open, a training packs nothing, since it takes a single step."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)
