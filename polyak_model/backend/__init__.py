"""The one place that knows the backend of Keras."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "polyak_model runs on the TensorFlow backend of Keras. Received: the backend "
        f"'{keras.backend.backend()}'. Set the environment variable KERAS_BACKEND=tensorflow "
        "before Keras is imported."
    )

from polyak_model.backend.tensorflow import copying
from polyak_model.backend.tensorflow.generators import unchanged_generators
from polyak_model.backend.tensorflow.strategies import (
    device,
    local_replicas,
    on_each_replica,
    once,
    replicas,
    strategy_at_hand,
    strategy_of,
    strategy_of_optimizer,
    strategy_scope,
    synchronize,
    waits_for_replicas,
)
from polyak_model.backend.tensorflow.trainer import (
    apart,
    assign,
    compiled,
    fingerprint,
    keeps_updates,
    lacks_metrics,
    lift,
    may_skip_steps,
    optimizer_step,
    rehearse,
    runs_eagerly,
    score,
    symbolic,
    traces_for_export,
    when,
)
from polyak_model.backend.tensorflow.update import move, move_compensated

__all__ = [
    "apart",
    "assign",
    "compiled",
    "copying",
    "device",
    "fingerprint",
    "keeps_updates",
    "lacks_metrics",
    "lift",
    "local_replicas",
    "may_skip_steps",
    "move",
    "move_compensated",
    "on_each_replica",
    "once",
    "optimizer_step",
    "rehearse",
    "replicas",
    "runs_eagerly",
    "score",
    "strategy_at_hand",
    "strategy_of",
    "strategy_of_optimizer",
    "strategy_scope",
    "symbolic",
    "synchronize",
    "traces_for_export",
    "unchanged_generators",
    "waits_for_replicas",
    "when",
]
