"""One average: its model, its rule, its step, its update."""

import contextlib
import dataclasses

import keras
from keras import ops

from polyak_model import backend, cloning, probing


@dataclasses.dataclass(frozen=True)
class _Partners:
    """The raw weights and who follows them, paired once."""

    raw: keras.Model
    all: tuple  # (average, raw)
    averaged: tuple  # (average, raw), or with compensation (average, raw, residual)
    rounded: tuple  # (average, its float32 original), where weights have 16 bits
    mirrored: tuple  # (average, raw), floats that follow by value
    copied: tuple  # (average, raw), integers, booleans and seeds
    penalized: tuple  # (average, raw) of weights with a regularizer
    learned: tuple  # raw, those that an optimizer trains unless they are frozen
    apart: tuple  # (average, raw) that may differ between replicas

    def synchronized(self):
        """Returns partners whose raw weights are alike on every replica.

        Outside training steps each replica mirrors its own raw weights, without
        a word from the others; hence averages are reduced here, too.
        """
        if not self.apart or backend.replicas() == 1:
            return self
        averages, raw = zip(*self.apart, strict=True)
        values = backend.synchronize([*averages, *raw])
        backend.assign(zip(averages, values[: len(raw)], strict=True))
        common = {id(w): value for w, value in zip(raw, values[len(raw) :], strict=True)}

        def replace(entries):
            return tuple((average, common.get(id(w), w), *rest) for average, w, *rest in entries)

        return dataclasses.replace(
            self,
            averaged=replace(self.averaged),
            mirrored=replace(self.mirrored),
            copied=replace(self.copied),
        )


class Shadow(keras.layers.Layer):
    """An average model, the rule it follows, and the steps it has seen.

    It is a layer so that Keras saves its state: `step`, the optimizer steps
    taken since averaging (re)started; `absorbed`, the fingerprint of the newest
    iterate in the average while it follows by itself, else 0; and the residuals
    of compensation.

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
        with backend.device(self.device):
            cloning.build_like(raw, self.model)
        partners = self._pair(raw)
        backend.assign(partners.all)
        backend.assign((original, average) for average, original in partners.rounded)
        cloning.copy_outside_weights(raw, self.model)
        if not cloning.has_empty_table(raw):
            probing.check_same_outputs(raw, self.model, inputs)
        self._partners = partners
        self.built = True

    def check_complete(self):
        """Raises `ValueError` if the raw model has gained or lost weights since the start."""
        raw = self._partners.raw
        paired = {id(w) for _, w in self._partners.all}
        gained = [w.path for w in raw.weights if id(w) not in paired]
        if gained or len(raw.weights) != len(paired):
            raise ValueError(
                f"The raw model '{raw.name}' must keep the weights that it had when it was "
                f"wrapped, {len(paired)}; now it has {len(raw.weights)}. Received: new weights "
                f"{gained[:3]}. Make the change (enable LoRA, build all layers) first and wrap the "
                "model then."
            )

    def _pair(self, raw):
        cloning.check_disjoint(raw, self.model)
        pairs = tuple((average, w) for w, average in cloning.pair_weights(raw, self.model))
        moving = _non_trainable_weights(self.model)
        averaged, rounded, mirrored, copied, learned = [], [], [], [], []
        for average, w in pairs:
            average.trainable = False
            if not keras.backend.is_float_dtype(average.dtype):
                copied.append((average, w))
                continue
            if id(average) not in moving:
                learned.append(w)
            elif self.non_trainable == "copy":
                mirrored.append((average, w))
                continue
            original = average
            if average.dtype in ("float16", "bfloat16"):
                # At a decay of 0.999 a step is smaller than what 16 bits can tell.
                original = self._add_beside(average, "original", "float32")
                rounded.append((average, original))
            residual = ()
            if self.compensated:
                residual = (self._add_beside(original, "residual", original.dtype),)
            averaged.append((original, w, *residual))
        penalized = tuple(pair for pair in pairs if pair[1].regularizer is not None)
        untrained = {id(w) for average, w in pairs if id(average) in moving}
        apart = tuple(
            (average, w)
            for average, w, *_ in [*averaged, *mirrored, *copied]
            # The oldest Keras has no variables that are reduced on reading.
            if id(w) in untrained and getattr(w, "synchronization", None) != "on_read"
        )
        groups = map(tuple, (averaged, rounded, mirrored, copied, penalized, learned))
        return _Partners(raw, pairs, *groups, apart)

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

    def update(self, stepped=True, may_skip=False):
        """Takes one step of averaging.

        Args:
            stepped: Bool or boolean tensor: whether the optimizer took a step.
            may_skip: Bool. Whether steps are often skipped, so that a branch
                pays. Defaults to False.
        """
        step = ops.convert_to_tensor(self.step) + ops.cast(stepped, "int64")
        self.step.assign(step)
        moves = ops.logical_and(stepped, self.rule.moves_at(step))
        weight = self.rule.weight(step, self.rule.update_every)
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
        if backend.replicas() == 1:
            with backend.lift():
                if not self.follows() and self.steps() <= self.rule.start_step:
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


def _non_trainable_weights(model):
    # A layer that is frozen marks all its weights untrainable, so `weight.trainable` does not
    # tell a moving mean from a frozen kernel; where the layer tracks them does.
    return {id(v) for layer in model._flatten_layers() for v in layer._non_trainable_variables}
