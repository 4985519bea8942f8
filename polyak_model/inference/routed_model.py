"""A model that evaluates and predicts through an average, the raw model or both."""

import contextlib
import contextvars
import os
from typing import Any

import keras
from keras import tree

from polyak_model import backend
from polyak_model.backend import keras_internals
from polyak_model.inference import export
from polyak_model.inference.own_methods import given, may_call, redirected
from polyak_model.rules.initial_phase import warn_of_initial_phase
from polyak_model.saving.saveable_model import SaveableModel

# The wrapper and the model of the `evaluate` or `predict` that runs in this context, for the
# callbacks of that call alone.
_running: contextvars.ContextVar[tuple] = contextvars.ContextVar("running", default=(None, None))


# Of a trial run, the length says nothing.
_FEWEST_STEPS = 100


class RoutedModel(SaveableModel):
    """Hands each call of `evaluate`, `predict` and `export` to the model of a route.

    A call keeps nothing on this model: calls through different routes may run
    at the same time.

    Args:
        routes: The `Router` that has a model for each route.
        inference: The default route.
        report: Routes that `evaluate` reports in one pass, or None for
            `inference` alone.
        **kwargs: Arguments of `keras.Model`.
    """

    def __init__(self, routes, inference, report, **kwargs):
        super().__init__(**kwargs)
        self._router = routes
        self._inference = inference
        self.report = None if report is None else tuple(report)
        self._length_is_judged = False

    @property
    def inference(self) -> str:
        """The default route of `evaluate`, `predict` and calls with `training=False`."""
        return self._inference

    @inference.setter
    def inference(self, route: str) -> None:
        self._inference = self._router.check_route("inference", route)

    @property
    def reported(self) -> tuple[str, ...]:
        """The routes that `evaluate` reports, a tuple; the first has plain names in the logs."""
        return self._router.check_report(self.report, self.inference)

    def _reported(self, using):
        if using is None:
            return self.reported
        return (self._router.check_route("using", using),)

    def _predicting(self, using):
        return self.inference if using is None else self._router.check_route("using", using)

    def _method(self, model, name):
        # The raw and the average model have the methods of the user's class; joint models do not.
        if type(model) is type(self._router.raw):
            return getattr(model, name)
        return redirected(self._router.raw, name, getattr(model, name))

    def _evaluator(self, method, using):
        self._check_compiled(method)
        routes = self._reported(using)
        self._router.check_scores(routes)
        return self._router.evaluator(routes)

    @contextlib.contextmanager
    def _run(self, model):
        """While open, callbacks find the state of an evaluation or prediction here."""
        with backend.exclusive_call(self, model):
            backend.sync(self)
            if model is not self._router.raw:
                self._router.shadow.catch_up()
            token = _running.set((self, model))
            try:
                yield
            finally:
                _running.reset(token)
                self._start_if_built()

    @contextlib.contextmanager
    def _train(self):
        # A callback of an evaluation may train, with the metrics of training.
        token = _running.set((None, None))
        try:
            with (
                backend.exclusive_call(self, self),
                self._router.shadow.training_threads.joined(),
            ):
                yield
        finally:
            _running.reset(token)

    @property
    def _running_model(self):
        wrapper, model = _running.get()
        if wrapper is not self:
            return None
        backend.sync(model)
        return model

    @property
    def stop_evaluating(self):
        """Whether the evaluation that runs in this context shall stop; callbacks set it."""
        return getattr(self._running_model, "stop_evaluating", False)

    @stop_evaluating.setter
    def stop_evaluating(self, value):
        if self._running_model is not None:
            self._running_model.stop_evaluating = value

    @property
    def stop_predicting(self):
        """Whether the prediction that runs in this context shall stop; callbacks set it."""
        return getattr(self._running_model, "stop_predicting", False)

    @stop_predicting.setter
    def stop_predicting(self, value):
        if self._running_model is not None:
            self._running_model.stop_predicting = value

    @property
    def metrics(self):
        """The metrics of the raw model; in callbacks of an evaluation, those of its route."""
        return (self._running_model or self._router.raw).metrics

    def get_metrics_result(self):
        return (self._running_model or self._router.raw).get_metrics_result()

    def reset_metrics(self):
        (self._running_model or self._router.raw).reset_metrics()

    def _test_batch(self, data):
        return self._router.step("test_step", self._reported(None), data)

    def _predict_batch(self, data):
        return self._router.step("predict_step", self.inference, data)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        *args,
        **kwargs,
    ) -> Any:
        """Trains as `keras.Model.fit` does, with the same arguments.

        Once, after a training of at least 100 steps, it warns of averages that
        still remember its initial phase.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: If a callback swaps weights, a route cannot be evaluated, or
                the model is not compiled.

        Example:

        >>> import numpy as np
        >>> from polyak_model import PolyakModel
        >>> model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), epochs=2, verbose=0)
        >>> len(history.history["loss"])
        2
        """
        _check_callbacks(callbacks)
        if validation_split or validation_data is not None:
            self._check_compiled("fit")
            self._router.check_scores(self._reported(None))
        shadow = self._router.shadow
        shadow.run = backend.in_one_process(self, lambda: shadow.run)
        with self._train(), self._backups.watched(self, callbacks):
            callbacks = backend.interruptible(self, callbacks)
            shown = (verbose, callbacks, validation_split, validation_data)
            arguments = given("fit", x, y, batch_size, epochs, *shown, *args, **kwargs)
            history = self._fit(super().fit, arguments)
        if shadow.steps() >= _FEWEST_STEPS and not self._length_is_judged:
            self._length_is_judged = True
            rules = {name: average.rule for name, average in shadow.averages.items()}
            warn_of_initial_phase(rules, shadow.steps(), stacklevel=3)
        return history

    def _fit(self, fit, arguments):
        called = []

        def fit_and_average(*args, **kwargs):
            called.append(True)
            return fit(*args, **kwargs)

        raw = self._router.raw
        if not may_call(raw, "fit"):
            raise _not_averaged(raw, "never calls it")
        history = redirected(raw, "fit", fit_and_average)(**arguments)
        if not called:
            raise _not_averaged(raw, "returned without calling it; its steps are not averaged")
        return history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        using: str | None = None,
        **kwargs,
    ) -> Any:
        """Evaluates through a route, or through all those of `report` in one pass.

        Args:
            x: As in `keras.Model.evaluate`, like all arguments but `using`.
            using: `"average"` or the name of an average, `"raw"` or
                `"ensemble"`: the route for this call alone, whose metrics then
                have plain names. Defaults to None: `inference`, and the routes
                of `report` with it.

        Returns:
            A list of the loss and metrics, or a dict with `return_dict=True`.

        Raises:
            ValueError: If `using` is no route, or the model is not compiled.

        Example:

        >>> import numpy as np
        >>> from polyak_model import PolyakModel
        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model = PolyakModel(inner, report=("average", "raw"))
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.ones((8, 3)), np.ones((8, 1))
        >>> sorted(model.evaluate(x, y, verbose=0, return_dict=True))
        ['loss', 'raw_loss']
        >>> sorted(model.evaluate(x, y, verbose=0, return_dict=True, using="raw"))
        ['loss']
        """
        _check_callbacks(callbacks)
        model = self._evaluator("evaluate", using)
        with self._run(model), keras_internals.lent_validation_data(self, model, kwargs):
            values = (x, y, batch_size, verbose, sample_weight, steps, _shown(self, callbacks))
            arguments = given("evaluate", *values, return_dict, **kwargs)
            return self._method(model, "evaluate")(**arguments)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
        using: str | None = None,
    ) -> Any:
        """Predicts through a route.

        Args:
            x: As in `keras.Model.predict`, like all arguments but `using`.
            using: The route for this call alone. Defaults to None: `inference`.

        Returns:
            An array, or a nested structure of arrays.

        Raises:
            ValueError: If `using` is no route.

        Example:

        >>> import numpy as np
        >>> from polyak_model import PolyakModel
        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> PolyakModel(inner).predict(np.ones((8, 3)), using="ensemble", verbose=0).shape
        (8, 2)
        """
        _check_callbacks(callbacks)
        model = self._router.predictor(self._predicting(using))
        with self._run(model):
            arguments = given("predict", x, batch_size, verbose, steps, _shown(self, callbacks))
            return self._method(model, "predict")(**arguments)

    def train_on_batch(self, *args, **kwargs):
        """Trains on one batch, as `keras.Model.train_on_batch` does."""
        with self._train():
            train = redirected(self._router.raw, "train_on_batch", super().train_on_batch)
            return train(*args, **kwargs)

    def test_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        return_dict: bool = False,
        using: str | None = None,
    ) -> Any:
        """Evaluates one batch; see `evaluate` for `using`."""
        model = self._evaluator("test_on_batch", using)
        with self._run(model):
            return self._method(model, "test_on_batch")(
                x, y=y, sample_weight=sample_weight, return_dict=return_dict
            )

    def predict_on_batch(self, x: Any, using: str | None = None) -> Any:
        """Predicts one batch; see `predict` for `using`."""
        model = self._router.predictor(self._predicting(using))
        with self._run(model):
            return self._method(model, "predict_on_batch")(x)

    def export(
        self,
        filepath: str | os.PathLike,
        format: str = "tf_saved_model",
        verbose: bool = True,
        input_signature: Any = None,
        using: str | None = None,
        **kwargs,
    ) -> None:
        """Exports what a route outputs outside training, to be served without this package.

        The artifact holds the weights of that route and nothing of training.
        If exporting fails, an older artifact at `filepath` stays.

        Args:
            filepath: Where to write the SavedModel (a folder) or file.
            format: As in `keras.Model.export`, like all arguments but `using`.
            using: The route. Defaults to None: `inference`.
            **kwargs: Passed on to the exporter of the format.

        Raises:
            ValueError: If `using` is no route, the model is not built, or its
                inputs are not known and no `input_signature` is passed.
            OSError: If the artifact cannot be written, or `filepath` is a folder
                that holds something else.

        Example:

        >>> import numpy as np, pathlib, tempfile
        >>> import tensorflow as tf
        >>> from polyak_model import PolyakModel
        >>> model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "served")
        >>> model.export(folder, using="ensemble", verbose=False)
        >>> served = tf.saved_model.load(folder)
        >>> served.serve(np.ones((8, 3), "float32")).shape
        TensorShape([8, 2])
        """
        route = self._predicting(using)
        self._check_built("export")
        if input_signature is None:
            input_signature = export.signature(self._router.raw)
        self._router.shadow.catch_up()
        export.export(
            self._router.server(route),
            filepath,
            format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )

    def _check_built(self, method):
        backend.sync(self)
        self._start_if_built()
        if not self._router.shadow.started:
            raise ValueError(
                f"`{method}()` needs weights. Received: a model that is not built. Call "
                "model.build(input_shape), or the model on a batch, first."
            )


def _not_averaged(raw, received):
    return ValueError(
        f"`{type(raw).__name__}.fit` must train by `super().fit()`, so that the average follows. "
        f"Received: a `fit` that {received}. Move the loop into `train_step`, or write it outside "
        "of the model and call model.update_average() after each step."
    )


class _Show(keras.callbacks.Callback):
    """Shows callbacks the wrapper as `self.model`, not the model of the route."""

    def __init__(self, wrapper, callbacks):
        super().__init__()
        self._wrapper = wrapper
        self._callbacks = callbacks

    def set_model(self, model):
        # Keras sets the model of the callbacks in their order; this one is the last.
        for callback in self._callbacks:
            callback.set_model(self._wrapper)


def _shown(wrapper, callbacks):
    # A list that Keras made, such as that of `fit`, shows the wrapper already.
    if not callbacks or isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    callbacks = tree.flatten(callbacks)
    return [*callbacks, _Show(wrapper, callbacks)]


def _check_callbacks(callbacks):
    listed = getattr(callbacks, "callbacks", callbacks)  # `fit` passes a CallbackList on.
    if any(isinstance(each, keras.callbacks.SwapEMAWeights) for each in tree.flatten(listed)):
        raise ValueError(
            "`callbacks` must not swap averaged weights into the model. Received: SwapEMAWeights, "
            "which serves optimizers with use_ema=True. Remove the callback: a PolyakModel "
            "evaluates and predicts through its average already, and `average_model` is the model "
            "to save."
        )
