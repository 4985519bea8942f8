"""Many variables as one tensor, and the order in which operations use them.

A function that TensorFlow calls takes the handle of each variable that it uses as an argument,
and with hundreds of small variables that takes as long as the arithmetic. Packed, they are one
argument. But the order of the reads and writes of a variable, which TensorFlow keeps by the
handle, it does not know for one that was packed, so it is told here.
"""

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
        variables = _packed(resource.op.inputs[0])[resource.value_index :][:1]
        return [alias for v in variables for alias in _index(graph).single.get(id(v), ())]
    if resource.shape.rank == 1:
        variables, index = _packed(resource), _index(graph)
        wholes = {id(whole): whole for v in variables for whole in index.packed.get(id(v), ())}
        singles = [alias for v in variables for alias in index.single.get(id(v), ())]
        return [*wholes.values(), *singles]
    return ()


def _packed(tensor):
    """Returns the handles that a tensor packs, none if it is not from `pack`."""
    return getattr(_origin(tensor), "_packed_handles", ())


def _origin(tensor):
    """Follows a tensor out of the functions that captured it."""
    while tf.is_symbolic_tensor(tensor):
        outer = (outer for outer, inner in tensor.graph.captures if inner is tensor)
        tensor = next(outer, None)
    return tensor


class _Index:
    """What stands for each variable in a graph: tensors of one handle, and of packed ones."""

    def __init__(self, graph):
        self.single, self.packed = {}, {}
        for outer, inner in graph.captures:
            if inner.dtype == tf.resource:
                self._add(_origin(outer) if tf.is_symbolic_tensor(outer) else outer, inner)

    def _add(self, origin, inner):
        self.single.setdefault(id(origin), []).append(inner)
        for place, handle in enumerate(getattr(origin, "_packed_handles", ())):
            self.packed.setdefault(id(handle), []).append(inner)
            for user in inner.consumers():
                if user.type == "Unpack":
                    self.single.setdefault(id(handle), []).append(user.outputs[place])


def _index(graph):
    # The graph keeps it: held anywhere else it would keep the graph.
    version, index = getattr(graph, "_index_of_handles", (None, None))
    if version != graph.version:
        index = _Index(graph)
        graph._index_of_handles = graph.version, index
    return index


with contextlib.suppress(KeyError):  # Registered before this module was loaded anew.
    register_acd_resource_resolver(_resolve_packed_handles)
