"""The private parts of Keras that every backend shares, each behind a function of our own.

Nothing outside `backend/` reads an underscored attribute of Keras. The test
`tests/backend/test_private_parts.py` lists what is used here, and names what a
new version of Keras lacks.
"""

import contextlib
import contextvars

import keras
from keras import tree
from keras.src.backend import compute_output_spec
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.models import Functional
from keras.src.saving.serialization_lib import SafeModeScope
from keras.src.utils.io_utils import print_msg as print_message
from keras.src.utils.summary_utils import count_params, readable_memory_size, weight_memory_size

__all__ = [
    "BuildHook",
    "CompileHook",
    "add_zeros_like",
    "backup_in_one_process",
    "backup_position",
    "build_on_placeholders",
    "check_before_quantizing",
    "clear_losses",
    "compilation",
    "compile_arguments",
    "describe_size",
    "flatten_layers",
    "forward",
    "frozen_weights",
    "has_call",
    "has_training_step_of_keras",
    "in_stateless_scope",
    "is_functional",
    "lacks_metrics",
    "lent_validation_data",
    "lora_factors",
    "loss_tracker",
    "metric_direction",
    "name_apart",
    "own_weights",
    "penalties",
    "print_message",
    "record_inputs",
    "report_penalties",
    "seed_states",
    "trains_as_keras_does",
    "trusting_files",
    "untrained_weights",
]

_penalizing = contextvars.ContextVar("penalizing", default=False)


def flatten_layers(layer, include_self=True):
    """Returns a layer and all layers inside it, at any depth.

    Args:
        layer: A `keras.Layer`.
        include_self: Bool. Whether to begin with `layer` itself. Defaults to
            True.

    Returns:
        A list of `keras.Layer`.
    """
    return list(layer._flatten_layers(include_self=include_self))


def forward(model, *args, **kwargs):
    """Calls a model as `predict` does, with `training=False` where it takes that.

    Args:
        model: A `keras.Model`.
        *args: Its inputs, and other arguments of its `call`.
        **kwargs: Likewise, by name.
    """
    mode = {"training": False} if model._call_has_training_arg else {}
    return model(*args, **kwargs, **mode)


def build_on_placeholders(model, *args, **kwargs):
    """Creates the weights of a model as `fit` does, which calls it on tensors without values.

    Calling the model itself on symbolic tensors asks more of its layers.

    Args:
        model: A `keras.Model`.
        *args: What it takes, each a `keras.KerasTensor` or a nested structure of
            them.
        **kwargs: Likewise, by name.
    """
    compute_output_spec(lambda *args, **kwargs: forward(model, *args, **kwargs), *args, **kwargs)


def record_inputs(model, inputs):
    """Records the inputs of a model as if Keras had built it; its exporters look there.

    Args:
        model: A `keras.Model`.
        inputs: A `keras.KerasTensor`, or a nested structure of them.
    """
    model._build_shapes_dict = {"input_shape": tree.map_structure(lambda x: x.shape, inputs)}


def check_before_quantizing(model, check):
    """Makes a model call a function before it is quantized.

    Args:
        model: A `keras.Model`.
        check: `() ->` anything. What it raises leaves the model as it is.
    """
    quantize = model.quantize

    def checked(*args, **kwargs):
        check()
        return quantize(*args, **kwargs)

    # Keras gives each instance a `quantize` of its own.
    object.__setattr__(model, "quantize", checked)


def describe_size(weights, stored):
    """Returns the number of parameters and their size in memory, as in the summary of a model.

    Args:
        weights: The variables that count as parameters.
        stored: The variables that take memory.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> describe_size(layer.weights, layer.weights)
    '8 params (32.00 B)'
    """
    memory = readable_memory_size(weight_memory_size(stored))
    return f"{count_params(weights):,} params ({memory})"


def has_call(model):
    """Returns whether a model can be called; one whose steps use only its parts need not."""
    return is_functional(model) or type(model).call is not keras.Model.call


def is_functional(model):
    """Returns whether Keras puts a model together from a graph of layers."""
    return isinstance(model, (keras.Sequential, Functional))


def has_training_step_of_keras(model):
    """Returns whether a model has no training step of its own."""
    return _are_of_keras(model, "train_step")


def trains_as_keras_does(model):
    """Returns whether a model has neither a training step, loss nor metrics of its own."""
    return _are_of_keras(model, "train_step", "compute_loss", "compute_metrics")


def _are_of_keras(model, *names):
    return all(
        getattr(type(model), name) is getattr(keras.Model, name) and name not in vars(model)
        for name in names
    )


def clear_losses(layer):
    """Forgets what `add_loss` collected in a layer during its last call."""
    layer._clear_losses()


def untrained_weights(model):
    """Returns the weights of a model that no optimizer would train, frozen or not.

    Args:
        model: A `keras.Model`.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    >>> model.trainable = False
    >>> [weight.name for weight in untrained_weights(model)]
    ['moving_mean', 'moving_variance']
    """
    # A frozen layer marks all its weights untrainable, so `weight.trainable` does not tell a
    # moving mean from a frozen kernel. Where the layer tracks them does.
    return [v for layer in flatten_layers(model) for v in layer._non_trainable_variables]


def own_weights(layer):
    """Returns the weights of a layer without those of the layers inside it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def lora_factors(layer):
    """Returns the factors that LoRA has added to a layer, a dict by name.

    Example:

    >>> layer = keras.layers.Dense(2, lora_rank=1)
    >>> layer.build((None, 3))
    >>> {name: tuple(factor.shape) for name, factor in lora_factors(layer).items()}
    {'lora_kernel_a': (3, 1), 'lora_kernel_b': (1, 2)}
    """
    if not getattr(layer, "lora_enabled", False):
        return {}
    return {v.name: v for v in layer._trainable_variables if v.name.startswith("lora_")}


def frozen_weights(model):
    """Returns the weights of a model that are frozen and that nothing assigns to.

    These are weights that an optimizer would train if they were not frozen;
    those that belong to a quantized kernel; and floats that no optimizer trains,
    such as moving statistics, of layers that are frozen.

    Args:
        model: A `keras.Model`.

    Example:

    >>> norm = keras.layers.BatchNormalization(trainable=False)
    >>> model = keras.Sequential([keras.Input((3,)), norm, keras.layers.BatchNormalization()])
    >>> [weight.name for weight in frozen_weights(model)]
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """
    found = []
    for layer in flatten_layers(model):
        found += [v for v in layer._trainable_variables if not v.trainable]
        # A stateful layer also assigns to its states in inference, frozen or not.
        keeps = not layer.trainable and not getattr(layer, "stateful", False)
        quantized = layer.quantization_mode is not None
        found += [
            v
            for v in layer._non_trainable_variables
            if quantized or (keeps and keras.backend.is_float_dtype(v.dtype))
        ]
    return list({id(v): v for v in found}.values())


def seed_states(model):
    """Returns the variables of a model's random generators, which Keras leaves out of files.

    Args:
        model: A `keras.Model`.

    Example:

    >>> model = keras.Sequential([keras.layers.Dropout(0.5, seed=3)])
    >>> [tuple(map(int, state.numpy())) for state in seed_states(model)]
    [(3, 0)]
    """
    generators = [g for layer in flatten_layers(model) for g in layer._seed_generators]
    return list({id(generator): generator.state for generator in generators}.values())


def compilation(model):
    """Returns what a model was last compiled with, an object that each `compile` makes anew."""
    return model._compile_config


def compile_arguments(model):
    """Returns arguments of `keras.Model.compile` that give another model the same scores.

    Where `compile` was called again without a loss or metrics, Keras goes on
    with those of the call before, and so do these.

    Args:
        model: A compiled `keras.Model`.

    Returns:
        A dict.
    """
    arguments = dict(model._compile_config.config)
    if model._compile_loss is not None:
        arguments["loss"] = model._compile_loss._user_loss
        arguments["loss_weights"] = model._compile_loss._user_loss_weights
    if model._compile_metrics is not None:
        arguments["metrics"] = model._compile_metrics._user_metrics
        arguments["weighted_metrics"] = model._compile_metrics._user_weighted_metrics
    return arguments


def loss_tracker(model):
    """Returns the metric that holds the mean loss of a compiled model."""
    return model._loss_tracker


def lacks_metrics(model):
    """Returns whether a compiled model creates metrics at its first batch."""
    parts = (model._compile_metrics, model._compile_loss)
    return any(part is not None and not part.built for part in parts)


def add_zeros_like(layer, variable, dtype, name):
    """Adds an untrained weight of zeros to a layer, spread over devices as another variable is.

    Args:
        layer: A `keras.Layer`.
        variable: A variable of the same shape.
        dtype: The dtype of the weight.
        name: The name of the weight.

    Returns:
        A `keras.Variable`.
    """
    arguments = {"shape": variable.shape, "dtype": dtype, "trainable": False, "name": name}
    layout = getattr(variable, "_layout", None)
    if layout is None:
        return layer.add_weight(initializer="zeros", **arguments)
    # Its path is not that of the variable, which a `LayoutMap` may match.
    weight = keras.Variable("zeros", layout=layout, **arguments)
    layer._track_variable(weight)
    return weight


def name_apart(variables, prefix):
    """Puts a prefix before the paths of variables.

    Trees of a model's state, and PyTorch's modules, find variables by their paths,
    and a copy has those of the original.

    Args:
        variables: Iterable of variables.
        prefix: String.
    """
    for variable in variables:
        variable._path = f"{prefix}/{variable.path}"


def metric_direction(metric):
    """Returns whether a larger value of a metric is better, "max", or a smaller, "min"; or None."""
    return {"up": "max", "down": "min"}.get(getattr(metric, "_direction", None))


class BuildHook:
    """Mixin: before the first step Keras calls `_build_on_batch(data)`.

    On TensorFlow it does so only under a strategy. The subclass also implements
    `_scored()`, which returns the models whose metrics are updated. `data` is
    None where all variables exist, so that no batch is read in vain.
    """

    def _symbolic_build(self, iterator=None, data_batch=None):
        if data_batch is None and self._lacks_variables():
            batches = next(batches for _, _, batches in iterator)
            data_batch = batches[0] if isinstance(batches, (list, tuple)) else next(batches)
        self._build_on_batch(data_batch)

    def _lacks_variables(self):
        unbuilt = any(not layer.built for layer in flatten_layers(self))
        return unbuilt or any(each.compiled and lacks_metrics(each) for each in self._scored())


class CompileHook:
    """Mixin: before a step Keras calls `_check_compiled(method_name)`."""

    def _assert_compile_called(self, method_name=None):
        self._check_compiled(method_name)


@contextlib.contextmanager
def lent_validation_data(owner, borrower, arguments):
    """Lets another model use the validation data that `fit` keeps on the model that it trains.

    Args:
        owner: The `keras.Model` that is fitted.
        borrower: The `keras.Model` whose `evaluate` is called by that `fit`.
        arguments: Dict of the keyword arguments of that call, in which Keras
            says whether it uses the data of the epoch before again.
    """
    if not arguments.get("_use_cached_eval_dataset"):
        yield
        return
    borrower._eval_epoch_iterator = owner._eval_epoch_iterator
    try:
        yield
    finally:
        del borrower._eval_epoch_iterator


def backup_position(callback):
    """Returns the epoch and the batch that a `BackupAndRestore` callback has reached."""
    return callback._current_epoch, callback._last_batch_seen


@contextlib.contextmanager
def backup_in_one_process(callback, alone, save=None):
    """While open, a `BackupAndRestore` callback writes in one of several processes.

    Args:
        callback: The callback of this process.
        alone: Calls a function, without arguments, in the process that writes,
            while the others wait.
        save: What takes the place of saving in a process that does not write.
            Defaults to None: it writes.
    """
    end = callback.on_train_end
    own = {"on_train_end": lambda logs=None: alone(lambda: end(logs))}
    if save is not None:
        own["_save_model"] = save
    vars(callback).update(own)
    try:
        yield
    finally:
        for name in own:
            del vars(callback)[name]


def report_penalties(model, penalized):
    """Makes a model report regularization losses of weights that are not trainable.

    It does so inside `penalties()` alone, in the thread that opened it.

    Args:
        model: A `keras.Model`.
        penalized: `() ->` the variables whose regularizers count.
    """
    reported = model._get_regularization_losses

    def with_penalties():
        if not _penalizing.get():
            return reported()
        return [*reported(), *(variable.regularizer(variable) for variable in penalized())]

    # Keras asks the instance, and offers no public way to add a penalty that no call makes.
    object.__setattr__(model, "_get_regularization_losses", with_penalties)


@contextlib.contextmanager
def penalties():
    """While open, models of `report_penalties` count the regularization losses of their weights."""
    token = _penalizing.set(True)
    try:
        yield
    finally:
        _penalizing.reset(token)


def trusting_files():
    """While open, layers load assets from any place, also while Keras loads a model."""
    return SafeModeScope(False)
