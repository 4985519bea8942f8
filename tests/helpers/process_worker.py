"""One of two JAX processes that train a model together, and what it finds, as JSON.

Usage: process_worker.py RANK ADDRESS FOLDER STAGE

The stage "train" trains without interruption, then once more until both processes are killed in
the middle of an epoch. The stage "restart" finishes what was killed.
"""

import json
import os
import pathlib
import sys

import keras
import numpy as np
from closed_forms import average
from keras import distribution, layers

from polyak_model import AverageCheckpoint, AverageSnapshots, ExponentialAverage, PolyakModel
from polyak_model.backend import fetch
from polyak_model.backend.jax import processes

RULE = ExponentialAverage(0.8)
ROUTES = ("average", "raw", "ensemble")
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(64, 8)).astype("float32")
Y = GENERATOR.integers(0, 4, size=64)
EPOCHS = 4


def spread_weights():
    mesh = distribution.DeviceMesh((1, 2), ["batch", "model"], distribution.list_devices())
    layout = distribution.LayoutMap(mesh)
    layout[".*(hidden|output)/kernel"] = (None, "model")
    layout[".*(hidden|output)/bias"] = ("model",)
    return distribution.ModelParallel(
        layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
    )


def make():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(4, activation="softmax", name="output"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    return model


def values(variables):
    return [fetch(variable) for variable in variables]


def identical(ones, others):
    return len(ones) == len(others) and all(map(np.array_equal, ones, others))


class Iterates(keras.callbacks.Callback):
    def __init__(self, raw):
        super().__init__()
        self.raw, self.found = raw, []

    def on_train_batch_end(self, batch, logs=None):
        assert self.model  # It writes the state of `fit` to the variables.
        self.found.append(values(self.raw.weights))


class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.average_step == 10:
            os._exit(0)


def fit(model, *callbacks, epochs=EPOCHS):
    data = {"validation_data": (X, Y), "batch_size": 16, "shuffle": False}
    return model.fit(X, Y, epochs=epochs, verbose=0, callbacks=[*callbacks], **data).history


def wrap():
    return PolyakModel(make(), RULE, report=ROUTES, compensated=True)


def callbacks(folder):
    return [
        keras.callbacks.BackupAndRestore(folder / "backup", double_checkpoint=True),
        AverageCheckpoint(folder / "best.keras", save_best_only=True),
        AverageCheckpoint(folder / "{epoch}.weights.h5", contents="both", keep_last=1),
        AverageSnapshots(folder / "snapshots", every=8),
    ]


def message(function):
    try:
        function()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def compare_with_bare(found):
    bare, model = make(), wrap()
    recorders = Iterates(bare), Iterates(model.raw_model)
    start = values(bare.weights)
    logs = fit(bare, recorders[0], epochs=1), fit(model, recorders[1], epochs=1)
    found["trains as bare"] = all(map(identical, *(each.found for each in recorders)))
    found["logs as bare"] = logs[0]["loss"] == logs[1]["loss"] and np.allclose(
        logs[0]["val_loss"], logs[1]["val_raw_loss"], rtol=1e-6
    )
    expected = average(RULE, start, recorders[1].found)
    received = values(model.average_model.weights)
    found["error of the average"] = max(
        float(np.abs(one - other).max()) for one, other in zip(expected, received, strict=True)
    )


def train(rank, folder):
    found = {}
    compare_with_bare(found)
    model = wrap()
    own_run = model.shadow.run
    history = fit(model, *callbacks(folder / "whole"))
    found["history"] = history
    found["run is its own"] = model.shadow.run == own_run
    found["run"] = model.shadow.run
    found["sharding"] = str(model.average_model.get_layer("hidden").kernel.value.sharding.spec)
    found["routes"] = model.evaluate(X, Y, batch_size=16, verbose=0, return_dict=True)
    found["alone"] = {
        route: model.evaluate(X, Y, batch_size=16, verbose=0, return_dict=True, using=route)["loss"]
        for route in ROUTES
    }
    model.save(folder / "model.keras")
    loaded = keras.models.load_model(folder / "model.keras")
    found["loads"] = identical(values(model.variables), values(loaded.variables))
    found["refusal of a folder"] = message(lambda: model.save(folder / "missing" / "model.keras"))
    np.savez(folder / f"averages-{rank}.npz", *values(model.variables))
    print(json.dumps(found), flush=True)
    fit(wrap(), *callbacks(folder / "killed"), Kill())


def restart(rank, folder):
    found = {}
    model = wrap()
    fit(model, *callbacks(folder / "killed"))
    with np.load(folder / f"averages-{rank}.npz") as whole:
        found["continues"] = identical([*whole.values()], values(model.variables))
    found["best"] = keras.models.load_model(folder / "killed/best.keras").count_params()
    distribution.set_distribution(distribution.DataParallel(auto_shard_dataset=False))
    compare_with_bare(found)
    processes._LONGEST_DELAY = 1000
    if rank == 0:
        found["refusal to save alone"] = message(lambda: model.save(folder / "alone.keras"))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    rank, address, folder, stage = sys.argv[1:]
    distribution.initialize(address, 2, int(rank))
    distribution.set_distribution(spread_weights())
    {"train": train, "restart": restart}[stage](int(rank), pathlib.Path(folder))
