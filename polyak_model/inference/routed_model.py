"""A model whose evaluation and predictions go through a route."""

import contextlib

import keras
from keras import tree

from polyak_model.inference import export as shipping
from polyak_model.inference import router as routing
from polyak_model.saving.saveable_model import StoredModel


class RoutedModel(StoredModel):
    """Answers `evaluate` and `predict` through the average, the raw model or both.

    Args:
        router: The `Router` that knows the models of each route.
        inference: The default route.
        report: Routes that `evaluate` reports in one pass, or None for
            `inference` alone.
        **kwargs: Arguments of `keras.Model`.
    """

    def __init__(self, router, inference, report, **kwargs):
        super().__init__(**kwargs)
        self._router = router
        self._inference = inference
        self.report = None if report is None else tuple(report)
        # The routes of the call under way; outside `evaluate` and `predict` there are none.
        self._active = None

    @property
    def inference(self):
        """The route that answers by default."""
        return self._inference

    @inference.setter
    def inference(self, route):
        self._inference = routing.check_route("inference", route)

    def _test_batch(self, data):
        return self._router.evaluate(self._routes(), data)

    def _predict_batch(self, data):
        return self._router.answer(self._routes()[0], lambda model: model.predict_step(data))

    def make_test_function(self, force=False):
        return self._make_routed("test_function", super().make_test_function, force)

    def make_predict_function(self, force=False):
        return self._make_routed("predict_function", super().make_predict_function, force)

    def _make_routed(self, name, make, force):
        # One compiled function for each route, so that switching routes does not trace again.
        functions, key = self._router.functions, (name, self._routes())
        if force or key not in functions:
            make(force=True)
            functions[key] = getattr(self, name)
        setattr(self, name, functions[key])
        return functions[key]

    def _routes(self):
        return self._active or (self._inference,)

    @contextlib.contextmanager
    def _through(self, routes):
        if routes != ("raw",):
            self._router.shadow.follow()  # Until averaging begins, it copies all weights.
        previous, self._active = self._active, routes
        try:
            yield
        finally:
            self._active = previous

    def _reported(self, using):
        if using is None:
            return routing.check_report(self.report, self.inference)
        return self._answering(using)

    def _answering(self, using):
        return (self.inference if using is None else routing.check_route("using", using),)

    @property
    def metrics(self):
        """The metrics of the raw model while training, of the answering route while evaluating."""
        return self._router.model(self._active[0] if self._active else "raw").metrics

    def reset_metrics(self):
        for route in self._active or ("raw",):
            self._router.model(route).reset_metrics()

    def get_metrics_result(self):
        routes = self._active or ("raw",)
        return self._router.logs(
            routes, [self._router.model(route).get_metrics_result() for route in routes]
        )

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        *args,
        **kwargs,
    ):
        """Trains as `keras.Model.fit` does, with the same arguments.

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
            self._assert_compile_called("fit")
            self._router.check_scores(self._reported(None))
        with self._backups.watched(callbacks):
            return super().fit(
                x,
                y,
                batch_size,
                epochs,
                verbose,
                callbacks,
                validation_split,
                validation_data,
                *args,
                **kwargs,
            )

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        callbacks=None,
        return_dict=False,
        using=None,
        **kwargs,
    ):
        """Evaluates through a route, or through all those of `report` in one pass.

        Args:
            x: As in `keras.Model.evaluate`, like all arguments but `using`.
            using: `"average"`, `"raw"` or `"ensemble"`: the route for this call
                alone, whose metrics then have plain names. Defaults to None:
                `inference`, and beside it the routes of `report`.

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
        with self._through(self._reported(using)):
            return super().evaluate(
                x=x,
                y=y,
                batch_size=batch_size,
                verbose=verbose,
                sample_weight=sample_weight,
                steps=steps,
                callbacks=callbacks,
                return_dict=return_dict,
                **kwargs,
            )

    def predict(self, x, batch_size=None, verbose="auto", steps=None, callbacks=None, using=None):
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
        with self._through(self._answering(using)):
            return super().predict(
                x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks
            )

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False, using=None):
        """Evaluates one batch; see `evaluate` for `using`."""
        with self._through(self._reported(using)):
            return super().test_on_batch(
                x, y=y, sample_weight=sample_weight, return_dict=return_dict
            )

    def predict_on_batch(self, x, using=None):
        """Predicts one batch; see `predict` for `using`."""
        with self._through(self._answering(using)):
            return super().predict_on_batch(x)

    def export(
        self,
        filepath,
        format="tf_saved_model",
        verbose=True,
        input_signature=None,
        using=None,
        **kwargs,
    ):
        """Exports what a route answers outside training, to be served without this package.

        The artifact holds the weights of that route and nothing of training.
        If exporting fails, what lay at `filepath` stays.

        Args:
            filepath: Where the SavedModel (a folder) or file shall be.
            format: As in `keras.Model.export`, like all arguments but `using`.
            using: The route. Defaults to None: `inference`.
            **kwargs: Passed on to the exporter of the format.

        Raises:
            ValueError: If `using` is no route, the model is not built, or nothing
                is known of its inputs and no `input_signature` is passed.
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
        (route,) = self._answering(using)
        self._check_built("export")
        if input_signature is None:
            input_signature = shipping.signature(self._router.raw)
        self._router.shadow.follow()
        shipping.export(
            self._router.model(route),
            filepath,
            format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )

    def _check_built(self, method):
        if not self._router.shadow.started:
            raise ValueError(
                f"`{method}()` needs weights. Received: a model that is not built. Call "
                "model.build(input_shape), or the model on a batch, first."
            )


def _check_callbacks(callbacks):
    listed = getattr(callbacks, "callbacks", callbacks)  # `fit` passes a CallbackList on.
    if any(isinstance(each, keras.callbacks.SwapEMAWeights) for each in tree.flatten(listed)):
        raise ValueError(
            "`callbacks` must not swap averaged weights into the model. Received: SwapEMAWeights, "
            "which serves optimizers with use_ema=True. Remove the callback: a PolyakModel "
            "evaluates and predicts through its average already, and `average_model` is the model "
            "to save."
        )
