"""One average: its model, its rule, its step, its update."""

import contextlib

import keras
from keras import ops

from polyak_model import backend
from polyak_model.average import clone_check as probing
from polyak_model.average import cloning
from polyak_model.average.pairing import pair
from polyak_model.backend.keras_internals import seed_states
from polyak_model.saving import description as descriptions


class Shadow(keras.layers.Layer):
    """An average model, the rule it follows, and the steps it has seen.

    It is a layer so that Keras saves its state: `step`, the optimizer steps
    taken since averaging (re)started; `absorbed`, the fingerprint of the newest
    iterate in the average while it follows by itself, else 0; the residuals of
    compensation; the seeds of both models; and a description of it all, with
    `run`, which all files of one training have in common.

    Args:
        model: The average model, an unshared clone of the raw model.
        rule: A `polyak_model.rules.Rule`.
        non_trainable: `"average"` or `"copy"`, what happens to float weights
            that no optimizer trains.
        compensated: Bool. Whether to carry rounding errors along.
        device: Where the state lives, e.g. `"CPU:0"`, or None.
        name: Name of the layer.
    """

    def __init__(self, model, rule, non_trainable, compensated, device, name="average"):
        super().__init__(name=name)
        self.model = model
        self.rule = rule
        self.non_trainable = non_trainable
        self.compensated = compensated
        self.device = device
        self.run = descriptions.new_run()
        with backend.device(device):
            self.step = self._add_counter("step")
            self.absorbed = self._add_counter("absorbed")
        self._partners = None

    def _add_counter(self, name):
        return self.add_weight(
            shape=(), dtype="int64", initializer="zeros", trainable=False, name=name
        )

    def steps(self):
        """Returns the optimizer steps taken since averaging (re)started, an int."""
        return int(self.step.numpy())

    def follows(self):
        """Tells whether the average follows raw weights that someone else trains."""
        return int(self.absorbed.numpy()) != 0

    @property
    def started(self):
        """Whether raw and average weights are paired."""
        return self._partners is not None

    def start(self, raw, inputs=None):
        """Pairs with a built raw model and becomes its copy.

        Args:
            raw: The raw `keras.Model`.
            inputs: What the models take, symbolic, to check that both answer
                alike; or None.
        """
        partners = pair(
            raw, self.model, self._add_beside, self.non_trainable == "copy", self.compensated
        )
        backend.assign(partners.all)
        backend.assign((original, average) for average, original in partners.rounded)
        cloning.copy_outside_weights(raw, self.model)
        probing.check_same_outputs(raw, self.model, inputs)
        self._partners = partners
        self.built = True

    def description(self):
        """Returns what a file says of this average, a dict."""
        return descriptions.describe(self.rule, self.run, self._partners.raw.weights)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.started:
            store[descriptions.KEY] = descriptions.encode(self.description())
            for index, seed in enumerate(self._seeds()):
                store[f"seed_{index}"] = seed

    def load_own_variables(self, store):
        names = set(store.keys())
        super().load_own_variables({name: store[name] for name in names if name.isdigit()})
        if descriptions.KEY in names:
            self.run = descriptions.decode(store[descriptions.KEY])["run"]
        for index, seed in enumerate(self._seeds() if self.started else ()):
            if f"seed_{index}" in names:
                seed.assign(store[f"seed_{index}"])

    def _seeds(self):
        return seed_states(self._partners.raw) + seed_states(self.model)

    def check_complete(self):
        """Raises `ValueError` if the raw model has gained or lost weights since the start."""
        self._partners.check_complete()

    def _add_beside(self, average, role, dtype):
        with backend.device(self.device):
            return self.add_weight(
                shape=average.shape,
                dtype=dtype,
                initializer="zeros",
                trainable=False,
                name=f"{role}_{average.path.replace('/', '_')}",
            )

    def mirror(self):
        """Makes the average a copy of the raw model, bit for bit."""
        self._mirror_weights()
        cloning.copy_outside_weights(self._partners.raw, self.model)

    def _mirror_weights(self):
        backend.assign(self._partners.all)
        backend.assign((original, average) for average, original in self._partners.rounded)
        for _, _, *residual in self._partners.averaged:
            for variable in residual:
                variable.assign(ops.zeros_like(variable))

    def replace(self, values):
        """Replaces entries of the average, as if it had come to them by itself.

        Args:
            values: Iterable of pairs `(weight of the average model, value)`.
        """
        originals = {id(average): original for average, original in self._partners.rounded}
        residuals = {id(average): rest for average, _, *rest in self._partners.averaged}
        for average, value in values:
            original = originals.get(id(average), average)
            backend.assign([(average, value), (original, value)])
            for residual in residuals.get(id(original), ()):
                residual.assign(ops.zeros_like(residual))

    def begun(self):
        """Tells whether averaging has begun; until then the average mirrors the raw weights."""
        return self.steps() > self.rule.start_step

    def update(self, stepped=True, may_skip=False):
        """Takes one step of averaging.

        Args:
            stepped: Bool or boolean tensor: whether the optimizer took a step.
            may_skip: Bool. Whether steps are often skipped, so that a branch
                pays. Defaults to False.
        """
        with backend.device(self.device):
            self._update(stepped, may_skip)

    def _update(self, stepped, may_skip):
        # Reckoned from the step before, the weight need not wait for the optimizer.
        step = self.step + 1
        moves = ops.logical_and(stepped, self.rule.moves_at(step))
        weight = self.rule.weight(step, self.rule.update_every)
        self.step.assign(ops.where(stepped, step, step - 1))
        # Outside of the condition, in which replicas cannot wait for each other.
        partners = self._partners.synchronized()
        if may_skip or self.rule.update_every > 1:
            backend.when(moves, lambda: self._move(partners, weight))
        else:
            self._move(partners, ops.where(moves, weight, 0.0))

    def _move(self, partners, weight):
        if self.compensated:
            backend.move_compensated(partners.averaged, weight)
        else:
            backend.move(partners.averaged, weight)
        backend.assign(partners.rounded, weight)
        backend.move(partners.mirrored, ops.cast(weight > 0, "float64"))
        backend.assign(partners.copied, weight)

    def follow(self, training=False):
        """Catches up with the raw weights, wherever the average is about to be used.

        Until averaging begins the average mirrors them, since they may have
        been loaded or assigned; then it is `absorb`.

        Args:
            training: Bool. Whether a forward pass in training comes next.
                Defaults to False.
        """
        if not self.started or not backend.keeps_updates():
            return
        if backend.traces_for_export():
            # What is served elsewhere holds the average as it is now, and assigns nothing.
            backend.apart(self.follow)
            return
        if backend.replicas() == 1:
            with backend.lift():
                if not self.begun() and not self.follows():
                    self.mirror()
        self.absorb(training)

    def absorb(self, training=False):
        """Takes the step that the raw weights have taken since this was last called, if any.

        It is for weights that someone else trains, who knows nothing of the
        average: before each forward pass in training, and wherever the average
        is used, the weights as they are now are the newest iterate.

        Args:
            training: Bool. Whether a forward pass in training comes next, so
                that the average follows from here. Defaults to False.
        """
        if not backend.runs_eagerly() or training or self.follows():
            backend.on_each_replica(self.model, lambda: self._absorb_if_due(training))

    def _absorb_if_due(self, training):
        follows = ops.convert_to_tensor(self.absorbed) != 0
        unbegun = ops.convert_to_tensor(self.step) <= self.rule.start_step
        backend.when(ops.logical_and(ops.logical_not(follows), unbegun), self._mirror_weights)
        # Replicas cannot wait for each other inside a condition.
        if training or backend.replicas() > 1:
            self._absorb(training)
        else:
            backend.when(follows, self._absorb)

    def _absorb(self, training=False):
        absorbed = ops.convert_to_tensor(self.absorbed)
        present = backend.fingerprint(self._partners.learned)
        follows = absorbed != 0
        self.update(ops.logical_and(follows, present != absorbed), may_skip=True)
        self.absorbed.assign(present if training else ops.where(follows, present, absorbed))

    def stop_following(self):
        """Leaves it to calls of `update` to say when the raw weights took a step."""
        self.absorbed.assign(0)

    def reset(self):
        """Forgets the past: the average becomes the present raw weights."""
        self.step.assign(0)
        self.stop_following()
        self.mirror()

    def apply(self):
        """Copies the average into the raw model."""
        backend.assign((w, average) for average, w in self._partners.all)
        cloning.copy_outside_weights(self.model, self._partners.raw)
        if self.follows():
            self.absorbed.assign(backend.fingerprint(self._partners.learned))

    @contextlib.contextmanager
    def penalties(self):
        """While open, the average model reports the regularization losses of its weights.

        Outside, its weights count as untrainable, and Keras sees no penalty.
        """
        trained = [average for average, w in self._partners.penalized if w.trainable]
        for average in trained:
            average.trainable = True
        try:
            yield
        finally:
            for average in trained:
                average.trainable = False
