"""Overhead of averaging per training step: time, memory, and how the time scales.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --models narrow mlp-10M --jit --json overhead.json
    python benchmarks/overhead.py --models efficientnet --processes 7
    KERAS_BACKEND=jax python benchmarks/overhead.py --models narrow --processes 5
    KERAS_BACKEND=torch python benchmarks/overhead.py --variants PolyakModel AveragedModel
    python benchmarks/overhead.py --memory
    python benchmarks/overhead.py --growth

Each variant trains a separate model on the same batch, from memory. The variants
alternate step by step in one process, in an order shuffled in each round, so that
other load on the machine affects all of them alike. For each, the table shows the
median of its paired differences to the bare model in the same round ± half their
interquartile range; the median relative to the bare step; and as a multiple of the
floor, an in-place `average += c * w` over as many parameters in one buffer, which
alternates with the variants. The first call, which traces and compiles, is timed
separately. On PyTorch the table also shows the median time of the update alone. How
a step is called is documented in `overhead_tensorflow.py`, `overhead_jax.py` and
`overhead_torch.py`, with peers of that backend.

`snapshots` has `AverageSnapshots` as by default, which saves every fourth step of 100
and reads the averages in more at the beginning; `monitor` measures at every step.

With `--steps-per-execution K` a call takes K training steps, and times are per step.
Callbacks, including the host callback and peers, then run once in K steps.

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
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile

import keras
import overhead_charts
import overhead_growth
import overhead_tables
from training_steps import BACKEND, MODELS, TITLE

trainer = importlib.import_module(f"overhead_{BACKEND}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    for name in trainer.PEERS.keys() - trainer.VARIANTS:
        print(f"{name} is not installed and left out", file=sys.stderr)
    if options.growth:
        results = overhead_growth.main(options, trainer.measure, describe(options))
    elif options.memory:
        results = importlib.import_module("overhead_memory").main(options)
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
    variants = trainer.VARIANTS
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--rounds", type=int, help="number of steps of each variant")
    parser.add_argument("--steps-per-execution", type=int, default=1, metavar="K")
    parser.add_argument("--jit", action="store_true", help="compile with XLA, on TensorFlow")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    overhead_growth.add_arguments(parser)
    parser.add_argument("--json", metavar="PATH", help="write all measurements here")
    parser.add_argument("--plot", metavar="PATH", help="write the plot here")
    options = parser.parse_args(arguments)
    if BACKEND != "tensorflow" and (options.jit or options.memory):
        parser.error("--jit and --memory are for TensorFlow. JAX always compiles with XLA.")
    if BACKEND == "torch" and options.steps_per_execution > 1:
        parser.error("on PyTorch, Keras takes one step per execution.")
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
        times[name] = trainer.measure(*MODELS[name], options)
        keras.utils.clear_session()
    title = describe(options)
    print(f"{title}\n")
    rows = [row for name in times for row in overhead_tables.rows(name, times[name])]
    print(overhead_tables.format_rows(overhead_tables.HEADER, rows))
    shares = {name: overhead_tables.shares(own) for name, own in times.items()}
    overhead_charts.draw_extra_time(options.plot, shares, f"{title}: median and quartiles")
    return times


def describe(options):
    """Returns what is measured, for titles."""
    parts = [TITLE]
    if BACKEND == "tensorflow":
        parts.append("XLA" if options.jit else "plain graph")
    if options.steps_per_execution > 1:
        parts.append(f"{options.steps_per_execution} steps per execution")
    if options.processes > 1:
        parts.append(f"{options.processes} processes")
    return ", ".join([*parts, f"{options.rounds} rounds"])


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
    by_model = {name: [run[name] for run in runs] for name in options.models}
    title = describe(options)
    print(f"{title}\n")
    rows = [
        row for name in by_model for row in overhead_tables.rows_of_processes(name, by_model[name])
    ]
    print(overhead_tables.format_rows(overhead_tables.HEADER_OF_PROCESSES, rows))
    ranges = {name: overhead_tables.ranges(own) for name, own in by_model.items()}
    overhead_charts.draw_extra_time(options.plot, ranges, f"{title}: median and range")
    return runs


if __name__ == "__main__":
    main()
