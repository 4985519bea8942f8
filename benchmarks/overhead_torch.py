"""Overhead of averaging per training step on PyTorch, beside PyTorch's own average.

    KERAS_BACKEND=torch python benchmarks/overhead_torch.py
    KERAS_BACKEND=torch python benchmarks/overhead_torch.py --models narrow --json overhead.json

Each variant trains a separate model on the same batch, step by step in turns, in an
order shuffled in each round. `AveragedModel` is `torch.optim.swa_utils.AveragedModel`
with its exponential average by foreach calls, over a list of the parameters, which is
its fastest form. For each variant, the table shows

- extra: the median of its paired differences to the bare model in the same round ± half
  their interquartile range;
- alone: the median time of the update by itself, timed likewise in turns;
- floor: that median as a multiple of an in-place `average += c * w` over as many
  parameters in one buffer, which moves 12 bytes for each and alternates with the rest.
"""

import argparse
import json
import statistics
import sys

import keras
import numpy as np
import torch
from training_steps import DECAY, MODELS, take_turns

from polyak_model import PolyakModel
from polyak_model.cli.tables import format_table

DECAYS = (DECAY, 0.99, 0.9999)
VARIANTS = {
    "bare": 0,
    "AveragedModel": 0,
    "PolyakModel": 1,
    "two averages": 2,
    "three averages": 3,
}


def main(arguments=None):
    options = parse(arguments)
    times = {}
    for name in options.models:
        print(f"{name}: {len(VARIANTS)} variants", file=sys.stderr, flush=True)
        times[name] = measure(*MODELS[name], options.rounds, options.seed)
        keras.utils.clear_session()
    print(f"PyTorch {torch.__version__}, {options.rounds} rounds\n")
    header = ["model", "variant", "extra, ms", "/ bare", "alone, ms", "/ floor"]
    print(format_table(header, [row for name in times for row in rows(name, times[name])], left=2))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(times, file)
    return times


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["narrow", "mlp-10M"])
    parser.add_argument("--rounds", type=int, default=100, help="number of steps of each variant")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    parser.add_argument("--json", metavar="PATH", help="write all measurements here")
    return parser.parse_args(arguments)


def measure(make, batch_size, rounds, seed):
    """Times the steps, and the updates alone, of all variants of a model in alternation.

    Returns:
        A dict with `step` and `alone`, each a dict from each variant to a dict of
        `first`, the seconds of the first call, and `steps`, a list of seconds.
        `alone` has `floor`, too.
    """
    prepared = {name: prepare(name, make, batch_size) for name in VARIANTS}
    updates = {name: waiting(update) for name, (_, update) in prepared.items() if name != "bare"}
    average, w = (torch.full((make().count_params(),), value) for value in (0.0, 1.0))
    updates["floor"] = waiting(lambda: average.add_(w, alpha=1 - DECAY))
    return {
        "step": take_turns({name: step for name, (step, _) in prepared.items()}, rounds, seed),
        "alone": take_turns(updates, rounds, seed),
    }


def prepare(name, make, batch_size):
    """Returns two functions: a training step as in `fit`, averages included, and their update."""
    keras.utils.set_random_seed(0)
    model = inner = make()
    if VARIANTS[name]:
        averages = {f"average_{i}": decay for i, decay in enumerate(DECAYS[: VARIANTS[name]])}
        model = PolyakModel(inner, averages)
    model.compile(
        keras.optimizers.SGD(1e-4), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    generator = np.random.default_rng(0)
    x = generator.random((batch_size, *inner.inputs[0].shape[1:]), dtype="float32")
    batch = tuple(map(torch.tensor, (x, generator.integers(0, 10, batch_size))))
    model.make_train_function()
    update = model.update_average if model is not inner else lambda: None
    if name == "AveragedModel":
        swa = torch.optim.swa_utils
        raw = torch.nn.ParameterList([weight.value for weight in inner.weights])
        peer = swa.AveragedModel(raw, multi_avg_fn=swa.get_ema_multi_avg_fn(DECAY))

        def update():
            peer.update_parameters(raw)

    def step():
        model.train_function([batch])
        if model is inner:
            update()

    return waiting(step), update


def waiting(function):
    """Returns a function that waits until an accelerator, if there is one, has done its work."""

    def wait():
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return wait


def quartiles_of_extra(steps, name):
    """Returns the quartiles of the paired differences to the bare model, in seconds."""
    pairs = zip(steps[name]["steps"], steps["bare"]["steps"], strict=True)
    return statistics.quantiles([own - bare for own, bare in pairs], n=4)


def rows(model, times):
    """Yields the table row of each variant of a model."""
    bare = statistics.median(times["step"]["bare"]["steps"])
    floor = statistics.median(times["alone"]["floor"]["steps"])
    yield [model, "bare", f"({1e3 * bare:.2f})", "1.000", "", ""]
    for name in times["alone"]:
        low, alone, high = statistics.quantiles(times["alone"][name]["steps"], n=4)
        cells = [f"{1e3 * alone:.2f} ± {1e3 * (high - low) / 2:.2f}", f"{alone / floor:.2f}"]
        extra = ["", ""]
        if name != "floor":
            low, middle, high = quartiles_of_extra(times["step"], name)
            extra = [f"{1e3 * middle:.2f} ± {1e3 * (high - low) / 2:.2f}", f"{middle / bare:.3f}"]
        yield [model, name, *extra, *cells]


if __name__ == "__main__":
    main()
