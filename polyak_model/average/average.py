"""One average of a model: its rule, its model, its pairs with the raw weights."""

import weakref

from keras import ops

from polyak_model import backend
from polyak_model.average import cloning

_average_models: weakref.WeakSet = weakref.WeakSet()


def is_average_model(model):
    """Returns whether a model holds the average of another one."""
    return model in _average_models


class Average:
    """A model that a rule makes the average of another one.

    Args:
        name: Name of the average, an identifier.
        model: The average model, an unshared clone of the raw model.
        rule: A `polyak_model.rules.Rule`.
        origin: Integer variable: the step, on the counter that all averages
            share, after which the rule counts. It is 0 unless the average was
            added to a training that had begun.

    Attributes:
        pairing: The `Pairing` of the raw model with `model`, or None before both
            are built.
    """

    def __init__(self, name, model, rule, origin):
        self.name = name
        self.model = model
        self.rule = rule
        self.origin = origin
        self.pairing = None
        _average_models.add(model)

    def begins_after(self, step):
        """Returns whether averaging has begun after so many steps; before, it mirrors."""
        return step - self.origin > self.rule.start_step

    def has_begun(self, step):
        """Returns the same outside of traces, for an int, as a bool, in less time."""
        return step - int(backend.fetch(self.origin)) > self.rule.start_step

    def move_at(self, step, stepped):
        """Returns whether the average moves at a step, and the weight of the newest iterate.

        Args:
            step: Integer or integer tensor, the shared counter.
            stepped: Bool or boolean tensor: whether the optimizer took the step.
        """
        t = step - backend.scalar(self.origin)
        return stepped & self.rule.moves_at(t), self.rule.weight(t, self.rule.update_every)

    def mirror(self):
        """Makes the average a copy of the raw model, bit for bit."""
        self.mirror_weights()
        cloning.copy_outside_weights(self.pairing.raw_model, self.model)

    def mirror_weights(self):
        """Makes the averages copies of the raw weights, and forgets the residuals."""
        pairs = self.pairing.own
        backend.assign((p.average, p.raw) for p in pairs)
        backend.assign((master, average) for average, master in self.pairing.from_masters())
        forget_residuals(pairs)

    def replace(self, values):
        """Replaces weights of the average model, with their master copies.

        Args:
            values: Iterable of `(weight of the average model, value)`.
        """
        pairs = {id(p.average): p for p in self.pairing.own}
        for average, value in values:
            replaced = pairs[id(average)]
            backend.assign([(average, value), (replaced.target, value)])
            forget_residuals([replaced])

    def apply(self):
        """Copies the average into the raw model."""
        backend.assign((p.raw, p.average) for p in self.pairing.own)
        cloning.copy_outside_weights(self.model, self.pairing.raw_model)


def move(moves):
    """Moves averages of one raw model.

        average += weight * (iterate - average)

    Args:
        moves: List of `(pairing, weight)`.
    """
    backend.update([(pairing.averaged, weight) for pairing, weight in moves])
    for pairing, weight in moves:
        backend.assign(pairing.from_masters(), weight)
    copied = [(p.mirrored, ops.cast(weight > 0, "float64")) for p, weight in moves if p.mirrored]
    if copied:
        backend.update(copied)
    for pairing, weight in moves:
        backend.assign([(p.average, p.raw) for p in pairing.copied], weight)


def forget_residuals(pairs):
    """Sets the residuals of pairs to 0."""
    for p in pairs:
        if p.residual is not None:
            p.residual.assign(ops.zeros(p.residual.shape, p.residual.dtype))
