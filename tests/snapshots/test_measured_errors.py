"""Rebuilt averages of real trainings, against averages that were kept directly."""

import keras
import numpy as np
import pytest

from polyak_model import (
    AverageSnapshots,
    ExponentialAverage,
    PolyakModel,
    PowerAverage,
    UniformAverage,
)
from polyak_model.snapshots import rebuild

width = PowerAverage.from_relative_width
GENERATOR = np.random.default_rng(0)
CENTRES = GENERATOR.normal(size=(5, 10))
LABELS = GENERATOR.integers(0, 5, 1600)
X = (CENTRES[LABELS] + GENERATOR.normal(size=(1600, 10))).astype("float32")
TARGETS = {
    "wider": width(0.15),
    "narrower": width(0.085),
    "exponential": ExponentialAverage.from_half_life(40),
    "window": UniformAverage(start_step=256),
}


def train(rule, folder=None):
    """Trains 400 steps with the same seed each time."""
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [keras.Input((10,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(5, "softmax")]
    )
    model = PolyakModel(inner, average=rule)
    model.compile(keras.optimizers.Adam(0.01), loss="sparse_categorical_crossentropy")
    snapshots = [] if folder is None else [AverageSnapshots(folder)]
    model.fit(X, LABELS, batch_size=8, epochs=2, callbacks=snapshots, verbose=0)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(PowerAverage.pair(), folder), folder


def flat(weights):
    return np.concatenate([np.ravel(weight).astype("float64") for weight in weights])


@pytest.mark.parametrize("rule", TARGETS.values(), ids=TARGETS)
def test_the_measured_error_is_within_three_times_the_one_told(trained, tmp_path, rule):
    model, folder = trained
    direct = train(rule)
    for one, other in zip(
        model.raw_model.get_weights(), direct.raw_model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    direct.average_model.save(tmp_path / "like.keras")
    told = rebuild(folder, rule, tmp_path / "out.keras", tmp_path / "like.keras", max_error=0.2)
    rebuilt = flat(keras.models.load_model(tmp_path / "out.keras").get_weights())
    true = flat(direct.average_model.get_weights())
    distance = np.linalg.norm(true - flat(direct.raw_model.get_weights()))
    measured = np.linalg.norm(rebuilt - true) / distance
    assert told.step == 400
    assert measured < 3 * told.walk_error
    # It is an estimate of the error, not a bound far above it.
    assert measured > told.walk_error / 30
