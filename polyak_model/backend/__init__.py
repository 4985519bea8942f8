"""The one place that knows the backend of Keras."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "polyak_model runs on the TensorFlow backend of Keras. Received: the backend "
        f"'{keras.backend.backend()}'. Set the environment variable KERAS_BACKEND=tensorflow "
        "before Keras is imported."
    )

from polyak_model.backend.tensorflow import (
    assign,
    device,
    fingerprint,
    keeps_updates,
    lift,
    may_skip_steps,
    move,
    move_compensated,
    optimizer_step,
    runs_eagerly,
    score,
    symbolic,
    when,
)

__all__ = [
    "assign",
    "device",
    "fingerprint",
    "keeps_updates",
    "lift",
    "may_skip_steps",
    "move",
    "move_compensated",
    "optimizer_step",
    "runs_eagerly",
    "score",
    "symbolic",
    "when",
]
