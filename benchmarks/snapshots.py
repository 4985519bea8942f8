"""Time that AverageSnapshots takes of a training.

    python benchmarks/snapshots.py

Claim: the cost is that of writing at most 33 files and of reading the averages
about a hundred times, whatever the length of the training; no call blocks longer
than one file takes to write. Method: the net, data and epochs of `polyak-model demo`, with
the two averages of `PowerAverage.pair()`; each call of the callback is timed
inside `fit`, so that both times are of the same run.
"""

import argparse
import pathlib
import tempfile
import time

import keras

from polyak_model import AverageSnapshots, PolyakModel, PowerAverage
from polyak_model.cli.demo.experiment import BATCH_SIZE, EPOCHS, build_model
from polyak_model.cli.demo.images import load_images, split


class TimedSnapshots(AverageSnapshots):
    """Records how long each of its calls takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = []

    def _timed(self, method, *args):
        begun = time.perf_counter()
        method(*args)
        self.seconds.append(time.perf_counter() - begun)

    def on_epoch_begin(self, epoch, logs=None):
        self._timed(super().on_epoch_begin, epoch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._timed(super().on_train_batch_end, batch, logs)

    def on_train_end(self, logs=None):
        self._timed(super().on_train_end, logs)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    (x, y), _ = split(*load_images(), 0)
    model = build_model(x.shape[1:], int(y.max()) + 1)
    model = PolyakModel(model, average=PowerAverage.pair())
    with tempfile.TemporaryDirectory() as folder:
        snapshots = TimedSnapshots(folder)
        begun = time.perf_counter()
        model.fit(
            x, y, batch_size=BATCH_SIZE, epochs=options.epochs, callbacks=[snapshots], verbose=0
        )
        total = time.perf_counter() - begun
        files = len(list(pathlib.Path(folder).iterdir()))
    spent = sum(snapshots.seconds)
    print(f"training   {total:.1f} s, {model.average_step} steps")
    print(f"snapshots  {files} files, {spent:.2f} s, {100 * spent / total:.2f} % of the training")
    print(f"longest    {1000 * max(snapshots.seconds):.0f} ms in one call")
    return {"total": total, "spent": spent, "files": files}


if __name__ == "__main__":
    main()
