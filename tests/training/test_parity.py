"""Parity with averages that others wrote, on one trajectory of weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import compile_classifier, make_classifier

from polyak_model import ExponentialAverage, PolyakModel


def assert_close(ours, theirs):
    """Compares to eight float32 roundings; they round `d * average + (1 - d) * weight`."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        scale = np.finfo("float32").eps * np.abs(other.numpy()).max()
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=8 * scale)


@pytest.mark.parametrize("num_updates", [False, True])
def test_the_average_is_that_of_tensorflow(num_updates):
    decay = 0.95
    inner = make_classifier()
    model = PolyakModel(inner, ExponentialAverage(decay, warmup=num_updates, debias=False))
    theirs = [tf.Variable(weight) for weight in inner.get_weights()]
    updates = tf.Variable(0)
    reference = tf.train.ExponentialMovingAverage(decay, updates if num_updates else None)
    reference.apply(theirs)  # Their average begins with the values that it first sees.
    generator = np.random.default_rng(0)
    for update in range(60):
        noise = [generator.normal(size=w.shape).astype("float32") for w in inner.weights]
        inner.set_weights([w + n for w, n in zip(inner.get_weights(), noise, strict=True)])
        model.update_average()
        for variable, weight in zip(theirs, inner.weights, strict=True):
            variable.assign(weight.numpy())
        updates.assign(update)
        reference.apply(theirs)
    assert_close(model.average_model.weights, [reference.average(v) for v in theirs])


# Keras rounds the momentum to float32 before it takes it from 1; ours is given the same number.
@pytest.mark.parametrize(
    ("momentum", "mode"),
    [(0.5, "graph"), *((float(np.float32(0.99)), mode) for mode in ("eager", "graph", "xla"))],
    indirect=["mode"],
)
def test_the_biased_average_is_that_of_keras(momentum, mode, batches):
    bare = make_classifier()
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=momentum)
    compile_classifier(bare, optimizer, **mode)
    inner = compile_classifier(make_classifier(), keras.optimizers.SGD(0.1), **mode)
    # Theirs begins with the first iterate.
    model = PolyakModel(inner, ExponentialAverage(momentum, debias=False, start_step=1))
    for each in (bare, model):
        keras.utils.set_random_seed(3)
        each.fit(*batches, batch_size=4, epochs=2, verbose=0)
    pairs = zip(model.average_model.weights, inner.weights, strict=True)
    ours = [average for average, weight in pairs if weight.trainable]
    assert_close(ours, optimizer._model_variables_moving_average)
