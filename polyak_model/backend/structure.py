"""How Keras objects are copied by structure: the rules that every backend shares.

A rule is a function `(value, copier) -> copy`, where `copier` is that of
`polyak_model.average.cloning`. It creates an empty copy at once, so that
references in a circle find it, and leaves the attributes for later.
"""

import keras
from keras.src.ops.function import Function, make_node_key
from keras.src.ops.node import Node
from keras.src.ops.operation import Operation
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.trainers.trainer import Trainer
from keras.src.utils.tracking import Tracker

# What a copy does without: a value that the attribute, list or dict that held it leaves out.
LEFT_OUT = object()

# Objects without state of their own.
SHARED = (
    keras.DTypePolicy,
    keras.Initializer,
    keras.constraints.Constraint,
    keras.distribution.DeviceMesh,
    keras.distribution.TensorLayout,
    keras.regularizers.Regularizer,
)

# `Layer.__new__` gives each instance a `build` and a `quantize` of its own, and
# `keras_internals.report_penalties` gives an average model penalties of its own.
_OF_LAYERS = {
    "build": LEFT_OUT,
    "quantize": LEFT_OUT,
    "_get_regularization_losses": LEFT_OUT,
    "_losses": list,
    "_loss_ids": set,
    "_losses_override": list,
}
_COMPILATION = {
    "_compile_config": LEFT_OUT,
    "_compile_loss": None,
    "_compile_metrics": None,
    "_jit_compile": None,
    "_loss_tracker": None,
    "_run_eagerly": False,
    "compiled": False,
    "loss": None,
    "optimizer": LEFT_OUT,
    "predict_function": None,
    "steps_per_execution": 1,
    "test_function": None,
    "train_function": None,
}

# What `compile` and `fit` leave behind in some versions of Keras and on some backends.
_OF_TRAINING = (
    "_compiled_trainable_state",
    "_distributed_dataset",
    "_eval_epoch_iterator",
    "_jax_state",
    "history",
)

# Nodes of other graphs that use an operation must not be followed.
_NODES = {"_inbound_nodes": list, "_outbound_nodes": list}

PRIVATE = (
    (Operation, ("_inbound_nodes", "_outbound_nodes")),
    (keras.Layer, tuple(_OF_LAYERS)),
    (keras.Model, tuple(_COMPILATION)),
    (Function, ("_nodes", "_nodes_by_depth")),
    (Node, ("operation", "outputs")),
    (Tracker, ("config", "stored_ids")),
    (keras.KerasTensor, ("_keras_history",)),
    (keras.Variable, ("_value", "_initialize")),
)


def copy_saveable(value, copier):
    """Copies a metric, a loss or another object that Keras would pickle through a file."""
    return copier.add(value, object.__new__(type(value)), copier.fill)


def copy_operation(value, copier):
    """Copies an operation that is no layer."""
    return copier.add(value, object.__new__(type(value)), _fill_operation, copier)


def copy_layer(value, copier):
    """Copies a layer or a model, uncompiled."""
    return copier.add(value, keras.Layer.__new__(type(value)), _fill_operation, copier)


def fill_model(model, clone, copier):
    """Gives an existing clone the structure of its model; the clone stays compiled as it is."""
    kept = {name: vars(clone)[name] for name in _COMPILATION if name in vars(clone)}
    _fill_operation(model, clone, copier)
    vars(clone).update(kept)


def _fill_operation(old, new, copier):
    fixed = dict(_NODES)
    if isinstance(old, keras.Layer):
        fixed.update(_OF_LAYERS)
    if isinstance(old, Trainer):
        fixed.update(_COMPILATION, **dict.fromkeys(_OF_TRAINING, LEFT_OUT))
    copier.fill(old, new, {k: v() if isinstance(v, type) else v for k, v in fixed.items()})
    copier.at_the_end(_link_nodes, old, new, copier)


def _link_nodes(old, new, copier):
    # Nodes of other graphs were not copied, so the indices of the others may change.
    new._inbound_nodes.extend(copier.known(old._inbound_nodes))
    new._outbound_nodes.extend(copier.known(old._outbound_nodes))
    for index, node in enumerate(new._inbound_nodes):
        for tensor in node.outputs:
            if hasattr(tensor, "_keras_history"):
                tensor._keras_history = tensor._keras_history._replace(node_index=index)
    if isinstance(old, Function):
        copier.at_the_end(_name_nodes, new)


def _name_nodes(function):
    # The names contain the `id` of an operation.
    nodes = (node for level in function._nodes_by_depth.values() for node in level)
    vars(function)["_nodes"] = {
        make_node_key(node.operation, node.operation._inbound_nodes.index(node)) for node in nodes
    }


def copy_symbolic(value, copier):
    """Copies a symbolic tensor and the node that it comes from."""
    copy = copier.add(value, object.__new__(type(value)), copier.fill)
    history = getattr(value, "_keras_history", None)
    if history is not None and history.operation is not None:
        copier.later(copier, history.operation._inbound_nodes[history.node_index])
    return copy


def copy_tracker(value, copier):
    """Copies what a layer tracks."""

    def fill(old, new):
        copier.fill(old, new, {"stored_ids": {}})
        copier.at_the_end(identify, new)

    def identify(new):
        new.stored_ids = {kind: set(map(id, store)) for kind, (_, store) in new.config.items()}

    return copier.add(value, object.__new__(type(value)), fill)


def copy_variable(value, copier):
    """Copies a variable, with equal value, path, dtype, regularizer and constraint."""
    new = copier.add(value, object.__new__(type(value)))
    copier.fill(value, new, {"_value": None})
    if value._value is not None:
        new._initialize(keras.ops.copy(value._value))
    return new


def kept(variables):
    """Returns pairs `(original, copy)` that make a copier keep variables as they are."""
    # Backends track what is behind a variable, too.
    return [(x, x) for variable in variables for x in (variable, variable._value)]


def parts(layer):
    """Returns the variables, metrics and random generators that a layer itself tracks."""
    return [part for _, store in layer._tracker.config.values() for part in store]


RULES = {
    **dict.fromkeys(SHARED, lambda value, copier: value),
    KerasSaveable: copy_saveable,
    Operation: copy_operation,
    keras.Layer: copy_layer,
    keras.KerasTensor: copy_symbolic,
    keras.Variable: copy_variable,
    Tracker: copy_tracker,
    # Its state belongs to the weights of the original.
    keras.optimizers.Optimizer: lambda value, copier: copier.optimizer(),
}
