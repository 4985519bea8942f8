"""Which weights are updated together: many small ones, or a large one.

PyTorch takes longer to call an operation on a small tensor than for its arithmetic, so operations
are called for lists of them, and their values are copied to one flat tensor to be checked.
"""

import dataclasses
import operator

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Up to this many elements, a call takes longer than its arithmetic, and than a copy for the check.
SMALL = 2**15
# So many are copied at once, to stay in the cache of a CPU.
TOGETHER = 2**20


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights that are updated together.

    Attributes:
        positions: Their positions among all, a list.
        flat: A tensor for all their values, or None for one weight.
        views: The parts of `flat`, with the shapes of the weights.
    """

    positions: list
    flat: torch.Tensor | None = None
    views: list = dataclasses.field(default_factory=list)

    def of(self, tensors):
        """Returns those of a list that belong to this group."""
        return [tensors[i] for i in self.positions]

    def gather(self, raw, averages):
        """Returns the iterates like their averages, a list, and all their values as one tensor."""
        raw = self.of(raw)
        if self.flat is not None:
            torch._foreach_copy_(self.views, raw)
            return self.views, self.flat
        w = raw[0].to(averages[self.positions[0]])
        return [w], w


@dataclasses.dataclass(frozen=True)
class _Grouping:
    dtype: torch.dtype
    others: list
    groups: list

    def is_of(self, averages):
        """Returns whether these averages have been grouped, if they begin with the same one."""
        first, *others = averages
        # Lists of hundreds of tensors are compared at each step, so nothing of them is read.
        alike = first.dtype == self.dtype and len(others) == len(self.others)
        return alike and all(map(operator.is_, others, self.others))


# By the first average, to which no group refers.
_groupings = WeakTensorKeyDictionary()


def groups_of(averages):
    """Returns the groups of a list of averages, which also apply to others of the same weights.

    They share memory: use what one has gathered before the next one gathers.
    """
    grouping = _groupings.get(averages[0])
    if grouping is None or not grouping.is_of(averages):
        grouping = _Grouping(averages[0].dtype, averages[1:], _group(averages))
        _groupings[averages[0]] = grouping
    return grouping.groups


def _group(tensors):
    groups, buffer = [], {}
    # From the largest group on, since its memory is that of all groups of its kind.
    for positions in sorted(_positions(tensors), key=lambda own: -_size(own, tensors)):
        first = tensors[positions[0]]
        if len(positions) == 1:
            groups.append(Group(positions))
            continue
        if _kind(first) not in buffer:
            buffer[_kind(first)] = first.new_empty(_size(positions, tensors))
        flat = buffer[_kind(first)][: _size(positions, tensors)]
        own = [tensors[i] for i in positions]
        parts = flat.split([tensor.numel() for tensor in own])
        views = [part.view(tensor.shape) for part, tensor in zip(parts, own, strict=True)]
        groups.append(Group(positions, flat, views))
    return groups


def _kind(tensor):
    return tensor.dtype, tensor.device


def _size(positions, tensors):
    return sum(tensors[i].numel() for i in positions)


def _positions(tensors):
    """Returns lists of positions: of small tensors of a kind, or of one tensor."""
    groups, last, sizes = [], {}, {}
    for i, tensor in enumerate(tensors):
        kind, size = _kind(tensor), tensor.numel()
        if size > SMALL:
            groups.append([i])
            continue
        if kind not in last or sizes[kind] + size > TOGETHER:
            last[kind], sizes[kind] = [], 0
            groups.append(last[kind])
        last[kind].append(i)
        sizes[kind] += size
    return groups
