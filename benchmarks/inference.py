"""Time of predictions and evaluations through each route, relative to the bare Keras model.

    python benchmarks/inference.py
    python benchmarks/inference.py --models narrow mlp-10M --jit --json inference.json
    KERAS_BACKEND=jax python benchmarks/inference.py

Claims: `predict` and `evaluate` through the average or the raw model take at most
1.02 times as long as with the bare model, and through the ensemble at most 2.05
times. One pass that reports all three routes takes at most 2.1 times as long. The
first call after a change of route takes no longer than other calls.

All calls alternate in one process, in an order shuffled in each round, on the same
data: complete batches in memory, on TensorFlow as a `tf.data.Dataset`. (For arrays, Keras
builds a dataset in each call, which takes longer than a small model.) The first call of each
kind, which traces, is not counted. The table shows the median time, and the median
ratio to the first call of the group in the same round ± half its interquartile range:
in wall-clock time and in processor time of this process, which is more reliable on a
busy machine. `bare again` is a second model like the first; its deviation from 1 is
the measurement error. `Keras use_ema` swaps the averages of its optimizer into the
model and back with `keras.callbacks.SwapEMAWeights`.
"""

import argparse
import json
import statistics
import sys
import time

import keras
import numpy as np
from keras import ops
from training_steps import BACKEND, DECAY, MODELS, ROUTES, TITLE, draw_batches, timed

from polyak_model import PolyakModel
from polyak_model.cli.tables import format_table

TARGETS = {
    "average": 1.02,
    "raw": 1.02,
    "ensemble": 2.05,
    "three routes, one pass": 2.1,
    "average after raw": 1.02,
    "raw after average": 1.02,
}
COLOURS = {
    "bare again": "#bbbbbb",
    "average": "#0072b2",
    "raw": "#d55e00",
    "ensemble": "#009e73",
    "Keras use_ema": "#cc79a7",
    "three routes, one pass": "#e69f00",
    "three routes in turn": "#f0e442",
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = [name for name in MODELS if name != "mlp-100M"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=defaults)
    parser.add_argument("--rounds", type=int, default=20, help="number of calls of each kind")
    parser.add_argument("--batches", type=int, default=16, help="batches per call")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--jit", action="store_true", help="compile with XLA, on TensorFlow")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    parser.add_argument("--json", metavar="PATH", help="write all times in seconds here")
    parser.add_argument("--plot", metavar="PATH", default="inference.png")
    options = parser.parse_args(arguments)
    if BACKEND != "tensorflow" and options.jit:
        parser.error("--jit is for TensorFlow. JAX always compiles with XLA.")
    times = {}
    for name in options.models:
        print(f"{name}: {options.rounds} rounds", file=sys.stderr, flush=True)
        # Without this, JAX would not compile.
        jit = options.jit if BACKEND == "tensorflow" else "auto"
        groups = prepare(MODELS[name][0], options.batches, options.batch_size, jit)
        times[name] = measure(groups, options.rounds, options.seed)
        keras.utils.clear_session()
    graph = {"tensorflow": ", XLA" if options.jit else ", plain graph"}.get(BACKEND, "")
    sizes = f"{options.batches} batches of {options.batch_size}"
    title = f"{TITLE}{graph}, {options.rounds} rounds of calls with {sizes}"
    print(f"{title}\n")
    header = ["model", "call", "route", "median, ms", "ratio", "processor ratio", "target"]
    print(format_table(header, [row for name in times for row in rows(name, times[name])], left=3))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(times, file)
    draw(options.plot, times, title)
    return times


def prepare(make, batches, batch_size, jit):
    """Makes two bare models, a wrapped one, and one whose optimizer averages.

    Returns:
        A dict of groups. Each group is a dict from a name to a pair of functions:
        one to call first, or None, and one to time. The first entry of a group is
        the reference for the others.
    """

    def make_compiled(**kwargs):
        keras.utils.set_random_seed(0)
        model = make()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.SGD(0.1, **kwargs)
        model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=jit)
        return model

    bare, again, swapped = make_compiled(), make_compiled(), make_compiled(use_ema=True)
    routed = PolyakModel(make_compiled(), DECAY, report=ROUTES)
    for model in (bare, again, swapped, routed):
        take_two_steps(model)
    data = draw_data(bare, batches, batch_size)

    def predict(model, **kwargs):
        return lambda: model.predict(data, verbose=0, **kwargs)

    def evaluate(model, **kwargs):
        return lambda: model.evaluate(data, verbose=0, return_dict=True, **kwargs)

    swap = keras.callbacks.SwapEMAWeights()
    swap.set_model(swapped)

    def swapping(call):
        def swap_and_call():
            # As a callback of `predict`, some versions of Keras do not swap back.
            swap.on_test_begin()
            result = call()
            swap.on_test_end()
            return result

        return swap_and_call

    def calls(make_call):
        return {
            "bare": (None, make_call(bare)),
            "bare again": (None, make_call(again)),
            **{route: (None, make_call(routed, using=route)) for route in ROUTES},
            "Keras use_ema": (None, swapping(make_call(swapped))),
        }

    evaluations = [evaluate(routed, using=route) for route in ROUTES]
    average, raw = (predict(routed, using=route) for route in ("average", "raw"))
    return {
        "predict": calls(predict),
        "evaluate": {
            **calls(evaluate),
            "three routes, one pass": (None, evaluate(routed)),
            "three routes in turn": (None, lambda: [call() for call in evaluations]),
        },
        "switch to average": {
            "average after average": (average, average),
            "average after raw": (raw, average),
        },
        "switch to raw": {
            "raw after raw": (raw, raw),
            "raw after average": (average, raw),
        },
    }


def take_two_steps(model):
    """Starts averaging without tracing a training step: uses the weights as gradients."""
    for _ in range(2):
        trained = model.trainable_variables
        model.optimizer.apply([ops.convert_to_tensor(w) for w in trained], trained)
        if isinstance(model, PolyakModel):
            model.update_average()


class Batches(keras.utils.PyDataset):
    """Complete batches, from arrays with an axis of batches in front."""

    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        return tuple(array[index] for array in self.arrays)


def draw_data(model, batches, batch_size):
    """Returns a dataset of random inputs and labels."""
    arrays = draw_batches(*model.inputs, batches, batch_size)
    if BACKEND != "tensorflow":
        return Batches(*arrays)
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays)


def measure(groups, rounds, seed):
    """Times all calls in alternation, in an order shuffled in each round.

    Returns:
        A dict like `groups` with, instead of each pair, a dict of two lists of
        seconds: `clock` and `processor`.
    """
    turns = [(group, name) for group, calls in groups.items() for name in calls]
    times = {
        group: {name: {"clock": [], "processor": []} for name in calls}
        for group, calls in groups.items()
    }
    for group, name in turns:
        groups[group][name][1]()  # The first call traces.
    generator = np.random.default_rng(seed)
    for _ in range(rounds):
        for turn in generator.permutation(len(turns)):
            group, name = turns[turn]
            before, call = groups[group][name]
            if before is not None:
                before()
            begin = time.process_time()
            times[group][name]["clock"].append(timed(call))
            times[group][name]["processor"].append(time.process_time() - begin)
    return times


def ratio(times, reference):
    """Returns the median of the paired ratios and half their interquartile range."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2


def rows(model, times):
    """Yields the table row of each call of a model."""
    for group, calls in times.items():
        reference = next(iter(calls.values()))
        for name, own in calls.items():
            cells = [model, group, name, f"{1e3 * statistics.median(own['clock']):.1f}"]
            for kind in own:
                middle, half = ratio(own[kind], reference[kind])
                cells.append("" if own is reference else f"{middle:.3f} ± {half:.3f}")
            yield [
                *cells,
                f"{TARGETS[name]:.2f}" if name in TARGETS and own is not reference else "",
            ]


def draw(path, times, title):
    """Plots the wall-clock ratios to the bare model, with the targets as black lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2 + 1.5 * len(times)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[2, 3])
    for panel, group in zip(panels, ("predict", "evaluate"), strict=True):
        names = [name for name in next(iter(times.values()))[group] if name != "bare"]
        thickness = 0.8 / len(names)
        for place, name in enumerate(names):
            y = np.arange(len(times)) + (place - (len(names) - 1) / 2) * thickness
            calls = [own[group] for own in times.values()]
            measured = [ratio(own[name]["clock"], own["bare"]["clock"]) for own in calls]
            middles, halves = zip(*measured, strict=True)
            bars = panel.barh(y, middles, thickness, color=COLOURS[name], label=name)
            panel.errorbar(middles, y, xerr=halves, fmt="none", color="#555555", linewidth=0.8)
            for bar in bars if name in TARGETS else ():
                bottom = bar.get_y()
                panel.vlines(TARGETS[name], bottom, bottom + thickness, "black", linewidth=2)
        panel.set_title(group, loc="left", fontweight="bold")
        panel.set_xlabel("time relative to the bare model")
        panel.grid(axis="x", color="#dddddd")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(times)), times)
    panels[0].invert_yaxis()
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
