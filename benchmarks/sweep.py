"""Time of a sweep over lengths, relative to evaluating the model and reading the snapshots.

    python benchmarks/sweep.py

A sweep of 8 lengths is compared with what it should take at most: 8 evaluations, and
reading the snapshots 3 times. Method: snapshots of a dense net with random weights; the
sweep, one `evaluate` on the same data, and reading every tensor of every snapshot with
h5py alternate, after a first round that does not count; medians.
"""

import argparse
import pathlib
import statistics
import tempfile

import h5py
import keras
import numpy as np
from averaging_files import read
from training_steps import make_mlp, timed

from polyak_model import AverageSnapshots, PolyakModel, PowerAverage, snapshots
from polyak_model.cli.tables import print_table

WIDTHS = (0.03, 0.04, 0.05, 0.07, 0.10, 0.14, 0.17, 0.20)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1985, help="of the net; 1985: 100 MB")
    parser.add_argument("--steps", type=int, default=32, help="training steps")
    parser.add_argument("--examples", type=int, default=1000, help="held-out examples")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(pathlib.Path(folder), options)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    limit = len(WIDTHS) * middle["one evaluation"] + 3 * middle["reading the snapshots"]
    rows = [
        [name, f"{middle[name]:.2f}", f"{min(values):.2f} to {max(values):.2f}"]
        for name, values in seconds.items()
    ]
    rows.append(["8 evaluations + 3 readings", f"{limit:.2f}", ""])
    print_table(["", "seconds", "range"], rows)
    print(f"sweep / limit: {middle['sweep'] / limit:.2f}")
    return seconds


def measure(folder, options):
    """Returns a dict from what was timed to a list of seconds."""
    keras.utils.set_random_seed(0)
    model = PolyakModel(make_mlp(options.width), average=PowerAverage.pair())
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    generator = np.random.default_rng(0)
    x = generator.random((options.examples, 784), "float32")
    y = generator.integers(0, 10, options.examples)
    saving = AverageSnapshots(folder / "snapshots")
    model.fit(x[:32], y[:32], epochs=options.steps, batch_size=32, callbacks=[saving], verbose=0)
    like = folder / "like.keras"
    model.average_model.compile(loss=model.loss)
    model.average_model.save(like)
    paths = sorted((folder / "snapshots").iterdir())
    print(f"{len(paths)} snapshots, {sum(p.stat().st_size for p in paths) / 1e9:.2f} GB in all")
    rules = [PowerAverage.from_relative_width(width) for width in WIDTHS]

    def sweep():
        snapshots.sweep(folder / "snapshots", rules, (x, y), "loss", like=like, max_error=1.0)

    def read_all():
        for path in paths:
            with h5py.File(path) as file:
                file.visititems(read)

    work = {
        "one evaluation": lambda: model.average_model.evaluate(x, y, verbose=0),
        "reading the snapshots": read_all,
        "sweep": sweep,
    }
    seconds = {name: [] for name in work}
    for _ in range(options.rounds + 1):
        for name, function in work.items():
            seconds[name].append(timed(function))
    return {name: values[1:] for name, values in seconds.items()}


if __name__ == "__main__":
    main()
