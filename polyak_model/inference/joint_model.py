"""The raw and the average models as one Keras model, through one route or several."""

import keras
from keras import ops

from polyak_model import backend
from polyak_model.backend import keras_internals
from polyak_model.backend.keras_internals import flatten_layers
from polyak_model.inference.ensemble import join
from polyak_model.inference.routes import ENSEMBLE, RAW


class JointModel(backend.EvaluationStep, backend.PredictionStep, backend.BuildHook, keras.Model):
    """Predicts through a route, and scores several routes in one pass.

    It has compiled functions and metrics of its own, so that calls through
    other routes do not disturb it. Each model runs once per batch. The logs of
    the first route have plain names, those of the others are prefixed.

    Args:
        routes: Tuple of routes; the first one predicts.
        models: Dict of models by route. Only those that `routes` need are kept.
        members: The routes of the models in the ensemble.
        combine: How the ensemble joins outputs, see `join`.
        prepare: Called with each batch before it is used, to build what is not
            built yet.
    """

    def __init__(self, routes, models, members, combine, prepare):
        # Inputs reach the models as they are.
        super().__init__(name="_".join(routes), autocast=False)
        self.routes = routes
        self._members = {route: members if route == ENSEMBLE else (route,) for route in routes}
        # As attributes: in a list the oldest Keras finds no lookup tables to export.
        for name in dict.fromkeys(name for names in self._members.values() for name in names):
            setattr(self, f"{name}_model", models[name])
        self.combine = combine
        self._prepare = prepare
        self._scores = {}
        self.supports_masking = models[RAW].supports_masking
        self.built = True  # Its weights are those of its models.
        if hasattr(models[RAW], "output_names"):
            self.output_names = models[RAW].output_names

    def compile_routes(self, execution, make_arguments=None):
        """Compiles the metrics of each route.

        Args:
            execution: Dict with `run_eagerly`, `jit_compile` and
                `steps_per_execution`.
            make_arguments: `route ->` unshared arguments of `keras.Model.compile`.
                Defaults to None: the models score themselves by a `test_step`
                of their own, with the metrics that they have.
        """
        self.compile(optimizer=None, **execution)
        self._scores = {
            route: self._make_scores(route, make_arguments(route)) if make_arguments else models[0]
            for route, models in ((route, self._models(route)) for route in self.routes)
        }

    def _make_scores(self, route, arguments):
        scores = RouteScores(self._models(route))
        scores.compile(**arguments)
        return scores

    def _models(self, route):
        return [getattr(self, f"{name}_model") for name in self._members[route]]

    def call(self, inputs, *args, **kwargs):
        self._prepare((inputs,))
        return self._output(lambda model: keras_internals.forward(model, inputs, *args, **kwargs))

    def compute_mask(self, inputs, previous_mask):
        return self._models(self.routes[0])[0].compute_mask(inputs, previous_mask)

    def _output(self, call):
        outputs = [call(model) for model in self._models(self.routes[0])]
        return join(self.combine, outputs) if len(outputs) > 1 else outputs[0]

    def _predict_batch(self, data):
        self._prepare(data)
        return self._output(lambda model: backend.call_step(model, "predict_step", data))

    def _test_batch(self, data):
        self._prepare(data)
        with keras_internals.penalties():
            if isinstance(self._scores[self.routes[0]], RouteScores):
                logs = self._score(data)
            else:
                logs = [
                    backend.call_step(self._scores[route], "test_step", data)
                    for route in self.routes
                ]
        return self._join_logs(logs)

    def _score(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        needed = {id(model): model for route in self.routes for model in self._models(route)}
        outputs = {key: keras_internals.forward(model, x) for key, model in needed.items()}
        logs = []
        for route in self.routes:
            own = [outputs[id(model)] for model in self._models(route)]
            joined = join(self.combine, own) if len(own) > 1 else own[0]
            logs.append(backend.score(self._scores[route], x, y, sample_weight, joined))
        return logs

    def _join_logs(self, logs):
        joined = dict(logs[0])
        for route, own in zip(self.routes[1:], logs[1:], strict=True):
            for name, value in own.items():
                if f"{route}_{name}" in joined:
                    raise ValueError(
                        f"Two scores are called '{route}_{name}': a metric of the route "
                        f"'{self.routes[0]}', and '{name}' of the route '{route}'. Rename the "
                        "average, or give the metric another name."
                    )
                joined[f"{route}_{name}"] = value
        return joined

    def _scored(self):
        return self._scores.values()

    def _may_build_before_tracing(self):
        if self.run_eagerly or not isinstance(self._scores[self.routes[0]], RouteScores):
            return False
        models = (model for route in self.routes for model in self._models(route))
        return all(layer.built for model in models for layer in flatten_layers(model))

    def _build_on_batch(self, data):
        self._prepare(data)
        model = self._models(self.routes[0])[0]
        build_metrics(model, [*self._scores.values()], [self], data)

    @property
    def metrics(self):
        # Keras puts the values of a list of metrics first; those of other routes follow by name.
        return self._scores[self.routes[0]].metrics if self._scores else super().metrics

    @property
    def metrics_variables(self):
        metrics = [metric for scores in self._scores.values() for metric in scores.metrics]
        return [variable for metric in metrics for variable in metric.variables]

    def reset_metrics(self):
        for scores in self._scores.values():
            scores.reset_metrics()

    def get_metrics_result(self):
        return self._join_logs([self._scores[route].get_metrics_result() for route in self.routes])


class RouteScores(keras.Model):
    """The loss and the metrics of one route.

    Args:
        models: The models whose outputs are scored.
    """

    def __init__(self, models):
        super().__init__()
        # A layer that is an attribute would be tracked; these belong to somebody else.
        self._penalties = lambda: [loss for model in models for loss in model.losses]
        self._members = len(models)
        if hasattr(models[0], "output_names"):
            self.output_names = models[0].output_names

    @property
    def losses(self):
        """The mean of the models' penalties, so that losses of routes compare."""
        penalties = self._penalties()
        if self._members == 1 or not penalties:
            return penalties
        return [sum(ops.sum(loss) for loss in penalties) / self._members]


def build_metrics(model, scored, models, data):
    """Creates what metrics create at their first batch, without updating them.

    Args:
        model: The `keras.Model` whose outputs they take.
        scored: List of compiled `keras.Model`, whose metrics are created.
        models: List of the `keras.Model` whose weights are read.
        data: A batch `(x, y, sample_weight)`.
    """
    lacking = [each for each in scored if each.compiled and keras_internals.lacks_metrics(each)]

    def score(data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        outputs = keras_internals.forward(model, x)
        for each in lacking:
            backend.score(each, x, y, sample_weight, outputs)

    if lacking:
        backend.rehearse(score, data, [v for each in models for v in each.variables])
