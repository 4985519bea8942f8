"""Detects the steps of an optimizer that knows nothing of the average.

A part of a larger model is trained by that model's optimizer, which reports no
step. Its raw weights show them: between two forward passes in training, and
before the average is used, changed weights are one step.

    REPORTED                 training=True                 WATCHING
    `update` is called  ───────────────────────▶  fingerprint of the newest
    at each step        ◀───────────────────────  iterate; another one is a step
    fingerprint = 0     fit, update_average, reset

The fingerprint is a variable that files keep, so that a training that goes on
neither loses nor repeats a step. A step that leaves the weights as they were, to
the last bit, is not detected.
"""

from keras import ops

from polyak_model import backend


class StepDetector:
    """The two states above, of one `Shadow`.

    Args:
        shadow: The `Shadow` to update.
        fingerprint: Its integer variable.
    """

    def __init__(self, shadow, fingerprint):
        self._shadow = shadow
        self._fingerprint = fingerprint

    def watching(self):
        """Returns whether changed raw weights count as a step, a bool."""
        return int(backend.fetch(self._fingerprint)) != 0

    def stop(self):
        """Leaves it to calls of `Shadow.update` to report steps."""
        self._fingerprint.assign(0)

    def accept(self):
        """Takes the current raw weights as the newest iterate, which is no step."""
        if self.watching():
            self._fingerprint.assign(self._current())

    def detect(self, training=False):
        """Updates the average if the raw weights have taken a step.

        Args:
            training: Bool. Whether a forward pass in training comes next, so
                that watching begins. Defaults to False.
        """
        if not backend.runs_eagerly() or training or self.watching():
            model = self._shadow.first.model
            backend.on_each_replica(model, lambda: self._detect_here(training))

    def _detect_here(self, training):
        watching = ops.convert_to_tensor(self._fingerprint) != 0
        for average in self._shadow.averages.values():
            unbegun = ops.logical_not(average.begins_after(self._shadow.step))
            backend.when(
                ops.logical_and(ops.logical_not(watching), unbegun), average.mirror_weights
            )
        # Replicas cannot wait for each other inside a condition.
        if training or backend.replicas() > 1:
            self._compare(training)
        else:
            backend.when(watching, self._compare)

    def _compare(self, training=False):
        known, current = ops.convert_to_tensor(self._fingerprint), self._current()
        watching = known != 0
        self._shadow.update(ops.logical_and(watching, current != known), may_skip=True)
        self._fingerprint.assign(current if training else ops.where(watching, current, known))

    def _current(self):
        return backend.fingerprint(self._shadow.first.pairing.learned)
