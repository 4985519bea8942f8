"""Overhead of averaging per training step: time, memory, and how the time scales.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --models narrow mlp-10M --jit --json overhead.json
    python benchmarks/overhead.py --models efficientnet --processes 7
    python benchmarks/overhead.py --memory
    python benchmarks/overhead.py --growth

Each variant trains a separate model on the same batch, from memory. The variants
alternate step by step in one process, in an order shuffled in each round, so that
other load on the machine affects all of them alike. For each, the table shows the
median of its paired differences to the bare model in the same round ± half their
interquartile range; the median relative to the bare step; and as a multiple of the
floor, an in-place `average += c * w` over as many parameters in one buffer, which
alternates with the variants. The first call, which traces and compiles, is timed
separately.

With `--steps-per-execution K` a call takes K training steps, and times are per step.
Callbacks, including the host callback, then run once in K steps.

`--processes N` repeats all of this in N fresh processes, one after the other, and
shows the median and the range over processes of the step relative to the bare one.
Memory layout and core placement shift all rounds of a process together, which the
spread within a process does not show.

`--memory` and `--growth` are documented in `overhead_memory.py` and
`overhead_growth.py`.

Keras's `SwapEMAWeights` is not a separate variant: it swaps weights around tests,
predictions and, optionally, epochs. Its training step is that of `use_ema`.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import keras
import overhead_charts
import overhead_growth
import overhead_memory
from training_steps import MODELS, VARIANTS, prepare, prepare_floor, take_turns, timed

from polyak_model.cli.tables import format_table

__all__ = ["MODELS", "VARIANTS", "main", "prepare", "timed"]


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.growth:
        results = overhead_growth.main(options)
    elif options.memory:
        results = overhead_memory.main(options)
    elif options.processes > 1:
        results = repeat_in_processes(arguments, options)
    else:
        results = run_in_turns(options)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file)
    return results


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="measure memory instead of time")
    what.add_argument("--growth", action="store_true", help="fit how the extra time scales")
    what.add_argument("--processes", type=int, default=1, help="number of fresh processes")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, help="number of steps of each variant")
    parser.add_argument("--steps-per-execution", type=int, default=1, metavar="K")
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    overhead_growth.add_arguments(parser)
    parser.add_argument("--json", metavar="PATH", help="write all measurements here")
    parser.add_argument("--plot", metavar="PATH", help="write the plot here")
    options = parser.parse_args(arguments)
    kind = "_growth" if options.growth else "_memory" if options.memory else ""
    small = [name for name in MODELS if name != "mlp-100M"]
    options.models = options.models or (["mlp-100M"] if options.memory else small)
    options.variants = list(dict.fromkeys(["bare", *options.variants]))
    options.rounds = options.rounds or (30 if options.growth else 100)
    options.plot = options.plot or f"overhead{kind}.png"
    return options


def run_in_turns(options):
    """Times all variants of all models in this process; prints a table and plots it."""
    times = {}
    for name in options.models:
        print(f"{name}: {len(options.variants)} variants", file=sys.stderr, flush=True)
        times[name] = measure(*MODELS[name], options)
        keras.utils.clear_session()
    print(f"{describe(options)}, {options.rounds} rounds\n")
    header = ["model", "variant", "extra, ms", "/ bare", "/ floor", "first call, s", "/ bare"]
    print(format_table(header, [row for name in times for row in rows(name, times[name])], left=2))
    overhead_charts.draw_extra_time(
        options.plot, {name: shares(own) for name, own in times.items()}
    )
    return times


def describe(options):
    graph = "XLA" if options.jit else "plain graph"
    return f"{graph}, {options.steps_per_execution} steps per execution"


def measure(make, batch_size, options):
    """Times the steps of all variants of a model in alternation.

    Returns:
        A dict from each variant, and `floor`, to a dict of `first`, the seconds of
        the first call, and `steps`, a list of seconds per training step.
    """
    k = options.steps_per_execution
    steps = {name: prepare(name, make, batch_size, options.jit, k) for name in options.variants}
    steps["floor"] = prepare_floor(make().count_params())
    times = take_turns(steps, options.rounds, options.seed)
    for name in options.variants:
        times[name]["steps"] = [seconds / k for seconds in times[name]["steps"]]
    return times


def quartiles_of_extra(times, name):
    """Returns the quartiles of the paired differences to the bare model, in seconds."""
    pairs = zip(times[name]["steps"], times["bare"]["steps"], strict=True)
    return statistics.quantiles([own - bare for own, bare in pairs], n=4)


def rows(model, times):
    """Yields the table row of each variant of a model."""
    floor, bare = (statistics.median(times[name]["steps"]) for name in ("floor", "bare"))
    bare_first = times["bare"]["first"]
    for name, own in times.items():
        first = [f"{own['first']:.2f}", f"{own['first'] / bare_first:.2f}"]
        if name in ("bare", "floor"):
            middle = statistics.median(own["steps"])
            cell = f"({1e3 * middle:.2f})"
        else:
            low, middle, high = quartiles_of_extra(times, name)
            cell = f"{1e3 * middle:.2f} ± {1e3 * (high - low) / 2:.2f}"
        yield [model, name, cell, f"{middle / bare:.3f}", f"{middle / floor:.2f}", *first]


def shares(times):
    """Returns quartiles of the extra time of each variant, and the floor, per bare step."""
    bare, floor = (statistics.median(times[name]["steps"]) for name in ("bare", "floor"))
    extra = {
        name: tuple(quartile / bare for quartile in quartiles_of_extra(times, name))
        for name in times
        if name not in ("bare", "floor")
    }
    return {**extra, "floor": (floor / bare,) * 3}


def repeat_in_processes(arguments, options):
    """Runs this script in fresh processes; prints a table of their medians and plots it.

    Returns:
        A list of the results of `run_in_turns` in each process.
    """
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path, picture = (pathlib.Path(folder, name) for name in ("times.json", "times.png"))
        for n in range(options.processes):
            print(f"process {n + 1} of {options.processes}", file=sys.stderr, flush=True)
            own = ["--processes", "1", "--seed", str(options.seed + n), "--json", str(path)]
            command = [sys.executable, __file__, *arguments, *own, "--plot", str(picture)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            runs.append(json.loads(path.read_text(encoding="utf-8")))
    ranges = {name: across([shares(run[name]) for run in runs]) for name in options.models}
    print(f"{describe(options)}, {options.processes} processes of {options.rounds} rounds\n")
    header = ["model", "variant", "step, bare = 1", "lowest", "highest", "first call"]
    table = [
        row
        for name in options.models
        for row in ratios(name, ranges[name], first_calls([run[name] for run in runs]))
    ]
    print(format_table(header, table, left=2))
    overhead_charts.draw_extra_time(options.plot, ranges)
    return runs


def across(processes):
    """Returns the lowest, median and highest share of each variant over processes."""
    middles = {name: [own[name][1] for own in processes] for name in processes[0]}
    return {name: (min(m), statistics.median(m), max(m)) for name, m in middles.items()}


def first_calls(processes):
    """Returns the median first call of each variant relative to the bare one."""
    return {
        name: statistics.median(own[name]["first"] / own["bare"]["first"] for own in processes)
        for name in processes[0]
    }


def ratios(model, ranges, first):
    """Yields the table row of each variant of a model, relative to the bare model."""
    for name, (low, middle, high) in ranges.items():
        # The floor is not a training step: show its own time.
        begin = 0 if name == "floor" else 1
        cells = [f"{begin + share:.3f}" for share in (middle, low, high)]
        if name == "floor":
            yield [model, name, *(f"({cell})" for cell in cells), ""]
        else:
            yield [model, name, *cells, f"{first[name]:.2f}"]


if __name__ == "__main__":
    main()
