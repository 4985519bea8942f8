"""Many variables as one tensor, and the order in which operations use them.

A function that TensorFlow calls takes the handle of each variable that it uses as an argument,
and with hundreds of small variables that takes as long as the arithmetic. Packed, they are one
argument. But the order of the reads and writes of a variable, which TensorFlow keeps by the
handle, it does not know for one that was packed, so it is told here.
"""

import collections
import contextlib

import tensorflow as tf
from tensorflow.python.framework.auto_control_deps import register_acd_resource_resolver


def pack(handles):
    """Returns handles of variables as one tensor, to be captured by the graph at hand.

    Args:
        handles: List of the handles of variables on one device.
    """
    with tf.init_scope():
        packed = tf.stack(handles)
    packed._packed_handles = tuple(handles)
    return packed


def unpack(packed):
    """Returns the handles that were packed, in the graph at hand."""
    return tf.unstack(packed)


def _resolve_packed_handles(operation, reads, writes):
    """Adds what else stands for the variables that an operation uses.

    Args:
        operation: A `tf.Operation`.
        reads: Set of resources that it only reads, to which those are added.
        writes: Set of the others, likewise.

    Returns:
        Bool: whether any was added.
    """
    if operation.type == "Unpack":  # It uses handles, not what they stand for.
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
        wholes = {id(whole): whole for v in variables for whole in index.packed[id(v)]}
        return [*wholes.values(), *(alias for v in variables for alias in index.single[id(v)])]
    return ()


class _Index:
    """What stands for each variable in a graph: tensors of one handle, and of packed ones."""

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
        for place, handle in enumerate(handles):
            self.packed[id(handle)].append(inner)
            self.single[id(handle)] += [unpack.outputs[place] for unpack in unpacks]


def _captures(graph):
    return getattr(graph, "captures", ())  # A graph that is no function's has none.


def _origin(tensor, outside):
    """Follows a tensor out of the functions that captured it.

    Args:
        tensor: A tensor, in a graph or not.
        outside: Dict from graphs to what their captures are outside; it is
            extended.
    """
    while tf.is_symbolic_tensor(tensor):
        graph = tensor.graph
        if graph not in outside:
            outside[graph] = {id(inner): outer for outer, inner in _captures(graph)}
        tensor = outside[graph].get(id(tensor))
    return tensor


def _index(graph):
    # The graph keeps it: held anywhere else it would keep the graph.
    version, index = getattr(graph, "_index_of_handles", (None, None))
    if version != graph.version:
        index = _Index(graph)
        graph._index_of_handles = graph.version, index
    return index


with contextlib.suppress(KeyError):  # Registered before this module was loaded anew.
    register_acd_resource_resolver(_resolve_packed_handles)
