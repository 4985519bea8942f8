"""Statistics of BatchNormalization that fit the weights, measured by a pass over data."""

import contextlib
import warnings
from typing import Any

import keras
from keras import ops, tree

from polyak_model import backend
from polyak_model.backend import keras_internals


def refresh_statistics(
    model: keras.Model,
    data: Any,
    steps: int | None = None,
    *,
    batch_size: int | None = None,
    verbose: int | str = "auto",
) -> None:
    """Recomputes the moving mean and variance of each BatchNormalization layer of a model.

    The inputs of these layers under averaged weights differ from those under any
    iterate, so averaged statistics do not fit them. Over all n inputs of a layer,
    along all axes but that of the channels and without masked ones,

        mean = sum(x) / n,    variance = sum((x - mean)**2) / n

    exactly, pooled in float64 over batches of any sizes. During the pass each
    of these layers normalizes with the statistics of the current batch, as in
    training. So a layer behind another one is measured on the outputs that the
    other has in training; with a single batch of all data, on those that it has
    afterwards. Everything else runs as in `predict`: dropout is off.

    Layers with `trainable=False` keep their statistics, as they do in training.
    No other weight changes. If the pass fails or is interrupted, none does.

    Args:
        model: A built `keras.Model`.
        data: Inputs of the model: arrays, a `tf.data.Dataset`, a generator or a
            `keras.utils.PyDataset`. Targets and sample weights are ignored. Use
            training data, without augmentation.
        steps: Int, the number of batches to use. Defaults to None: all.
        batch_size: Int, examples per batch of arrays. Defaults to None: 32.
        verbose: `"auto"`, 0 for silence, 1 for a progress bar or 2 for a line.

    Raises:
        ValueError: If there is no data, or the statistics contain inf or NaN.

    Example:

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> refresh_statistics(model, np.array([[1.0], [2.0], [6.0]]), batch_size=2, verbose=0)
    >>> model.layers[0].moving_mean.numpy(), model.layers[0].moving_variance.numpy()
    (array([3.], dtype=float32), array([4.6666665], dtype=float32))

    Reference:
        Izmailov et al. 2018, Averaging weights leads to wider optima, section
        3.2. `torch.optim.swa_utils.update_bn` also normalizes by batch during its
        pass, but it weights batches equally whatever their sizes, ignores the
        variance between their means, and runs with dropout.
    """
    layers = find_layers(model)
    if layers:
        backend.assign(measure(model, layers, data, steps, batch_size=batch_size, verbose=verbose))
    elif verbose:
        print(nothing_to_refresh(model))


def find_layers(model, trained=None):
    """Returns the BatchNormalization layers of a model that are not frozen, nested ones too.

    Args:
        model: A `keras.Model`.
        trained: A model of the same architecture; its frozen layers are left
            out. Defaults to None: `model`.
    """
    pairs = zip(_all_layers(model), _all_layers(trained or model), strict=True)
    return [layer for layer, other in pairs if other.trainable]


def _all_layers(model):
    kind = keras.layers.BatchNormalization
    layers = keras_internals.flatten_layers(model)
    return list(dict.fromkeys(layer for layer in layers if isinstance(layer, kind)))


def nothing_to_refresh(model):
    """Returns a sentence on why a model has no statistics to refresh.

    Args:
        model: A `keras.Model`.
    """
    if _all_layers(model):
        return f"The BatchNormalization layers of '{model.name}' are frozen and stay as they are."
    return f"The model '{model.name}' has no BatchNormalization layer: nothing to refresh."


def measure(model, layers, data, steps=None, *, batch_size=None, verbose="auto"):
    """Measures what `refresh_statistics` assigns, without changing the model.

    Args:
        model: A built `keras.Model`.
        layers: Some of its BatchNormalization layers.
        data: As in `refresh_statistics`, like all that follows.
        steps: Int or None.
        batch_size: Int or None.
        verbose: `"auto"`, 0, 1 or 2.

    Returns:
        List of `(variable, value)` for the layers that received data.

    Raises:
        ValueError: As in `refresh_statistics`.
    """
    # Keras makes up a batch for an empty array.
    if any(0 in getattr(leaf, "shape", ())[:1] for leaf in tree.flatten(data)):
        raise _nothing_read(data)
    with backend.double_precision():
        pools = [Pool(layer.moving_mean.shape) for layer in layers]
    with _state_kept(model), contextlib.ExitStack() as stack:
        for layer, pool in zip(layers, pools, strict=True):
            stack.enter_context(_normalizing_by_batch(layer, pool))
        reader = _Reader(model, pools)
        reader.compile(run_eagerly=model.run_eagerly, jit_compile=False)
        with warnings.catch_warnings():
            if steps is None:
                # All data was to be read.
                warnings.filterwarnings("ignore", message="Your input ran out of data")
            stack.enter_context(backend.exclusive_call(model, reader))
            reader.evaluate(data, batch_size=batch_size, steps=steps, verbose=verbose)
    values = []
    with backend.double_precision():
        for layer, pool in zip(layers, pools, strict=True):
            if pool.seen():
                pool.check_finite(layer.name)
                values.append((layer.moving_mean, pool.mean))
                values.append((layer.moving_variance, pool.variance()))
    if not values:
        raise _nothing_read(data)
    return values


def _nothing_read(data):
    return ValueError(
        "`data` must contain at least one example that reaches a BatchNormalization layer. "
        f"Received: data={data!r}, which contains none. A generator that was used before is empty: "
        "make a new one."
    )


class Pool:
    """The mean and variance of many batches, as if they were one, in float64.

    Args:
        shape: Shape of the mean.

    Example:

    >>> pool = Pool((1,))
    >>> pool.add(*moments(ops.convert_to_tensor([[1.0], [2.0]]), axis=-1))
    >>> pool.add(*moments(ops.convert_to_tensor([[6.0]]), axis=-1))
    >>> float(pool.mean[0]), round(float(pool.variance()[0]), 6)
    (3.0, 4.666667)

    Reference:
        Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance,
        equation 2.1.
    """

    def __init__(self, shape):
        # With autocast, a layer in half precision would read them in half precision.
        settings = {"dtype": "float64", "trainable": False, "autocast": False}
        self.variables = [keras.Variable("zeros", shape, **settings) for _ in range(3)]
        self.count, self.mean, self._squares = self.variables

    def add(self, count, mean, variance):
        """Adds a batch.

        Args:
            count: Float64 tensor, the number of values behind each entry.
            mean: Their mean, a tensor of the same shape.
            variance: Their variance, likewise.
        """
        before = ops.convert_to_tensor(self.count)
        total = before + count
        share = _divided(count, total)
        away = mean - self.mean
        self._squares.assign_add(count * variance + before * share * away**2)
        self.mean.assign_add(share * away)
        self.count.assign(total)

    def variance(self):
        """Returns the variance of everything added."""
        return _divided(ops.convert_to_tensor(self._squares), self.count)

    def seen(self):
        """Returns whether anything was added."""
        return bool(ops.any(self.count > 0))

    def check_finite(self, name):
        """Raises `ValueError` if the statistics contain inf or NaN.

        Args:
            name: Name of the layer, for the message.
        """
        if not bool(ops.all(ops.isfinite(self.mean)) & ops.all(ops.isfinite(self._squares))):
            raise ValueError(
                f"The statistics of the layer '{name}' must be finite. Received: data or weights "
                "for which they contain inf or NaN. The old statistics stay; remove such examples."
            )


def moments(inputs, axis, mask=None):
    """Computes the mean and variance of each channel in float64.

    Args:
        inputs: Tensor.
        axis: Int, the axis of the channels.
        mask: Boolean tensor of one axis less than `inputs`, False for inputs to
            leave out. Defaults to None.

    Returns:
        Tuple of the count, the mean and the variance, tensors of shape
        (channels,). Without inputs they are 0.
    """
    x = ops.cast(inputs, "float64")
    others = [i for i in range(len(x.shape)) if i != axis % len(x.shape)]
    # Selected, since 0 * NaN is NaN.
    counted = ops.ones_like(x, "bool")
    if mask is not None:
        counted = counted & ops.cast(ops.expand_dims(mask, -1), "bool")
    count = ops.sum(ops.cast(counted, "float64"), others, keepdims=True)
    mean = _divided(ops.sum(ops.where(counted, x, 0.0), others, keepdims=True), count)
    squares = ops.sum(ops.where(counted, x - mean, 0.0) ** 2, others, keepdims=True)
    variance = _divided(squares, count)
    return tuple(ops.reshape(value, [-1]) for value in (count, mean, variance))


def _divided(total, count):
    # On PyTorch, `ops.divide_no_nan` rounds to float32.
    count = ops.convert_to_tensor(count)
    return total / ops.where(count > 0, count, 1.0)


@contextlib.contextmanager
def _normalizing_by_batch(layer, pool):
    """While open, a layer normalizes with the statistics of each batch, and pools them."""
    call = layer.call

    def measured(inputs, training=None, mask=None):
        with backend.double_precision():
            count, mean, variance = moments(inputs, layer.axis, mask)
            pool.add(count, mean, variance)
        backend.assign([(layer.moving_mean, mean), (layer.moving_variance, variance)])
        return call(inputs, training=False, **({} if mask is None else {"mask": mask}))

    # Keras has no hook for the inputs of a layer inside a model.
    layer.call = measured
    try:
        yield
    finally:
        del layer.call


@contextlib.contextmanager
def _state_kept(model):
    """Restores, at the end, what a forward pass may change: statistics, states, seeds."""
    variables = [
        *keras_internals.untrained_weights(model),
        *keras_internals.seed_states(model),
    ]
    values = [ops.copy(variable) for variable in variables]
    try:
        yield
    finally:
        backend.assign(zip(variables, values, strict=True))


class _Reader(backend.EvaluationStep, keras.Model):
    """Calls a model on data of any kind, read as Keras does, with its progress bar."""

    def __init__(self, model, pools):
        super().__init__()
        # What a step changes must be tracked.
        self._read, self._pools = model, [pool.variables for pool in pools]
        self._examples = self.add_weight(dtype="int", initializer="zeros", trainable=False)
        self.built = True

    def _test_batch(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        keras_internals.forward(self._read, x)
        self._examples.assign_add(ops.cast(ops.shape(tree.flatten(x)[0])[0], "int"))
        return {"examples": ops.convert_to_tensor(self._examples)}
