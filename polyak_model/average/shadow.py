"""The averages of one model, and the counter of optimizer steps that they share."""

import contextlib
import types

import keras
from keras import ops

from polyak_model import backend
from polyak_model.average import clone_check, cloning, format_1, shared_files, state
from polyak_model.average.average import Average, move
from polyak_model.average.exclusion import find_excluded
from polyak_model.average.pairing import EXCLUDED, SHARED, pair
from polyak_model.average.sharing import find_shared
from polyak_model.average.step_detector import StepDetector
from polyak_model.average.training_threads import TrainingThreads
from polyak_model.backend import keras_internals
from polyak_model.saving import layout
from polyak_model.weight_files.background import BackgroundWriter


class Shadow(keras.layers.Layer):
    """Averages of one raw model, and the optimizer steps that they have seen.

    It is a layer so that Keras saves its state: `step`, the optimizer steps
    taken since averaging (re)started; the fingerprint of the `StepDetector`;
    master copies and residuals; and the seeds of all models. `run` is what all
    files of one training have in common.

    Args:
        models: Dict with the average model of each average, by name: unshared
            clones of the raw model.
        rules: Dict with the rule of each average, by name.
        non_trainable: `"average"` or `"copy"`: what happens to float weights
            that no optimizer trains.
        compensated: Bool. Whether averages carry residuals (Kahan).
        device: Where the averages live, e.g. `"CPU:0"`, or None.
        exclude: Which weights are not averaged, see `exclusion.check_exclude`.
        share_frozen: Bool. Whether frozen weights are shared with the raw model.
        name: Name of the layer.
    """

    def __init__(
        self,
        models,
        rules,
        non_trainable,
        compensated,
        device,
        exclude=None,
        share_frozen=False,
        name="average",
    ):
        super().__init__(name=name)
        self.models = list(models.values())
        self.non_trainable = non_trainable
        self.compensated = compensated
        self.device = device
        self.exclude = exclude
        self.share_frozen = share_frozen
        self.run = layout.new_run()
        with backend.device(device):
            self.step = self._add_counter("step")
            self.fingerprint = self._add_counter("fingerprint")
            averages = {
                name: Average(name, model, rules[name], self._add_counter(f"{name}_origin"))
                for name, model in models.items()
            }
        self.averages = types.MappingProxyType(averages)
        self.detector = StepDetector(self, self.fingerprint)
        self.described = None  # What a file says of the state that is loaded next.
        self.training_threads = TrainingThreads()
        self.background = BackgroundWriter()
        self._file = contextlib.ExitStack()  # Open while Keras saves or loads the models.

    def __dir__(self):
        # Keras saves what `dir` lists; the PolyakModel saves the models under their names.
        return [name for name in super().__dir__() if name != "models"]

    def _add_counter(self, name):
        return self.add_weight(
            shape=(), dtype="int", initializer="zeros", trainable=False, name=name
        )

    @property
    def first(self):
        """The first `Average`."""
        return next(iter(self.averages.values()))

    @property
    def pairings(self):
        """The `Pairing` of each average."""
        return [average.pairing for average in self.averages.values()]

    @property
    def started(self):
        """Whether raw and average weights are paired."""
        return self.first.pairing is not None

    def start(self, raw_model, inputs=None, prefix=None):
        """Pairs a built raw model with the average models, which become its copies.

        Args:
            raw_model: A `keras.Model`.
            inputs: Symbolic inputs of the models, to check that all have the
                same outputs; or None.
            prefix: String to put before the paths of all variables of the
                averages, or None. Those of an average also begin with its name.
        """
        shared = find_shared(raw_model, self.share_frozen)
        excluded = find_excluded(self.exclude, raw_model.weights, shared)
        settings = (self.non_trainable == "copy", self.compensated, excluded, shared)
        pairings = []
        for name, model in zip(self.averages, self.models, strict=True):
            _name_apart(model.variables, raw_model, name)
            pairing = pair(raw_model, model, self._add_beside, *settings)
            backend.assign((p.average, p.raw) for p in pairing.own)
            backend.assign((master, average) for average, master in pairing.from_masters())
            cloning.copy_outside_weights(raw_model, model)
            clone_check.check_same_outputs(raw_model, model, inputs)
            keras_internals.report_penalties(model, pairing.penalized)
            pairings.append(pairing)
        for average, pairing in zip(self.averages.values(), pairings, strict=True):
            average.pairing = pairing
        if prefix is not None:
            _name_apart(self.variables, raw_model, prefix)
        self.built = True

    def _add_beside(self, average, role, dtype):
        with backend.device(self.device):
            name = f"{role}_{average.path.replace('/', '_')}"
            return keras_internals.add_zeros_like(self, average, dtype, name)

    def steps(self):
        """Returns the optimizer steps taken since averaging (re)started, an int."""
        return int(backend.fetch(self.step))

    def unbegun(self):
        """Returns the averages that still mirror the raw model, a list."""
        step = self.steps()
        return [each for each in self.averages.values() if not each.has_begun(step)]

    def update(self, stepped=True, may_skip=False):
        """Takes one step of averaging.

        Args:
            stepped: Bool or boolean tensor: whether the optimizer took a step.
            may_skip: Bool. Whether steps are often skipped, so that a branch
                pays off. Defaults to False.
        """
        with backend.device(self.device), backend.double_precision():
            # Computed from the step before, the weights need not wait for the optimizer.
            stepped, step = backend.scalar(stepped), backend.scalar(self.step) + 1
            averages = self.averages.values()
            moves = [average.move_at(step, stepped) for average in averages]
            self.step.assign(_select(stepped, step, step - 1))
            # Outside of conditions, in which replicas cannot wait for each other.
            pairings = [average.pairing.synchronized() for average in averages]
            at_every_step = []
            for average, pairing, (moving, weight) in zip(averages, pairings, moves, strict=True):
                if average.rule.update_every > 1:
                    backend.when(moving, lambda pairing=pairing, w=weight: move([(pairing, w)]))
                else:
                    weight = weight if may_skip else _select(moving, weight, 0.0)
                    at_every_step.append((pairing, weight))
            if may_skip:
                backend.when(stepped, lambda: move(at_every_step))
            else:
                move(at_every_step)
            excluded = [(p.average, p.raw) for pairing in pairings for p in pairing.excluded]
            if excluded:
                backend.assign(excluded, ops.cast(stepped, "float64"))

    def catch_up(self, training=False):
        """Brings the averages up to date with the raw weights, before they are used.

        Until averaging begins an average mirrors them, since they may have
        been loaded or assigned. Later, changed weights may be a step.

        Args:
            training: Bool. Whether a forward pass in training comes next.
                Defaults to False.
        """
        if not self.started or not backend.keeps_updates():
            return
        self.first.pairing.check_raw()
        for pairing in self.pairings:
            pairing.check_average()
        if backend.traces_for_export():
            # What is served elsewhere holds the average as it is now, and assigns nothing.
            backend.outside_trace(self.catch_up)
            return
        if backend.replicas() == 1 and backend.variables_are_current():
            with backend.lift():
                self._mirror_unbegun()
        self.detector.detect(training)

    def check_frozen(self):
        """Raises `ValueError` if a shared weight is about to be trained."""
        if self.started:
            self.first.pairing.check_frozen()

    def _mirror_unbegun(self):
        with self.training_threads.held() as others_train:
            # They keep the averages up to date by themselves.
            if not others_train and not self.detector.watching():
                for average in self.unbegun():
                    average.mirror()

    def reset(self):
        """Forgets the past: the averages become copies of the raw weights, the step 0."""
        for counter in (self.step, *(average.origin for average in self.averages.values())):
            counter.assign(0)
        self.detector.stop()
        for average in self.averages.values():
            average.mirror()

    def apply(self, name):
        """Copies an average into the raw model."""
        self.averages[name].apply()
        self.detector.accept()

    def describe(self):
        """Returns the description of the averages in files, see `layout.describe`."""
        serialize = keras.saving.serialize_keras_object
        rules = {name: serialize(average.rule) for name, average in self.averages.items()}
        weights = self.first.pairing.raw_model.weights if self.started else ()
        shared = self._positions(SHARED)
        excluded = self.excluded()
        return layout.describe(rules, self.run, self.compensated, weights, excluded, shared)

    def excluded(self):
        """Returns the positions of the raw weights that are not averaged, a list."""
        return self._positions(EXCLUDED)

    def _positions(self, how):
        pairs = self.first.pairing.pairs if self.started else ()
        return [position for position, p in enumerate(pairs) if p.how == how]

    def begin_saving(self):
        """Call it before Keras saves the models; their files end with the state of this layer."""
        self.end_file()
        if self.started:
            self._file.enter_context(shared_files.saving(self.pairings))

    def begin_loading(self, described):
        """Call it before Keras loads the models.

        Args:
            described: The description of the file, see `layout.describe`; None
                for one of format 1.
        """
        self.end_file()
        self.described = described
        if self.started and described is not None:
            self._file.enter_context(shared_files.loading(self.pairings, described))

    def end_file(self):
        """Ends what `begin_saving` or `begin_loading` began, also if that failed."""
        self._file.close()

    def save_own_variables(self, store):
        self.end_file()
        state.save(self, store)

    def load_own_variables(self, store):
        self.end_file()
        described, self.described = self.described, None
        state.load(self, *(format_1.read(self, store) if described is None else (store, described)))


def _name_apart(variables, raw_model, prefix):
    # With `share_frozen`, some are those of the raw model.
    raw = set(map(id, raw_model.variables))
    keras_internals.name_apart([v for v in variables if id(v) not in raw], prefix)


def _select(condition, one, other):
    # Of Python's numbers, Keras would make float32 tensors.
    if isinstance(condition, bool):
        return one if condition else other
    return ops.where(condition, one, other)
