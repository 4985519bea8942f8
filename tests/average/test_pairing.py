import keras
import pytest
from keras import layers
from models import make_classifier

from polyak_model import PolyakModel, backend
from polyak_model.average.pairing import pair


def make_sorted():
    """Makes a net with a weight of every kind."""
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, kernel_regularizer="l2", name="dense"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5),
            layers.Dense(2, dtype="bfloat16", name="short"),
        ]
    )


def names(raw_weights):
    return [w.path.split("/", 1)[1] for w in raw_weights]


def make_variable(shape, dtype):
    return keras.Variable(keras.ops.zeros(shape, dtype))


STATISTICS = ["norm/moving_mean", "norm/moving_variance"]
LEARNED = ["dense/kernel", "dense/bias", "norm/gamma", "norm/beta", "short/kernel", "short/bias"]


@pytest.mark.parametrize("copies_statistics", [False, True])
def test_each_weight_is_averaged_mirrored_or_copied(copies_statistics):
    raw, model = make_sorted(), make_sorted()
    raw.layers[1].trainable = False
    beside = []

    def add_beside(average, role, dtype):
        beside.append((role, dtype))
        return make_variable(average.shape, dtype)

    pairing = pair(raw, model, add_beside, copies_statistics, compensated=True)
    averaged = names(p.raw for p in pairing.averaged)
    mirrored = names(p.raw for p in pairing.mirrored)
    assert sorted(averaged + mirrored) == sorted(LEARNED + STATISTICS)
    assert mirrored == (STATISTICS if copies_statistics else [])
    assert names(pairing.learned) == LEARNED
    assert names(pairing.penalized()) == ["dense/kernel"]
    assert [master.dtype for _, master in pairing.from_masters()] == ["float32", "float32"]
    assert beside.count(("master", "float32")) == 2
    assert len(pairing.copied) == 0
    assert not any(w.trainable for w in model.weights)


def test_outside_of_replicas_nothing_is_reduced():
    model = PolyakModel(make_classifier())
    pairing = model.shadow.first.pairing
    assert backend.replicas() == 1
    assert pairing.synchronized() is pairing
