"""Which Keras model predicts and evaluates through which route."""

import inspect
import threading

import keras
from keras import tree

from polyak_model import backend
from polyak_model.average.cloning import copy_unshared
from polyak_model.backend import keras_internals
from polyak_model.inference import routes
from polyak_model.inference.joint_model import JointModel, build_metrics


class Router:
    """Hands each route a Keras model with compiled functions and metrics of its own.

    The raw and the average model predict by themselves, and the raw model
    evaluates by itself, so that methods of the user's class count. Everything
    else is a `JointModel`, made when it is first used.

    Args:
        raw: The raw model.
        shadow: The `Shadow` with the averages.
        combine: How the ensemble joins outputs.
        prepare: Called with each batch before it is used.
    """

    def __init__(self, raw, shadow, combine, prepare):
        self.raw = raw
        self.shadow = shadow
        self.combine = combine
        self._prepare = prepare
        self._predictors, self._evaluators = {}, {}
        self._lock = threading.Lock()
        self._keep_averages_from_xla()

    def _keep_averages_from_xla(self):
        # XLA cannot compile a function that reaches across devices, and an average predicts by
        # itself. What it was compiled with, which is saved, stays.
        if self.shadow.device is not None:
            for model in self.shadow.models:
                model.jit_compile = False

    @property
    def models(self):
        """The models by route; the ensemble has none of its own."""
        averages = {name: average.model for name, average in self.shadow.averages.items()}
        return {**averages, "raw": self.raw}

    def check_route(self, argument, route):
        """Returns the name of a route, see `routes.check_route`."""
        return routes.check_route(argument, route, self.shadow.averages)

    def check_report(self, report, inference):
        """Returns the routes to report, see `routes.check_report`."""
        return routes.check_report(report, inference, self.shadow.averages)

    def predictor(self, route):
        """Returns the model that predicts through a route."""
        if route == "raw" or (route != "ensemble" and self.shadow.started):
            return self.models[route]
        return self.server(route)

    def server(self, route):
        """Returns a model that calls those of a route with `training=False`, to be exported."""
        # Called without, layers such as RandomFlip would augment what is served.
        return self._joint(self._predictors, (route,), self._compile_predictor)

    def evaluator(self, used):
        """Returns the model that evaluates through several routes in one pass.

        Args:
            used: Tuple of routes; the logs of the first have plain names.
        """
        if used == ("raw",):
            return self.raw
        return self._joint(self._evaluators, used, self._compile_evaluator)

    def step(self, name, used, data):
        """Runs a step of the model of some routes.

        Args:
            name: `"test_step"`, with a tuple of routes, or `"predict_step"`, with
                one route.
            used: See `name`.
            data: The batch.
        """
        self._prepare(data)
        model = self.evaluator(used) if name == "test_step" else self.predictor(used)
        return backend.call_step(model, name, data)

    def _joint(self, made, used, compile_model):
        with self._lock:
            if used not in made:
                with backend.strategy_scope(self.raw):
                    members = ("raw", self.shadow.first.name)
                    model = JointModel(used, self.models, members, self.combine, self._prepare)
                    compile_model(model)
                made[used] = model
            return made[used]

    def _compile_predictor(self, model):
        model.compile_routes(self._execution())

    def _compile_evaluator(self, model):
        arguments = dict(keras_internals.compile_arguments(self.raw), optimizer=None)

        def make_arguments(route):
            # A metric or loss may refer to layers of the model that it scores.
            scored = self.models.get(route, self.raw)
            copies = copy_unshared(arguments, self.raw, scored)
            for copy in tree.flatten(copies):
                if isinstance(copy, keras.Metric):
                    copy.reset_state()  # Keras does so only once it has built all metrics.
            return copies

        scores_itself = self._own_scoring() is not None
        model.compile_routes(self._execution(), None if scores_itself else make_arguments)

    def _execution(self):
        return {
            "run_eagerly": self.raw.run_eagerly,
            "steps_per_execution": self.raw.steps_per_execution,
            "jit_compile": self.raw.jit_compile and self.shadow.device is None,
        }

    def compile(self, args=(), kwargs=None):
        """Compiles the average models like the raw model, for evaluation.

        Args:
            args: Arguments of the raw model's `compile`, if it has its own.
            kwargs: Keyword arguments likewise; None where they are not known.
        """
        for model in self.shadow.models:
            self._compile_average(model, args, kwargs)
        self._keep_averages_from_xla()
        self._predictors, self._evaluators = {}, {}

    def _compile_average(self, average, args, kwargs):
        raw = self.raw
        settings = keras_internals.compile_arguments(raw)
        # Keras cannot load a model that was compiled without an optimizer; plain SGD has no state.
        settings["optimizer"] = keras.optimizers.SGD()
        if kwargs is not None and type(raw).compile is not keras.Model.compile:
            args, kwargs = copy_unshared((args, kwargs), raw, average)
            average.compile(*args, **kwargs)
        elif _takes(raw.compile, settings):
            average.compile(**copy_unshared(settings, raw, average))
        else:
            average.compiled = False  # It may have compiled itself, with its defaults.

    def check_arguments(self, arguments):
        """Raises `ValueError` if arguments of `compile` cannot be copied for the average."""
        copy_unshared(arguments, self.raw, self.raw)

    def build_metrics(self, data):
        """Creates what the metrics of the raw model create at their first batch.

        Args:
            data: A batch `(x, y, sample_weight)`.
        """
        build_metrics(self.raw, [self.raw], [self.raw], data)

    def check_scores(self, used):
        """Raises `ValueError` unless all routes in `used` can be evaluated."""
        averages = [self.shadow.averages[name] for name in used if name in self.shadow.averages]
        if any(not average.model.compiled for average in averages):
            raise ValueError(
                f"{type(self.raw).__name__} has a `compile` of its own, whose arguments Keras does "
                "not record. Received: a model that was compiled before it was wrapped. Call "
                "`compile` on the PolyakModel with the same arguments, so that the average can be "
                "evaluated too."
            )
        method = self._own_scoring()
        if "ensemble" in used and method is not None:
            raise ValueError(
                f"The ensemble cannot be evaluated: {type(self.raw).__name__} has a `{method}` of "
                f"its own, which scores the outputs of one model. Received: routes {used}. "
                f"Evaluate the routes {self.shadow.first.name!r} and 'raw', or use "
                "predict(using='ensemble') and score its outputs yourself."
            )

    def _own_scoring(self):
        for method in ("test_step", "compute_loss", "compute_metrics"):
            if getattr(type(self.raw), method) is not getattr(keras.Model, method):
                return method
        return None


def _takes(compile_model, settings):
    # A `compile` of the user's own may do without arguments that Keras does not record.
    try:
        inspect.signature(compile_model).bind(**settings)
    except TypeError:
        return False
    own = inspect.signature(compile_model).parameters.values()
    known = {*inspect.signature(keras.Model.compile).parameters, *settings}
    return all(each.name in known for each in own if each.kind is not each.VAR_KEYWORD)
