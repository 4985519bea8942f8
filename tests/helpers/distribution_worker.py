"""Trains models on four virtual devices of JAX, bare and wrapped, and prints what was found."""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import keras
import numpy as np
from closed_forms import average
from keras import distribution, layers
from models import Recorder

from polyak_model import ExponentialAverage, PolyakModel
from polyak_model.backend.jax import packing

ROUTES = ("average", "raw", "ensemble")
RULE = ExponentialAverage(0.8)
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(64, 8)).astype("float32")
Y = GENERATOR.integers(0, 4, size=64)


def data_parallel():
    return distribution.DataParallel()


def model_parallel():
    mesh = distribution.DeviceMesh((2, 2), ["batch", "model"], distribution.list_devices())
    layout = distribution.LayoutMap(mesh)
    layout[".*hidden/kernel"] = (None, "model")
    layout[".*hidden/bias"] = ("model",)
    return distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def make(**compilation):
    keras.utils.clear_session()
    distribution.set_distribution(CURRENT)  # Clearing the session drops it.
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(4, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **compilation,
    )
    return model


def fit(model, raw):
    recorder = Recorder(raw)
    history = model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[recorder]).history
    return history, recorder.iterates()


def identical(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def shardings(model):
    """Returns whether each average and residual is spread as its raw weight is."""
    return [
        one.value.sharding.is_equivalent_to(p.raw.value.sharding, len(p.raw.shape))
        for p in model.shadow.first.pairing.pairs
        for one in (p.average, p.residual)
        if one is not None
    ]


def check(folder):
    found = {}
    bare = make()
    bare_history, _ = fit(bare, bare)
    raw = make()
    model = PolyakModel(raw, RULE, report=ROUTES, compensated=True)
    start = raw.get_weights()
    history, iterates = fit(model, raw)
    found["trains as bare"] = history == bare_history and identical(
        bare.get_weights(), raw.get_weights()
    )
    expected = average(RULE, start, iterates)
    received = model.average_model.get_weights()
    found["error of the average"] = max(
        float(np.abs(one - other).max()) for one, other in zip(expected, received, strict=True)
    )
    found["spread as raw"] = all(shardings(model))
    found["is sharded"] = str(model.average_model.layers[0].kernel.value.sharding.spec)
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    alone = raw.evaluate(X, Y, verbose=0, return_dict=True)
    found["routes agree"] = bool(np.isclose(logs["raw_loss"], alone["loss"], rtol=1e-5))
    predicted = [model.predict(X, verbose=0, using=route) for route in ROUTES]
    found["ensemble is the mean"] = bool(
        np.allclose(predicted[2], (predicted[0] + predicted[1]) / 2, atol=1e-6)
    )
    model.save(f"{folder}/model.keras")
    distribution.set_distribution(CURRENT)
    loaded = keras.models.load_model(f"{folder}/model.keras")
    found["loads"] = identical(received, loaded.average_model.get_weights())
    found["loaded is spread as raw"] = all(shardings(loaded))
    for each in (model, loaded):
        each.fit(X, Y, batch_size=16, verbose=0, shuffle=False)
    found["continues"] = identical(
        model.average_model.get_weights(), loaded.average_model.get_weights()
    )
    model.refresh_statistics(X, batch_size=16, verbose=0)
    found["refreshes"] = not identical(
        model.average_model.get_weights(), loaded.average_model.get_weights()
    )
    found["refreshed is spread as raw"] = all(shardings(model))
    distribution.set_distribution(None)
    try:
        PolyakModel(raw)
    except ValueError as error:
        found["refusal"] = str(error)
    packing.FEW = 2
    # A step that was compiled before knows the distribution.
    raw.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(X, Y, batch_size=16, verbose=0)
    found["stays spread"] = all(shardings(model))
    return found


if __name__ == "__main__":
    CURRENT = {"data": data_parallel, "model": model_parallel}[sys.argv[1]]()
    print(json.dumps(check(sys.argv[2])))
