"""Time that training waits for an `AverageCheckpoint`, relative to copying as many bytes.

    python benchmarks/checkpoints.py

Method: `fit` of a dense net with a checkpoint after each epoch; the time of each call
of the callback, for which training waits, and the time until the thread has written
the file. In turns with it, a copy of this file is made and flushed to the disk, and
Keras writes the same model with `model.save`, which does not flush it. Medians over
the epochs, without the first.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import tempfile

import keras
import numpy as np
from training_steps import make_mlp, timed

from polyak_model import AverageCheckpoint, PolyakModel
from polyak_model.cli.tables import print_table

WAITS, WRITTEN = "training waits", "file is written"


class Timed(keras.callbacks.Callback):
    """Times another callback at the end of each epoch, and a copy of what it writes."""

    def __init__(self, checkpoint, path, seconds):
        super().__init__()
        self.checkpoint, self.path, self.seconds = checkpoint, path, seconds

    def set_model(self, model):
        super().set_model(model)
        self.checkpoint.set_model(model)

    def on_train_begin(self, logs=None):
        self.checkpoint.on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self.checkpoint.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None):
        model = self.model.average_model
        keras_path = self.path.with_name("keras.keras")
        waited = timed(lambda: self.checkpoint.on_epoch_end(epoch, logs))
        written = waited + timed(self.model.shadow.background.wait)
        self.seconds[WAITS].append(waited)
        self.seconds[WRITTEN].append(written)
        self.seconds["copy, flushed"].append(timed(lambda: copy(self.path, flush=True)))
        self.seconds["copy"].append(timed(lambda: copy(self.path, flush=False)))
        self.seconds["model.save of Keras"].append(timed(lambda: model.save(keras_path)))


def copy(path, flush):
    target = path.with_name("copy.bin")
    shutil.copyfile(path, target)
    if flush:
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1985, help="of the net; 1985: 100 MB")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    model = PolyakModel(make_mlp(options.width))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.zeros((32, 784), "float32"), np.zeros(32, "int32")
    names = ("copy, flushed", "copy", "model.save of Keras", WAITS, WRITTEN)
    rows = []
    for ending in (".keras", ".weights.h5"):
        seconds = {name: [] for name in names}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"average{ending}")
            timer = Timed(AverageCheckpoint(path), path, seconds)
            model.fit(x, y, epochs=options.epochs, callbacks=[timer], verbose=0)
        first = statistics.median(seconds["copy, flushed"][1:])
        for name, values in seconds.items():
            middle = statistics.median(values[1:])
            spread = f"{1000 * min(values[1:]):.0f} to {1000 * max(values[1:]):.0f}"
            rows.append([ending, name, f"{1000 * middle:.0f}", spread, f"{middle / first:.2f}"])
    print_table(["file", "", "ms", "range", "/ copy, flushed"], rows, left=2)
    return rows


if __name__ == "__main__":
    main()
