"""One average: its model, its rule, its step, its update."""

import weakref

import keras
from keras import ops

from polyak_model import backend
from polyak_model.average import clone_check, cloning
from polyak_model.average.pairing import pair
from polyak_model.average.step_detector import StepDetector
from polyak_model.average.training_threads import TrainingThreads
from polyak_model.backend import keras_internals
from polyak_model.saving import layout

_average_models = weakref.WeakSet()


def is_average_model(model):
    """Returns whether a model holds the average of another one."""
    return model in _average_models


class Shadow(keras.layers.Layer):
    """An average model, the rule that moves it, and the steps that it has seen.

    It is a layer so that Keras saves its state: `step`, the optimizer steps
    taken since averaging (re)started; the fingerprint of the `StepDetector`;
    master copies and residuals; the seeds of both models; and a description of
    it all, with `run`, which all files of one training have in common.

    Args:
        model: The average model, an unshared clone of the raw model.
        rule: A `polyak_model.rules.Rule`.
        non_trainable: `"average"` or `"copy"`: what happens to float weights
            that no optimizer trains.
        compensated: Bool. Whether averages carry residuals (Kahan).
        device: Where the average lives, e.g. `"CPU:0"`, or None.
        name: Name of the layer.
    """

    def __init__(self, model, rule, non_trainable, compensated, device, name="average"):
        super().__init__(name=name)
        self.model = model
        _average_models.add(model)
        self.rule = rule
        self.non_trainable = non_trainable
        self.compensated = compensated
        self.device = device
        self.run = layout.new_run()
        with backend.device(device):
            self.step = self._add_counter("step")
            self.detector = StepDetector(self, self._add_counter("fingerprint"))
        self.pairing = None
        self.training_threads = TrainingThreads()

    def _add_counter(self, name):
        return self.add_weight(
            shape=(), dtype="int64", initializer="zeros", trainable=False, name=name
        )

    @property
    def started(self):
        """Whether raw and average weights are paired."""
        return self.pairing is not None

    def start(self, raw_model, inputs=None):
        """Pairs a built raw model with the average model, which becomes its copy.

        Args:
            raw_model: A `keras.Model`.
            inputs: Symbolic inputs of the models, to check that both have the
                same outputs; or None.
        """
        copies_statistics = self.non_trainable == "copy"
        pairing = pair(raw_model, self.model, self._add_beside, copies_statistics, self.compensated)
        backend.assign((p.average, p.raw) for p in pairing.pairs)
        backend.assign((master, average) for average, master in pairing.from_masters())
        cloning.copy_outside_weights(raw_model, self.model)
        clone_check.check_same_outputs(raw_model, self.model, inputs)
        keras_internals.report_penalties(self.model, pairing.penalized)
        self.pairing = pairing
        self.built = True

    def _add_beside(self, average, role, dtype):
        with backend.device(self.device):
            return self.add_weight(
                shape=average.shape,
                dtype=dtype,
                initializer="zeros",
                trainable=False,
                name=f"{role}_{average.path.replace('/', '_')}",
            )

    def steps(self):
        """Returns the optimizer steps taken since averaging (re)started, an int."""
        return int(self.step.numpy())

    def begins_after(self, step):
        """Returns whether averaging has begun after so many steps; before, it mirrors."""
        return step > self.rule.start_step

    def begun(self):
        """Returns whether averaging has begun, a bool."""
        return self.begins_after(self.steps())

    def update(self, stepped=True, may_skip=False):
        """Takes one step of averaging.

        Args:
            stepped: Bool or boolean tensor: whether the optimizer took a step.
            may_skip: Bool. Whether steps are often skipped, so that a branch
                pays off. Defaults to False.
        """
        with backend.device(self.device):
            # Computed from the step before, the weight need not wait for the optimizer.
            step = self.step + 1
            moves = ops.logical_and(stepped, self.rule.moves_at(step))
            weight = self.rule.weight(step, self.rule.update_every)
            self.step.assign(ops.where(stepped, step, step - 1))
            # Outside of the condition, in which replicas cannot wait for each other.
            pairing = self.pairing.synchronized()
            if may_skip or self.rule.update_every > 1:
                backend.when(moves, lambda: _move(pairing, weight))
            else:
                _move(pairing, ops.where(moves, weight, 0.0))

    def catch_up(self, training=False):
        """Brings the average up to date with the raw weights, before it is used.

        Until averaging begins the average mirrors them, since they may have
        been loaded or assigned. Later, changed weights may be a step.

        Args:
            training: Bool. Whether a forward pass in training comes next.
                Defaults to False.
        """
        if not self.started or not backend.keeps_updates():
            return
        self.pairing.check_complete()
        if backend.traces_for_export():
            # What is served elsewhere holds the average as it is now, and assigns nothing.
            backend.outside_trace(self.catch_up)
            return
        if backend.replicas() == 1:
            with backend.lift():
                self._mirror_if_unbegun()
        self.detector.detect(training)

    def _mirror_if_unbegun(self):
        with self.training_threads.held() as others_train:
            # They keep the average up to date by themselves.
            if not others_train and not self.begun() and not self.detector.watching():
                self.mirror()

    def mirror(self):
        """Makes the average a copy of the raw model, bit for bit."""
        self.mirror_weights()
        cloning.copy_outside_weights(self.pairing.raw_model, self.model)

    def mirror_weights(self):
        """Makes the averages copies of the raw weights, and forgets the residuals."""
        pairs = self.pairing.pairs
        backend.assign((p.average, p.raw) for p in pairs)
        backend.assign((master, average) for average, master in self.pairing.from_masters())
        _forget_residuals(pairs)

    def replace(self, values):
        """Replaces weights of the average model, with their master copies.

        Args:
            values: Iterable of `(weight of the average model, value)`.
        """
        pairs = {id(p.average): p for p in self.pairing.pairs}
        for average, value in values:
            replaced = pairs[id(average)]
            backend.assign([(average, value), (replaced.target, value)])
            _forget_residuals([replaced])

    def reset(self):
        """Forgets the past: the average becomes a copy of the raw weights, the step 0."""
        self.step.assign(0)
        self.detector.stop()
        self.mirror()

    def apply(self):
        """Copies the average into the raw model."""
        backend.assign((p.raw, p.average) for p in self.pairing.pairs)
        cloning.copy_outside_weights(self.model, self.pairing.raw_model)
        self.detector.accept()

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.started:
            rule = keras.saving.serialize_keras_object(self.rule)
            description = layout.describe(rule, self.run, self.pairing.raw_model.weights)
            store[layout.DESCRIPTION] = layout.encode(description)
            for index, seed in enumerate(self._seeds()):
                store[layout.seed_name(index)] = seed

    def load_own_variables(self, store):
        names = set(store.keys())
        described = layout.decode(store[layout.DESCRIPTION]) if layout.DESCRIPTION in names else {}
        self.run = described.get("run", self.run)
        weights = self.pairing.raw_model.weights if self.started else ()
        if not described or layout.has_same_weights(described, weights):
            super().load_own_variables({name: store[name] for name in names if name.isdigit()})
            merged = [p for p in self._pairs_with_master() if not _is_rounded(p.master, p.average)]
        else:
            self.step.assign(store[layout.STEP])
            self.detector.stop()
            merged = self.pairing.averaged
        # Keras merges LoRA into the kernels of a file, but not into the state in this group.
        for p in merged:
            p.target.assign(p.average)
        _forget_residuals(merged)
        for index, seed in enumerate(self._seeds() if self.started else ()):
            if layout.seed_name(index) in names:
                seed.assign(store[layout.seed_name(index)])

    def _pairs_with_master(self):
        pairs = self.pairing.averaged if self.started else ()
        return [p for p in pairs if p.master is not None]

    def _seeds(self):
        models = (self.pairing.raw_model, self.model)
        return [seed for model in models for seed in keras_internals.seed_states(model)]


def _move(pairing, weight):
    backend.update(pairing.averaged, weight)
    backend.assign(pairing.from_masters(), weight)
    backend.update(pairing.mirrored, ops.cast(weight > 0, "float64"))
    backend.assign([(p.average, p.raw) for p in pairing.copied], weight)


def _is_rounded(master, average):
    return bool(ops.all(ops.cast(master, average.dtype) == average))


def _forget_residuals(pairs):
    for p in pairs:
        if p.residual is not None:
            p.residual.assign(ops.zeros_like(p.residual))
