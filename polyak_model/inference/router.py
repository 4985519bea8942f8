"""Who answers outside training, and the metrics of each route."""

import inspect

import keras
from keras import tree

from polyak_model import backend
from polyak_model.backend.keras_internals import forward
from polyak_model.errors import check_choice
from polyak_model.inference.ensemble import Ensemble, join

ROUTES = ("average", "raw", "ensemble")


def check_route(name, route):
    """Returns `route`, or raises `ValueError`.

    Args:
        name: Name of the argument, for the message.
        route: Anything.
    """
    return check_choice(name, route, ROUTES)


def check_report(report, inference):
    """Returns the routes that `evaluate` reports, the default route first.

    Args:
        report: Routes, or None for the default route alone.
        inference: The default route.
    """
    if report is None:
        return (inference,)
    if isinstance(report, str):
        raise ValueError(
            "`report` must be a list or tuple of routes, e.g. ('average', 'raw', 'ensemble'). "
            f"Received: report={report!r}. For one route write report=({report!r},)."
        )
    routes = [check_route("report", route) for route in report]
    return tuple(dict.fromkeys([inference, *routes]))


class Router:
    """Answers and scores batches through routes.

    Args:
        raw: The raw model.
        shadow: The `Shadow` of the average.
        combine: How the ensemble joins answers.
    """

    def __init__(self, raw, shadow, combine):
        self.raw = raw
        self.shadow = shadow
        self.combine = combine
        self.ensemble = Ensemble([raw, shadow.model], combine)
        self.functions = {}

    def model(self, route):
        """Returns the model that holds the metrics of a route."""
        return {"raw": self.raw, "average": self.shadow.model, "ensemble": self.ensemble}[route]

    def check_metrics(self, arguments):
        """Raises `ValueError` if metrics among the arguments of `compile` cannot be copied.

        Args:
            arguments: A nested structure of anything.
        """
        _fresh(arguments, stateful=keras.metrics.Metric)

    def compile(self, args=(), kwargs=None):
        """Compiles the average model and the ensemble as the raw model is, for evaluation.

        Args:
            args: What a raw model with a `compile` of its own was compiled with.
            kwargs: Likewise, or None if that is not known.
        """
        settings = dict(self.raw._compile_config.config)
        # Keras cannot load a model compiled without an optimizer; plain SGD has no state.
        settings["optimizer"] = keras.optimizers.SGD()
        self.ensemble.compile(**_fresh(settings))
        if type(self.raw).compile is keras.Model.compile:
            self.shadow.model.compile(**_fresh(settings))
        elif kwargs is not None:
            self.shadow.model.compile(*_fresh(args), **_fresh(kwargs))
        elif _takes(self.raw.compile, settings):
            self.shadow.model.compile(**_fresh(settings))
        else:
            self.shadow.model.compiled = False  # It may have compiled itself, by its defaults.
        self.functions.clear()

    def build_metrics(self, data):
        """Creates what the metrics of all routes would create at their first batch.

        Args:
            data: A batch `(x, y, sample_weight)`.
        """
        models = [m for m in map(self.model, ROUTES) if m.compiled and backend.lacks_metrics(m)]

        def score(data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            outputs = forward(self.raw, x)
            for model in models:
                backend.score(model, x, y, sample_weight, outputs)

        if models:
            weights = [*self.raw.variables, *self.shadow.model.variables]
            backend.rehearse(score, data, weights)

    def answer(self, route, ask):
        """Asks the models of a route.

        Args:
            route: One of `ROUTES`.
            ask: Callable from a model to its output.

        Returns:
            The output; the ensemble joins those of its two models.
        """
        if route == "ensemble":
            return join(self.combine, [ask(member) for member in self.ensemble.members])
        return ask(self.model(route))

    def evaluate(self, routes, data):
        """Updates the metrics of several routes with one batch.

        Every model runs once, whatever the routes.

        Args:
            routes: Routes; the logs of the first have plain names, those of the
                others are prefixed with the route.
            data: A batch `(x, y, sample_weight)`.

        Returns:
            The logs, a dict.
        """
        self.check_scores(routes)
        if "ensemble" in routes:
            return self.logs(routes, self._score(routes, data))
        logs = []
        for route in routes:
            with self.shadow.penalties():
                logs.append(self.model(route).test_step(data))
        return self.logs(routes, logs)

    def _score(self, routes, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        answers = [forward(member, x) for member in self.ensemble.members]
        outputs = dict(zip(("raw", "average"), answers, strict=True))
        outputs["ensemble"] = join(self.combine, answers)
        with self.shadow.penalties():
            return [
                backend.score(self.model(route), x, y, sample_weight, outputs[route])
                for route in routes
            ]

    def check_scores(self, routes):
        """Raises `ValueError` unless all of `routes` can be evaluated.

        Args:
            routes: Routes.
        """
        if "average" in routes and not self.shadow.model.compiled:
            raise ValueError(
                f"{type(self.raw).__name__} has a `compile` of its own, whose arguments Keras does "
                "not record. Received: a model that was compiled before it was wrapped. Call "
                "`compile` on the PolyakModel with the same arguments, so that the average can be "
                "evaluated too."
            )
        if "ensemble" not in routes:
            return
        for method in ("test_step", "compute_loss", "compute_metrics"):
            if getattr(type(self.raw), method) is not getattr(keras.Model, method):
                raise ValueError(
                    f"The ensemble cannot be evaluated: {type(self.raw).__name__} has a "
                    f"`{method}` of its own, which scores the outputs of one model. Received: "
                    f"routes {tuple(routes)}. Evaluate the routes 'average' and 'raw', or use "
                    "predict(using='ensemble') and score its outputs yourself."
                )

    def logs(self, routes, logs):
        """Joins the logs of several routes into one dict.

        Args:
            routes: The routes, the one with the plain names first.
            logs: A dict for each.
        """
        joined = dict(logs[0])
        for route, own in zip(routes[1:], logs[1:], strict=True):
            joined.update({f"{route}_{name}": value for name, value in own.items()})
        return joined


def _takes(compile_model, settings):
    # A `compile` of the user's own may do without arguments that Keras does not record.
    try:
        inspect.signature(compile_model).bind(**settings)
    except TypeError:
        return False
    own = inspect.signature(compile_model).parameters.values()
    known = {*inspect.signature(keras.Model.compile).parameters, *settings}
    return all(each.name in known for each in own if each.kind is not each.VAR_KEYWORD)


def _fresh(arguments, stateful=(keras.metrics.Metric, keras.optimizers.Optimizer)):
    # These hold state, so no two models may share one.
    def fresh(value):
        if not isinstance(value, stateful):
            return value
        try:
            return type(value).from_config(value.get_config())
        except Exception as error:
            raise ValueError(
                f"'{value.name}' of class {type(value).__name__} cannot be copied, and each route "
                "needs one of its own. Give the class a `get_config()` that holds all its "
                f"constructor arguments. Keras says: {error}"
            ) from error

    return tree.map_structure(fresh, arguments)
