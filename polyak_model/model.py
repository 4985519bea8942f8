"""PolyakModel: a model, and beside it running averages of its weights."""

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from polyak_model import backend, rules
from polyak_model.average import batch_norm, cloning
from polyak_model.average.exclusion import check_exclude
from polyak_model.average.shadow import Shadow
from polyak_model.average.sharing import check_share_frozen
from polyak_model.backend import keras_internals
from polyak_model.backend.common import exportable
from polyak_model.errors import check_choice
from polyak_model.inference.ensemble import check_combine
from polyak_model.inference.routed_model import RoutedModel
from polyak_model.inference.router import Router
from polyak_model.inference.routes import ALIAS, check_averages, check_report, check_route
from polyak_model.rules import Rule
from polyak_model.saving import layout
from polyak_model.wrapper.attribute_access import RawAttributes
from polyak_model.wrapper.building import Building
from polyak_model.wrapper.keras_protocols import KerasProtocols
from polyak_model.wrapper.training import Training
from polyak_model.wrapper.training_checks import check_clone_function, check_model

# Of fifteen rules, the one of the smallest worst regret: benchmarks/science/default_rule.py.
_DEFAULT_RULE = rules.PowerAverage.from_relative_width(0.15)

# The rules themselves import no Keras.
for _rule in (
    rules.ExponentialAverage,
    rules.PolynomialAverage,
    rules.PowerAverage,
    rules.UniformAverage,
):
    keras.saving.register_keras_serializable(package="polyak_model")(_rule)


@keras.saving.register_keras_serializable(package="polyak_model")
class PolyakModel(Training, Building, RoutedModel, KerasProtocols, RawAttributes):
    """Trains a model and keeps running averages of its weights beside it.

    After each optimizer step, inside the training step,

        average += weight(step) * (iterate - average)

    Training is that of `model`, unchanged. Outside training the outputs are those
    of the average, of the raw model, or of both combined. Where an entry of the
    iterate is inf or NaN, its average stays.

    As a layer of a larger model it follows that model's optimizer: if the raw
    weights have changed between two calls in training, or before the average is
    used, they took one step.

    Plain attributes and variables of `model` are read and set through the
    wrapper. Methods are not: the raw and the average model have one each.

    Args:
        model: A `keras.Model`, compiled or not, built or not. It becomes
            `raw_model`.
        average: Float in [0, 1), the decay of an `ExponentialAverage`, or a rule
            of `polyak_model.rules`; or a dict of them by name, for several
            averages at once. Names are identifiers other than the routes
            below. Defaults to None: `PowerAverage.from_relative_width(0.15)`,
            whose memory is a fraction of the run, however long it is.
        inference: `"average"` or the name of an average, `"raw"` or
            `"ensemble"`: the default route of `evaluate`, `predict` and calls
            with `training=False`. `"average"` is the first average, the ensemble
            joins it with the raw model. It can also be set as an attribute.
            Defaults to None: the first average.
        report: Routes that `evaluate` (and `fit` with validation data) reports
            in one pass, e.g. `("average", "raw", "ensemble")`. The metrics of
            `inference` have plain names, those of the others are prefixed:
            `raw_loss`. A callback that monitors a prefixed name needs its
            `mode`. Defaults to None: `inference` alone.
        combine: How the ensemble joins outputs. `"mean"`; `"softmax"`, where
            outputs are logits and the joined one is the logarithm of the mean of
            the probabilities; or a callable from a list of outputs to one.
            Defaults to `"mean"`.
        non_trainable: `"average"` or `"copy"`: whether float variables that no
            optimizer trains (the statistics of BatchNormalization) are averaged
            like the weights or copied from the raw model. Defaults to
            `"average"`.
        exclude: Weights that are not averaged but copied at every step: a
            regular expression that matches the whole path of a variable, a list
            of them, or a callable `variable -> bool`. Defaults to None: all are
            averaged.
        share_frozen: Bool. Whether weights that are frozen when the model is
            wrapped are those of the raw model in every average, instead of
            copies: of frozen layers all weights and statistics, of others single
            weights such as the kernel under LoRA. Averages then take memory for
            the rest alone, and files contain these weights once. Such a weight
            cannot be unfrozen later; wrap the model again. A file that was
            written with it loads without it and the reverse, unless averages in
            the file differ in a weight that is to be shared. Not together with
            `clone_function`. Defaults to False.
        compensated: Bool. Whether to carry the rounding error of the average
            along (Kahan), for slow averages. It takes as much memory as the
            average. Defaults to False.
        device: Device on which the average is stored and updated, e.g.
            `"CPU:0"`. XLA then compiles the raw model's step alone, since it
            cannot reach across devices. Defaults to None: that of the raw
            weights.
        clone_function: `() -> keras.Model`, a fresh model of the same
            architecture, for a model that cannot be copied. Defaults to None.
        name: Name of the wrapper.

    Raises:
        ValueError: If an argument is out of its range, or `model` cannot be
            copied.
        TypeError: If `model` is not a `keras.Model`, or is a PolyakModel or an
            average model already.

    Example:

    >>> import numpy as np
    >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model = PolyakModel(inner, average=0.9)
    >>> model.compile(optimizer="sgd", loss="mse")
    >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), epochs=2, verbose=0)
    >>> model.average_step
    2
    >>> model.predict(np.ones((8, 3)), using="raw", verbose=0).shape
    (8, 1)

    Reference:
        Polyak & Juditsky 1992, Acceleration of stochastic approximation by
        averaging.
    """

    def __init__(
        self,
        model: keras.Model,
        average: float | Rule | Mapping[str, float | Rule] | None = None,
        *,
        inference: str | None = None,
        report: Sequence[str] | None = None,
        combine: str | Callable[[list[Any]], Any] = "mean",
        non_trainable: str = "average",
        exclude: str | Sequence[str] | Callable[[keras.Variable], bool] | None = None,
        share_frozen: bool = False,
        compensated: bool = False,
        device: str | None = None,
        clone_function: Callable[[], keras.Model] | None = None,
        name: str | None = None,
    ) -> None:
        check_model(model)
        named = check_averages(_DEFAULT_RULE if average is None else average)
        inference = check_route("inference", inference or ALIAS, named)
        check_report(report, inference, named)
        check_combine(combine)
        check_choice("non_trainable", non_trainable, ("average", "copy"))
        check_clone_function(clone_function)
        exclude = check_exclude(exclude)
        check_share_frozen(share_frozen, clone_function)
        backend.check_placement(model, device)
        with backend.strategy_scope(model):
            with backend.device(device):
                clones = {name: self._clone(model, clone_function, share_frozen) for name in named}
            settings = (non_trainable, bool(compensated), device, exclude, share_frozen)
            shadow = Shadow(clones, named, *settings)
            super().__init__(
                routes=Router(model, shadow, combine, self._start_on_batch),
                inference=inference,
                report=report,
                name=name,
                dtype=model.dtype_policy,
                autocast=False,
            )
        self.raw_model = model
        self.shadow = shadow
        # Under these names Keras saves the average models.
        self.__dict__.update({layout.average_group(name): clone for name, clone in clones.items()})
        self.clone_function = clone_function
        self.supports_masking = model.supports_masking
        self.__dict__["_adopted"] = None  # Not tracked: it refers to the optimizer.
        self._start_if_built()
        if model.compiled:
            self._adopt_compilation()
        self._wrapped = True

    @property
    def average_model(self) -> keras.Model:
        """The clone that holds the first average, a plain Keras model.

        Until averaging begins it mirrors the raw model, also after weights were
        loaded there. Saved, it is compiled for evaluation, with the loss and
        metrics of the raw model and plain SGD; compile it again to train it
        further.
        """
        return next(iter(self.average_models.values()))

    @property
    def average_models(self) -> Mapping[str, keras.Model]:
        """The models that hold the averages: a read-only dict by name, in order.

        A single average is called `"average"`.
        """
        backend.sync(self)
        self.shadow.catch_up()
        averages = self.shadow.averages.items()
        return types.MappingProxyType({name: average.model for name, average in averages})

    @property
    def rule(self) -> Rule:
        """The rule of the first average, which can be set, also while the model trains.

        The average and the step stay; the new rule acts from the next step on.
        """
        return self.shadow.first.rule

    @rule.setter
    def rule(self, rule: float | Rule) -> None:
        self.set_rule(self.shadow.first.name, rule)

    @property
    def rules(self) -> Mapping[str, Rule]:
        """The rules of the averages: a read-only dict by name, in order."""
        averages = self.shadow.averages.items()
        return types.MappingProxyType({name: average.rule for name, average in averages})

    def set_rule(self, name: str, rule: float | Rule) -> None:
        """Sets the rule of an average, also while the model trains.

        The average and its step stay; the new rule acts from the next step on.

        Args:
            name: Name of the average, or `"average"` for the first.
            rule: A decay or a rule.

        Raises:
            ValueError: If there is no such average, or `rule` is invalid.

        Example:

        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model = PolyakModel(inner, average={"short": 0.9, "long": 0.99})
        >>> model.set_rule("long", 0.999)
        >>> [rule.decay for rule in model.rules.values()]
        [0.9, 0.999]
        """
        self._find(name).rule = rules.get(rule)
        if self.train_function is not None:
            self.make_train_function(force=True)  # The old rule was traced into it.

    def _find(self, name):
        averages = self.shadow.averages
        if name in (None, ALIAS):
            return self.shadow.first
        return averages[check_choice("name", name, tuple(averages))]

    @property
    def average_step(self) -> int:
        """Int: optimizer steps taken since averaging (re)started."""
        backend.sync(self)
        self.shadow.detector.detect()
        return self.shadow.steps()

    def update_average(self) -> None:
        """Takes one step of averaging, for training loops of your own.

        Call it right after the optimizer's step, eagerly or inside a
        `tf.function`. In a loop that calls the PolyakModel itself with
        `training=True` steps are detected without it, and a step that is
        reported as well is not counted twice. On JAX, a loop that `jax.jit`
        compiles calls `stateless_update_average(trainable_variables,
        non_trainable_variables)`, which returns the new non-trainable ones.

        Raises:
            ValueError: If the model is not built.

        Example:

        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model = PolyakModel(inner)
        >>> model.update_average()
        >>> model.average_step
        1
        """
        self._check_built("update_average")
        self.shadow.check_frozen()
        self.shadow.detector.stop()
        backend.on_each_replica(self, self.shadow.update)

    def reset_average(self) -> None:
        """Forgets the past: all averages become copies of the raw weights, the step 0.

        Raises:
            ValueError: If the model is not built.

        Example:

        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model = PolyakModel(inner)
        >>> model.update_average()
        >>> model.reset_average()
        >>> model.average_step
        0
        """
        self._check_built("reset_average")
        self.shadow.reset()

    def apply_average(self, name: str | None = None) -> None:
        """Copies an average into the raw model, for the end of training or Switch EMA.

        The averages and their step stay.

        Args:
            name: Name of the average. Defaults to None: the first.

        Raises:
            ValueError: If the model is not built, or there is no such average.

        Example:

        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model = PolyakModel(inner)
        >>> model.apply_average()
        >>> bool((inner.get_weights()[0] == model.average_model.get_weights()[0]).all())
        True
        """
        average = self._find(name)
        self._check_built("apply_average")
        self.shadow.catch_up()
        self.shadow.apply(average.name)

    def refresh_statistics(
        self,
        data: Any,
        steps: int | None = None,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        name: str | None = None,
    ) -> None:
        """Recomputes the statistics of BatchNormalization in an average model by a pass over data.

        The computation is that of `polyak_model.refresh_statistics`. Layers that
        are frozen in the raw model keep their statistics. Further training
        changes them again, so refresh before evaluating or saving the average.

        Args:
            data: Training inputs, of any kind that `predict` takes, with targets
                or without.
            steps: Int, the number of batches to use. Defaults to None: all.
            batch_size: Int, examples per batch of arrays. Defaults to None: 32.
            verbose: `"auto"`, 0 for silence, 1 for a progress bar or 2 for a
                line.
            name: Name of the average. Defaults to None: the first.

        Raises:
            ValueError: If there is no such average, averaging has not begun,
                `data` is empty, or the statistics contain inf or NaN. The old
                statistics stay then.

        Example:

        >>> import numpy as np
        >>> layers = [keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()]
        >>> model = PolyakModel(keras.Sequential(layers), average=0.9)
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> x, y = np.random.rand(8, 3), np.random.rand(8, 2)
        >>> history = model.fit(x, y, verbose=0)
        >>> model.refresh_statistics(x, verbose=0)
        """
        refreshed = self._find(name)
        self._check_built("refresh_statistics")
        self.shadow.catch_up()
        if refreshed in self.shadow.unbegun():
            raise ValueError(
                "`refresh_statistics()` needs an average that has begun; until then it mirrors the "
                f"raw model. Received: a model after {self.average_step} optimizer steps, where "
                f"averaging begins after start_step={refreshed.rule.start_step}. Train it first."
            )
        average = refreshed.model
        layers = batch_norm.find_layers(average, trained=self.raw_model)
        shared = {id(p.raw) for p in refreshed.pairing.shared}
        layers = [layer for layer in layers if id(layer.moving_mean) not in shared]
        if layers:
            settings = {"batch_size": batch_size, "verbose": verbose}
            refreshed.replace(batch_norm.measure(average, layers, data, steps, **settings))
        elif verbose:
            print(batch_norm.nothing_to_refresh(self.raw_model))

    @property
    def trainable(self):
        """Whether the raw model is trained; the average never is."""
        return self._trainable

    @trainable.setter
    def trainable(self, value):
        self._trainable = bool(value)
        self.raw_model.trainable = value

    def call(self, inputs, *args, training=None, **kwargs):
        backend.sync(self)
        if training is None:
            training = backend.is_differentiated(self.raw_model.trainable_variables)
        if training:
            self.shadow.check_frozen()
        with exportable(not training):
            self.shadow.catch_up(training)
        if training:
            return self.raw_model(inputs, *args, **kwargs)
        outputs = self._router.predictor(self.inference)(inputs, *args, **kwargs)
        # In a larger model these would be added to what the raw model is trained on.
        for model in self.shadow.models:
            keras_internals.clear_losses(model)
        return outputs

    def compute_mask(self, inputs, previous_mask):
        return self.raw_model.compute_mask(inputs, previous_mask)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        model = dict(serialize(self.raw_model))
        # It is saved with the wrapper, so that load_model(compile=False) can leave it out.
        model.pop("compile_config", None)
        combine = self._router.combine
        # Versions that know nothing of it read files without it.
        sharing = {"share_frozen": True} if self.shadow.share_frozen else {}
        return {
            "format": layout.FORMAT_IF_SHARED if sharing else layout.FORMAT,
            "name": self.name,
            "model": model,
            "average": self._serialize_rules(),
            "inference": self.inference,
            "report": self.report,
            "combine": combine if isinstance(combine, str) else serialize(combine),
            "non_trainable": self.shadow.non_trainable,
            "exclude": self._serialize_exclude(),
            **sharing,
            "compensated": self.shadow.compensated,
            "device": self.shadow.device,
            "clone_function": self.clone_function and serialize(self.clone_function),
        }

    def _serialize_rules(self):
        serialize = keras.saving.serialize_keras_object
        rules = {name: serialize(rule) for name, rule in self.rules.items()}
        return rules.get(ALIAS, rules)

    def _serialize_exclude(self):
        # The paths of a loaded model may be others.
        exclude = self.shadow.excluded() if self.shadow.started else self.shadow.exclude
        return (
            keras.saving.serialize_keras_object(exclude) if callable(exclude) else exclude or None
        )

    @classmethod
    def from_config(cls, config):
        deserialize = keras.saving.deserialize_keras_object
        config = dict(config)
        layout.check_format(config.pop("format", layout.FORMAT))
        average = config["average"]
        is_single = isinstance(average.get("class_name"), str)
        config["average"] = (
            deserialize(average)
            if is_single
            else {name: deserialize(rule) for name, rule in average.items()}
        )
        for name in ("model", "combine", "clone_function", "exclude"):
            if isinstance(config.get(name), dict):
                config[name] = deserialize(config[name])
        clone_function = config["clone_function"]
        if clone_function:
            config["clone_function"] = cloning.matching(config["model"], clone_function)
        with warnings.catch_warnings():
            # A config need not say what was frozen: the kernel under LoRA in attention, for one.
            warnings.filterwarnings("ignore", message="Nothing is shared by share_frozen=True")
            wrapper = cls(**config)
        vars(wrapper)["clone_function"] = clone_function  # As it was passed by the user.
        return wrapper
