"""Which weight of an average follows which raw weight, and how."""

import dataclasses

import keras

from polyak_model import backend
from polyak_model.average.clone_check import check_disjoint, pair_weights
from polyak_model.backend.keras_internals import untrained_weights


@dataclasses.dataclass(frozen=True)
class Partners:
    """The raw weights and who follows each of them, sorted by how."""

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

    def check_complete(self):
        """Raises `ValueError` if the raw model has gained or lost weights since it was paired."""
        raw = self.raw
        paired = {id(w) for _, w in self.all}
        gained = [w.path for w in raw.weights if id(w) not in paired]
        if gained or len(raw.weights) != len(paired):
            raise ValueError(
                f"The raw model '{raw.name}' must keep the weights that it had when it was "
                f"wrapped, {len(paired)}; now it has {len(raw.weights)}. Received: new weights "
                f"{gained[:3]}. Make the change (enable LoRA, build all layers) first and wrap the "
                "model then."
            )


def pair(raw, model, add_beside, copies_statistics, compensated):
    """Pairs the weights of a raw model with those of its average, once, and freezes the latter.

    Args:
        raw: A built `keras.Model`.
        model: The average model, an unshared clone.
        add_beside: `(average, role, dtype) -> variable`, of zeros, with the
            shape of `average`.
        copies_statistics: Bool. Whether float weights that no optimizer trains
            are copied, not averaged.
        compensated: Bool. Whether averages carry residuals.

    Returns:
        `Partners`.

    Raises:
        ValueError: If the architectures differ, or the models share a variable.
    """
    check_disjoint(raw, model)
    pairs = tuple((average, w) for w, average in pair_weights(raw, model))
    moving = {id(v) for v in untrained_weights(model)}
    averaged, rounded, mirrored, copied, learned = [], [], [], [], []
    for average, w in pairs:
        average.trainable = False
        if not keras.backend.is_float_dtype(average.dtype):
            copied.append((average, w))
            continue
        if id(average) not in moving:
            learned.append(w)
        elif copies_statistics:
            mirrored.append((average, w))
            continue
        original = average
        if average.dtype in ("float16", "bfloat16"):
            # At a decay of 0.999 a step is smaller than what 16 bits can tell.
            original = add_beside(average, "original", "float32")
            rounded.append((average, original))
        residual = (add_beside(original, "residual", original.dtype),) if compensated else ()
        averaged.append((original, w, *residual))
    penalized = [(average, w) for average, w in pairs if w.regularizer is not None]
    untrained = {id(w) for average, w in pairs if id(average) in moving}
    apart = [
        (average, w)
        for average, w, *_ in [*averaged, *mirrored, *copied]
        # The oldest Keras has no variables that are reduced on reading.
        if id(w) in untrained and getattr(w, "synchronization", None) != "on_read"
    ]
    groups = (averaged, rounded, mirrored, copied, penalized, learned, apart)
    return Partners(raw, pairs, *map(tuple, groups))
