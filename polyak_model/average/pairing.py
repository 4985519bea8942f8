"""Which weight of an average model averages which raw weight, and how."""

import dataclasses
import functools
from typing import Any

import keras

from polyak_model import backend
from polyak_model.average.clone_check import check_disjoint, pair_weights
from polyak_model.backend import keras_internals

AVERAGED, MIRRORED, COPIED = "averaged", "mirrored", "copied"
EXCLUDED, SHARED = "excluded", "shared"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A weight of the average model, its raw weight, and the state of its arithmetic.

    Attributes:
        average: The weight of the average model.
        raw: The raw weight, or its value where replicas agreed on one.
        how: `AVERAGED`; `MIRRORED`, floats that follow by value when the average
            moves; `COPIED`, integers, booleans and seeds, likewise;
            `EXCLUDED`, weights that follow at every step; or `SHARED`, frozen
            weights that are one variable of both models.
        learned: Bool. Whether an optimizer trains the raw weight unless it is
            frozen.
        master: The float32 master copy of an average of 16 bits, or None.
        residual: What rounding took from the average (Kahan), or None.
    """

    average: Any
    raw: Any
    how: str
    learned: bool
    master: Any = None
    residual: Any = None

    @functools.cached_property
    def target(self):
        """The variable that moves: the master copy, or the average itself."""
        return self.average if self.master is None else self.master


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The pairs of a raw model and its average model, in the order of the raw weights."""

    raw_model: keras.Model
    average_model: keras.Model
    pairs: tuple

    @functools.cached_property
    def averaged(self):
        return self._of(AVERAGED)

    @functools.cached_property
    def mirrored(self):
        return self._of(MIRRORED)

    @functools.cached_property
    def copied(self):
        return self._of(COPIED)

    @functools.cached_property
    def excluded(self):
        return self._of(EXCLUDED)

    @functools.cached_property
    def shared(self):
        return self._of(SHARED)

    def _of(self, how):
        return tuple(pair for pair in self.pairs if pair.how == how)

    @functools.cached_property
    def own(self):
        """The pairs of two variables: all that are not shared."""
        return tuple(pair for pair in self.pairs if pair.how != SHARED)

    @property
    def learned(self):
        """The raw weights that an optimizer trains unless they are frozen; none is shared."""
        return [pair.raw for pair in self.own if pair.learned]

    def from_masters(self):
        """Returns `(average, master copy)` of the averages that have one."""
        return [(p.average, p.master) for p in self.averaged if p.master is not None]

    def penalized(self):
        """Returns the averages of raw weights that are trained under a regularizer."""
        return [p.average for p in self.own if p.raw.regularizer and p.raw.trainable]

    def synchronized(self):
        """Returns a pairing whose raw values are equal on every replica.

        Outside training steps each replica mirrors its own raw weights without
        waiting for the others. Hence averages are reduced here, too.
        """
        if backend.replicas() == 1:
            return self
        differing = [pair for pair in self.own if _may_differ_between_replicas(pair)]
        if not differing:
            return self
        averages, raw = zip(*((pair.average, pair.raw) for pair in differing), strict=True)
        values = backend.synchronize([*averages, *raw])
        backend.assign(zip(averages, values[: len(raw)], strict=True))
        common = {id(w): value for w, value in zip(raw, values[len(raw) :], strict=True)}
        pairs = (dataclasses.replace(p, raw=common.get(id(p.raw), p.raw)) for p in self.pairs)
        return dataclasses.replace(self, pairs=tuple(pairs))

    def check_raw(self):
        """Raises `ValueError` if the raw model has gained or lost weights since the pairing."""
        _check_weights(self.raw_model, [pair.raw for pair in self.pairs], "raw")

    def check_average(self):
        """Raises `ValueError` if the average model has gained or lost weights since then."""
        _check_weights(self.average_model, [pair.average for pair in self.pairs], "average")

    def check_frozen(self):
        """Raises `ValueError` if a shared weight is about to be trained."""
        thawed = [pair.raw.path for pair in self.shared if pair.raw.trainable]
        if thawed:
            raise ValueError(
                f"The model '{self.raw_model.name}' was wrapped with share_frozen=True, and its "
                f"averages share the weights that were frozen then. Received: {len(thawed)} of "
                f"them unfrozen, the first '{thawed[0]}', so that training would change the "
                "averages. Wrap the model again after unfreezing, PolyakModel(model.raw_model, "
                "share_frozen=True), or wrap it with share_frozen=False."
            )


def _check_weights(model, paired, role):
    expected, weights = {id(weight) for weight in paired}, model.weights
    gained = [weight.path for weight in weights if id(weight) not in expected]
    if gained or len(weights) != len(expected):
        raise ValueError(
            f"The {role} model '{model.name}' must keep the weights that it had when it was "
            f"wrapped. Expected: {len(expected)} weights. Received: {len(weights)}, of which "
            f"new are {gained[:3]}. Make the change (enable LoRA, quantize, build all layers) "
            "first, then wrap the model; or change a copy for serving, clone_model(model)."
        )


def _may_differ_between_replicas(pair):
    # Optimizers keep what they train equal. The oldest Keras has no variables that are reduced
    # on reading.
    return not pair.learned and getattr(pair.raw, "synchronization", None) != "on_read"


def pair(
    raw_model, average_model, add_beside, copies_statistics, compensated, excluded=(), shared=()
):
    """Pairs the weights of a raw model with those of its average, and freezes the latter.

    Args:
        raw_model: A built `keras.Model`.
        average_model: Its clone.
        add_beside: `(average, role, dtype) -> variable` of zeros with the shape
            of `average`.
        copies_statistics: Bool. Whether float weights that no optimizer trains
            are mirrored instead of averaged.
        compensated: Bool. Whether averages carry residuals.
        excluded: Positions of raw weights that are not averaged.
        shared: Raw weights that the average model may share.

    Returns:
        A `Pairing`.

    Raises:
        ValueError: If the architectures differ, or the models share a variable.
    """
    check_disjoint(raw_model, average_model, shared)
    weights = pair_weights(raw_model, average_model)
    untrained = {id(v) for v in keras_internals.untrained_weights(average_model)}
    pairs = []
    for position, (raw, average) in enumerate(weights):
        learned = id(average) not in untrained
        if average is raw:
            pairs.append(Pair(average, raw, SHARED, learned))
            continue
        average.trainable = False
        backend.place_like(average, raw)
        if position in excluded:
            pairs.append(Pair(average, raw, EXCLUDED, learned))
        elif not keras.backend.is_float_dtype(average.dtype):
            pairs.append(Pair(average, raw, COPIED, learned=False))
        elif copies_statistics and not learned:
            pairs.append(Pair(average, raw, MIRRORED, learned=False))
        else:
            master = residual = None
            if average.dtype in ("float16", "bfloat16"):
                # At a decay of 0.999 a step is smaller than 16 bits can resolve.
                master = add_beside(average, "master", "float32")
            if compensated:
                target = average if master is None else master
                residual = add_beside(target, "residual", target.dtype)
            pairs.append(Pair(average, raw, AVERAGED, learned, master, residual))
    return Pairing(raw_model, average_model, tuple(pairs))
