"""Packs the handles of many variables into one tensor, to make calls of functions faster.

A function takes the handle of each variable that it uses as an argument, and with hundreds of
small variables that takes as long as the arithmetic. Packed, they are one argument. But TensorFlow
orders the reads and writes of a variable by its handle, and cannot see handles inside a tensor, so
a resolver tells it which tensors stand for the same variable.

This file can go once TensorFlow calls functions with hundreds of resource arguments as fast as
with one: then `pack` and `unpack` do nothing, as they do already with `ENABLED = False`.
"""

import collections
import contextlib

import tensorflow as tf

from polyak_model.backend.common import may_be_exported

try:
    from tensorflow.python.framework.auto_control_deps import register_acd_resource_resolver
except ImportError:
    register_acd_resource_resolver = None

# Without the resolver the order of reads and writes would be lost.
ENABLED = register_acd_resource_resolver is not None
# To pass fewer handles one by one takes less time than to unpack them.
FEWEST = 4


def pack(handles):
    """Returns a list of tensors that stand for handles, to be captured by the current graph.

    Args:
        handles: List of handles of variables on one device.
    """
    # A SavedModel may refer to variables, not to tensors of their handles.
    if not ENABLED or len(handles) < FEWEST or may_be_exported():
        return handles
    with tf.init_scope():
        packed = tf.stack(handles)
    packed._packed_handles = tuple(handles)
    return [packed]


def unpack(tensors):
    """Returns the handles that `pack` was given, in the current graph.

    Args:
        tensors: List of what `pack` returned.
    """
    is_packed = tensors[0].shape.rank == 1
    return tf.unstack(tensors[0]) if is_packed else tensors


def _resolve_packed_handles(operation, reads, writes):
    """Adds the other tensors that stand for the variables of an operation.

    Args:
        operation: A `tf.Operation`.
        reads: Set of the resources that it only reads, to be extended.
        writes: Set of the other resources that it uses, to be extended.

    Returns:
        Bool: whether a resource was added.
    """
    if operation.type == "Unpack":  # It uses handles, not the variables.
        return False
    return any(_add_aliases(operation.graph, resources) for resources in (reads, writes))


def _add_aliases(graph, resources):
    found = [alias for resource in resources for alias in _aliases(graph, resource)]
    added = [alias for alias in found if alias not in resources]
    resources.update(added)
    return bool(added)


def _aliases(graph, resource):
    if resource.op.type == "Unpack":
        index = _index(graph)
        variables = index.members.get(id(resource.op.inputs[0]), ())[resource.value_index :][:1]
        return [alias for v in variables for alias in index.single[id(v)]]
    if resource.shape.rank == 1:
        index = _index(graph)
        variables = index.members.get(id(resource), ())
        packs = {id(packed): packed for v in variables for packed in index.packed[id(v)]}
        return [*packs.values(), *(alias for v in variables for alias in index.single[id(v)])]
    return ()


class _Index:
    """The tensors that stand for each variable in a graph: single handles, and packed ones."""

    def __init__(self, graph):
        self.members = {}
        self.single, self.packed = collections.defaultdict(list), collections.defaultdict(list)
        outside = {}
        for outer, inner in _captures(graph):
            if inner.dtype == tf.resource:
                self._add(_origin(outer, outside), inner)

    def _add(self, origin, inner):
        handles = getattr(origin, "_packed_handles", ())
        unpacks = [user for user in inner.consumers() if user.type == "Unpack"] if handles else ()
        self.single[id(origin)].append(inner)
        self.members[id(inner)] = handles
        for position, handle in enumerate(handles):
            self.packed[id(handle)].append(inner)
            self.single[id(handle)] += [unpack.outputs[position] for unpack in unpacks]


def _captures(graph):
    return getattr(graph, "captures", ())  # Only the graph of a function has them.


def _origin(tensor, outside):
    """Follows a tensor out of the functions that captured it.

    Args:
        tensor: A tensor, in a graph or not.
        outside: Dict from a graph to its captured tensors by the id of the
            inner one; it is extended.
    """
    while tf.is_symbolic_tensor(tensor):
        graph = tensor.graph
        if graph not in outside:
            outside[graph] = {id(inner): outer for outer, inner in _captures(graph)}
        tensor = outside[graph].get(id(tensor))
    return tensor


def _index(graph):
    # The graph keeps its index: a cache outside would keep the graph alive.
    version, index = getattr(graph, "_index_of_handles", (None, None))
    if version != graph.version:
        index = _Index(graph)
        graph._index_of_handles = graph.version, index
    return index


if register_acd_resource_resolver is not None:
    with contextlib.suppress(KeyError):  # Already registered, when this module is reloaded.
        register_acd_resource_resolver(_resolve_packed_handles)
