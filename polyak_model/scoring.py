"""Scores a model from a file on held-out data, with one set of weights after another."""

import contextlib
import types
import warnings

import keras
import numpy as np
from keras import tree

from polyak_model.backend.keras_internals import flatten_layers, metric_direction
from polyak_model.errors import InputError
from polyak_model.weight_files.refusal import in_one_line, refusal
from polyak_model.weight_files.safe_config import check_config

# Parts of the data from which the standard error of a score is estimated.
_FEWEST_PARTS, _MOST_PARTS = 10, 40


def load_model(path, config):
    """Loads a model without running code from the file.

    Args:
        path: Path of a `.keras` file.
        config: Dict, the content of its config.json.

    Returns:
        A `keras.Model`.

    Raises:
        InputError: If the model needs code other than Keras, or Keras cannot
            load it.
    """
    check_config(config, path, is_function=_is_function)
    try:
        with warnings.catch_warnings():
            # Keras warns if it cannot restore the optimizer, which is not used here.
            warnings.simplefilter("ignore")
            model = keras.models.load_model(path, safe_mode=True)
    except Exception as error:  # A damaged file makes Keras raise exceptions of any class.
        raise refusal(path, f"Keras cannot load it ({in_one_line(error)})") from error
    if not isinstance(model, keras.Model) or not model.variables:
        raise refusal(path, "it contains no model with weights", "Save a model that is built")
    return model


def _is_function(module, name):
    others = ("deserialize", "get", "serialize")
    found = getattr(getattr(keras, module), name, None)
    return isinstance(found, types.FunctionType) and name not in others


class Scorer:
    """Scores weights of a model by one metric.

    Args:
        model: A built `keras.Model`. It is recompiled if it has no such metric.
        data: Tuple `(x, y)` of arrays or lists of arrays.
        metric: `"loss"`, the name of a metric that the model is compiled with,
            or the name of one in Keras.
        batch_size: Int.

    Raises:
        InputError: If the metric cannot be computed for this model and data.
    """

    def __init__(self, model, data, metric, batch_size):
        self.model = model
        self.metric = metric
        self._data = data
        self._batch_size = batch_size
        self._make_config = model.get_compile_config() if model.compiled else None
        # Its state belongs to the weights in the file, not to those that are scored.
        model.optimizer = None
        known = {}
        if model.compiled:
            with _data_errors():
                known = self._score_one_example()
        if metric not in known:
            self._compile_with(metric, known)

    def _compile_with(self, metric, known):
        if metric == "loss":
            raise _metric_error(metric, known, "but the model was saved without being compiled")
        try:
            loss = self.model.loss if known else _no_loss
            self.model.compile(optimizer=None, loss=loss, metrics=[metric])
            found = self._score_one_example()
        except Exception as error:  # The metric may not exist, or not fit the targets.
            problem = f"but Keras says: {in_one_line(error)}"
            raise _metric_error(metric, known, problem) from error
        if metric not in found:
            raise _metric_error(metric, known, f"which Keras reports as {sorted(found)}")

    def _score_one_example(self):
        return self._evaluate(*tree.map_structure(lambda array: array[:1], self._data))

    def _evaluate(self, x, y, **arguments):
        arguments = {"batch_size": self._batch_size, **arguments}
        return self.model.evaluate(x, y, verbose=0, return_dict=True, **arguments)

    def direction(self):
        """Returns `"max"` if a larger score is better, `"min"` if a smaller one is, or None."""
        if self.metric == "loss":
            return "min"
        metrics = [part for each in self.model.metrics for part in getattr(each, "metrics", [each])]
        return {each.name: metric_direction(each) for each in metrics}.get(self.metric)

    def load(self, path):
        """Loads weights from a file into the model.

        Args:
            path: A `.weights.h5` or `.keras` file.

        Raises:
            InputError: If Keras cannot load the weights.
        """
        try:
            self.model.load_weights(path)
        except Exception as error:  # A damaged file makes Keras raise exceptions of any class.
            raise refusal(path, f"Keras cannot load it ({in_one_line(error)})") from error

    def read(self, path):
        """Reads weights from a file, which are then those of the model, until others are.

        Args:
            path: A `.weights.h5` or `.keras` file.

        Yields:
            One array per variable, floats in float64.

        Raises:
            InputError: If Keras cannot load the weights.
        """
        self.load(path)
        for variable in self.model.weights:
            array = variable.numpy()
            yield array.astype("float64") if keras.backend.is_float_dtype(variable.dtype) else array

    def assign(self, weights):
        """Assigns weights to the model.

        Args:
            weights: List of arrays, as from `read`.
        """
        for variable, array in zip(self.model.weights, weights, strict=True):
            variable.assign(array)
        for layer in flatten_layers(self.model):
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()  # It computes with constants derived from its weights.

    def score(self, weights):
        """Scores weights on all of the data, and leaves them assigned to the model.

        Args:
            weights: List of arrays, as from `read`.

        Returns:
            A float.

        Raises:
            InputError: If Keras cannot evaluate the model on the data.
        """
        self.assign(weights)
        return self._score()

    def _score(self):
        with _data_errors():
            return float(self._evaluate(*self._data)[self.metric])

    def score_with_error(self):
        """Scores the model with its current weights, and estimates the standard error of the score.

        The error follows from the scores of parts of the data, so it needs a loss
        or a metric that is a mean over examples.

        Returns:
            Tuple of the score, a float, and its standard error, a float or None.

        Raises:
            InputError: If Keras cannot evaluate the model on the data.
        """
        metrics = [part for m in self.model.metrics for part in getattr(m, "metrics", [m])]
        means = {each.name for each in metrics if isinstance(each, keras.metrics.Mean)}
        count = len(tree.flatten(self._data)[0])
        size = min(-(-count // _FEWEST_PARTS), self._batch_size)
        if self.metric not in means or count <= size:
            return self._score(), None
        running = _RunningMean(self.metric, size, count)
        with _data_errors():
            score = self._evaluate(*self._data, batch_size=size, callbacks=[running])[self.metric]
        sizes, scores = running.parts()
        variance = np.average((scores - score) ** 2, weights=sizes) / (len(sizes) - 1)
        return float(score), float(np.sqrt(variance))

    def save(self, path):
        """Saves the model with its current weights, compiled as it was loaded.

        The optimizer is saved without its state.

        Args:
            path: A `.keras` or `.weights.h5` file.
        """
        self.model.compiled = False
        if self._make_config is not None:
            self.model.compile_from_config(self._make_config)
        if str(path).endswith(".keras"):
            self.model.save(path)
        else:
            self.model.save_weights(path)


class _RunningMean(keras.callbacks.Callback):
    """Records the mean over the examples so far, about `_MOST_PARTS` times in one evaluation."""

    def __init__(self, metric, batch_size, count):
        super().__init__()
        self._metric, self._batch_size, self._count = metric, batch_size, count
        self._part = batch_size * -(-count // (batch_size * _MOST_PARTS))
        self._examples, self._means = [0], [0.0]

    def on_test_batch_end(self, batch, logs=None):
        examples = min((batch + 1) * self._batch_size, self._count)
        if examples - self._examples[-1] >= self._part or examples == self._count:
            self._examples.append(examples)
            self._means.append(float(logs[self._metric]))

    def parts(self):
        """Returns the numbers of examples of all parts and the means over each, two arrays."""
        sizes = np.diff(self._examples)
        return sizes, np.diff(np.multiply(self._examples, self._means)) / sizes


def _metric_error(metric, known, problem):
    choices = f"one of {sorted(known)}, or " if known else ""
    return InputError(
        f"`--metric` must be {choices}one that Keras can compute by its name. Received: "
        f"{metric!r}, {problem}. Choose another, e.g. --metric accuracy."
    )


@contextlib.contextmanager
def _data_errors():
    """Turns a failure to evaluate the model into an `InputError` about the data."""
    try:
        yield
    except Exception as error:  # Each backend raises its own classes for wrong shapes and dtypes.
        raise InputError(
            f"Cannot score the model on the arrays of `--data`: {in_one_line(error)}. Pass arrays "
            "of the shapes and dtypes of the model's inputs and targets."
        ) from error


def _no_loss(targets, outputs):
    # Keras needs a loss to evaluate a model, even if only a metric is wanted.
    return keras.ops.zeros_like(keras.ops.mean(outputs, axis=-1))
