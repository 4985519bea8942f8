"""A model from a file, scored on held-out data with one set of weights after another."""

import contextlib
import types
import warnings

import keras
from keras import tree

from polyak_model.errors import InputError
from polyak_model.weight_files.refusal import in_one_line, refusal
from polyak_model.weight_files.safe_config import check_config


def load_model(path, config):
    """Loads a model without running code of others.

    Args:
        path: Path of a `.keras` file.
        config: What its config.json says.

    Returns:
        A `keras.Model`.

    Raises:
        InputError: If the model needs more than Keras, or Keras cannot load it.
    """
    check_config(config, path, is_function=_is_function)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of the optimizer's state, which is not used.
            model = keras.models.load_model(path, safe_mode=True)
    except Exception as error:
        raise refusal(path, f"Keras cannot load it ({in_one_line(error)})") from error
    if not isinstance(model, keras.Model) or not model.variables:
        raise refusal(path, "it holds no model with weights", "Save a model that is built")
    return model


def _is_function(module, name):
    others = ("deserialize", "get", "serialize")
    found = getattr(getattr(keras, module), name, None)
    return isinstance(found, types.FunctionType) and name not in others


class Scorer:
    """Scores weights of a model by one of its metrics.

    Args:
        model: A built `keras.Model`.
        data: Tuple `(x, y)` of arrays or lists of arrays.
        metric: `"loss"`, a metric that the model is compiled with, or one that
            Keras knows by this name.
        batch_size: Int.

    Raises:
        InputError: If the model cannot be scored so.
    """

    def __init__(self, model, data, metric, batch_size):
        self.model = model
        self.metric = metric
        self._data = data
        self._batch_size = batch_size
        self._compilation = model.get_compile_config() if model.compiled else None
        # Its state belongs to other weights than those that are scored.
        model.optimizer = None
        known = {}
        if model.compiled:
            with _blaming_data():
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
        except Exception as error:
            problem = f"but Keras says: {in_one_line(error)}"
            raise _metric_error(metric, known, problem) from error
        if metric not in found:
            raise _metric_error(metric, known, f"which Keras reports as {sorted(found)}")

    def _score_one_example(self):
        return self._evaluate(*tree.map_structure(lambda array: array[:1], self._data))

    def _evaluate(self, x, y):
        return self.model.evaluate(x, y, batch_size=self._batch_size, verbose=0, return_dict=True)

    def direction(self):
        """Returns whether a larger score is better, `"max"`, or a smaller, `"min"`; else None."""
        if self.metric == "loss":
            return "min"
        metrics = [part for each in self.model.metrics for part in getattr(each, "metrics", [each])]
        # Keras writes it there for its own callbacks.
        known = {each.name: getattr(each, "_direction", None) for each in metrics}
        return {"up": "max", "down": "min"}.get(known.get(self.metric))

    def read(self, path):
        """Reads weights of the model; it holds them until others are read or assigned.

        Args:
            path: A `.weights.h5` or `.keras` file.

        Yields:
            An array for each variable, floats in float64.

        Raises:
            InputError: If Keras cannot load the weights.
        """
        try:
            self.model.load_weights(path)
        except Exception as error:
            raise refusal(path, f"Keras cannot load it ({in_one_line(error)})") from error
        for variable in self.model.weights:
            array = variable.numpy()
            yield array.astype("float64") if keras.backend.is_float_dtype(variable.dtype) else array

    def assign(self, weights):
        """Gives the model weights.

        Args:
            weights: List of arrays, as from `read`.
        """
        for variable, array in zip(self.model.weights, weights, strict=True):
            variable.assign(array)
        for layer in self.model._flatten_layers():
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()  # It answers by numbers that it derives from its weights.

    def score(self, weights):
        """Scores weights on all of the data; the model holds them then.

        Args:
            weights: List of arrays, as from `read`.

        Returns:
            A float.

        Raises:
            InputError: If Keras cannot.
        """
        self.assign(weights)
        with _blaming_data():
            return float(self._evaluate(*self._data)[self.metric])

    def save(self, path):
        """Saves the model with the weights that it holds, compiled as it was loaded.

        The optimizer begins anew.

        Args:
            path: A `.keras` or `.weights.h5` file.
        """
        self.model.compiled = False
        if self._compilation is not None:
            self.model.compile_from_config(self._compilation)
        if str(path).endswith(".keras"):
            self.model.save(path)
        else:
            self.model.save_weights(path)


def _metric_error(metric, known, problem):
    choices = f"one of {sorted(known)}, or " if known else ""
    return InputError(
        f"`--metric` must be {choices}one that Keras can compute by its name. Received: "
        f"{metric!r}, {problem}. Choose another, e.g. --metric accuracy."
    )


@contextlib.contextmanager
def _blaming_data():
    try:
        yield
    except Exception as error:
        raise InputError(
            f"Cannot score the model on the arrays of `--data`: {in_one_line(error)}. Give it what "
            "the model takes and what it shall answer."
        ) from error


def _no_loss(targets, outputs):
    # Keras evaluates no model without a loss, even if only a metric is asked for.
    return keras.ops.zeros_like(keras.ops.mean(outputs, axis=-1))
