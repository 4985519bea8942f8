"""How TensorFlow's objects are copied by structure, see `polyak_model.backend.structure`."""

import tensorflow as tf
from keras.src.utils.tracking import DotNotTrackScope
from tensorflow.python.trackable.base import Trackable
from tensorflow.python.trackable.data_structures import ListWrapper, _DictWrapper, _TupleWrapper

__all__ = ["copy_rules", "is_bookkeeping", "is_shared", "track_copies"]

_DEPENDENCIES = "_self_unconditional_checkpoint_dependencies"
_BOOKKEEPING = {
    _DEPENDENCIES,
    "_self_name_based_restores",
    "_self_saveable_object_factories",
    "_self_unconditional_deferred_dependencies",
    "_self_unconditional_dependency_names",
    "_self_update_uid",
}

PRIVATE = (
    (Trackable, ("_track_trackable", "_maybe_initialize_trackable")),
    (type(tf.function(lambda: None)), ("_clone",)),
)


def is_bookkeeping(name):
    """Returns whether an attribute holds what TensorFlow tracks, such as checkpoint dependencies.

    Args:
        name: Name of an attribute.
    """
    return name in _BOOKKEEPING


def track_copies(old, new, copier):
    """Tracks in a copy the copies of what TensorFlow tracks in the original.

    Shared by mistake, these references make a checkpoint of the copy restore
    into the original, although all variables are its own.

    Args:
        old: The original.
        new: Its copy.
        copier: The copier that has copied everything else.
    """
    shared = set(map(id, vars(new).values()))
    with DotNotTrackScope():  # Keras would track the references in their turn.
        for name, ref in vars(old).get(_DEPENDENCIES, ()):
            # Of a constant table, which export needs to find, there is no copy.
            for kept in [ref] if id(ref) in shared else copier.known([ref]):
                new._track_trackable(kept, name=name, overwrite=True)


def is_shared(value):
    """Returns whether a value is one of TensorFlow's that a copy may share.

    Args:
        value: Anything without a rule of its own: a tensor, a dtype, a constant
            table, a strategy, a dataset.

    Raises:
        TypeError: If it holds variables that it alone knows how to copy.
    """
    root = type(value).__module__.partition(".")[0]
    if root not in ("tensorflow", "tensorflow_text") or isinstance(value, tf.Module):
        return False
    if getattr(value, "variables", None):
        raise TypeError("it holds variables that are part of a graph")
    if isinstance(value, tf.lookup.experimental.DenseHashTable):
        raise TypeError("it does not tell which keys it was made with")
    return True


def _copy_variable(value, copier):
    new = tf.Variable(
        value,
        trainable=value.trainable,
        name=value.name.partition(":")[0],
        dtype=value.dtype,
        constraint=value.constraint,
        synchronization=value.synchronization,
        aggregation=value.aggregation,
        shape=value.shape,
    )
    return copier.add(value, new)


def _copy_generator(value, copier):
    state = tf.identity(value.state)
    return copier.add(value, tf.random.Generator.from_state(state, value.algorithm))


def _copy_table(value, copier):
    new = type(value)(value.key_dtype, value.value_dtype, value._default_value)
    new.insert(*value.export())
    return copier.add(value, new)


def _copy_function(value, copier):
    if any(concrete.variables for concrete in getattr(value, "concrete_functions", ())):
        raise TypeError("it holds variables that are part of a graph")
    return copier.add(value, value._clone(copier(value.python_function)))


def _copy_list(value, copier):
    # TensorFlow tracks items when they are added, so they must be whole by then.
    new = copier.add(value, ListWrapper([]))
    copier.at_the_end(new.extend, copier(list(value)))
    return new


def _copy_dict(value, copier):
    new = copier.add(value, _DictWrapper({}))
    copier.at_the_end(new.update, copier(dict(value)))
    return new


def _copy_tuple(value, copier):
    return copier.add(value, _TupleWrapper(copier(value.__wrapped__)))


_RULES = {
    tf.Variable: _copy_variable,
    tf.name_scope: lambda value, copier: copier.add(value, tf.name_scope(value.name)),
    tf.random.Generator: _copy_generator,
    tf.lookup.experimental.MutableHashTable: _copy_table,
    tf.types.experimental.PolymorphicFunction: _copy_function,
    ListWrapper: _copy_list,
    _DictWrapper: _copy_dict,
    _TupleWrapper: _copy_tuple,
}


def copy_rules():
    return _RULES
