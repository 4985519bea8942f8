"""Memory overhead of averaging.

    python benchmarks/overhead.py --memory

Claim: at most 1.05 times the parameters' bytes, at rest and at the peak of a step,
and 2.05 times with `compensated=True`.

Each variant trains in a new process, one after the other, since a process seldom
returns memory. After three steps, six more are measured, between steps (at rest) and
at the maximum within a step (peak):

- tensors: the bytes in use according to TensorFlow's allocator. It allocates chunks
  from a pool and counts whole chunks, which can be twice as large as requested, so the
  same tensors can count more in one step than in another. It does not count chunks
  below 256 KiB (TensorFlow 2.21). Not every version of TensorFlow counts.
- resident: the resident set of the process according to Linux (`VmRSS`, and `VmHWM`
  after a reset by writing 5 to `/proc/self/clear_refs`). It includes NumPy arrays. A
  TensorFlow pool keeps its memory, so the resident set at rest is that at the peak of
  some earlier step.

The table shows medians over the steps minus those of the bare model, as multiples of
the parameters' bytes, ± half the range of differences between single steps. For the
bare model it shows the absolute value; its resident set includes Python, Keras and
TensorFlow.
"""

import json
import statistics
import subprocess
import sys

import overhead_charts
import tensorflow as tf
from overhead_tensorflow import prepare
from training_steps import MODELS

from polyak_model.cli.tables import format_table

WARMUP = 3
STEPS = 6
KINDS = ("tensors at rest", "tensors at peak", "resident at rest", "resident at peak")
TARGETS = (1.05, 2.05)


def main(options):
    """Measures each variant in a new process; prints a table and plots it.

    Returns:
        A dict from a model to a dict from a variant to the result of `measure`.
    """
    results = {}
    for model in options.models:
        results[model] = {}
        for variant in options.variants:
            print(f"{model}: {variant}", file=sys.stderr, flush=True)
            settings = [model, variant, options.jit, options.steps_per_execution]
            command = [sys.executable, __file__, json.dumps(settings)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[model][variant] = json.loads(output.splitlines()[-1])
    print(f"{'XLA' if options.jit else 'plain graph'}, {STEPS} steps, per parameter byte\n")
    cells = [row for model, own in results.items() for row in rows(model, own)]
    print(format_table(["model", "variant", *KINDS], cells, left=2))
    overhead_charts.draw_memory(options.plot, panels(results), TARGETS)
    return results


def measure(model, variant, jit, steps_per_execution):
    """Measures the memory of this process while it trains.

    Returns:
        A dict from each of `KINDS` that can be measured here to a list of bytes,
        one per step, and from `parameters` to their bytes.
    """
    make, batch_size = MODELS[model]
    step = prepare(variant, make, batch_size, jit, steps_per_execution)
    for _ in range(WARMUP):
        step()
    readings = []
    for _ in range(STEPS):
        reset_peaks()
        step()
        readings.append({**resident(), **tensors()})
    columns = {kind: [own[kind] for own in readings] for kind in KINDS if kind in readings[0]}
    return {**columns, "parameters": 4 * make().count_params()}


def reset_peaks():
    """Resets the peaks."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    if tensors():
        tf.config.experimental.reset_memory_stats("CPU:0")


def resident():
    """Returns the current and the peak bytes of the resident set."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    now, highest = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return {"resident at rest": now, "resident at peak": highest}


def tensors():
    """Returns the current and the peak bytes of tensors, or {} if TensorFlow does not count."""
    try:
        info = tf.config.experimental.get_memory_info("CPU:0")
    except ValueError:
        return {}
    return {"tensors at rest": info["current"], "tensors at peak": info["peak"]}


def beyond(own, bare, kind):
    """Returns the lowest, the median and the highest difference to the bare model.

    Args:
        own: Result of `measure` for a variant.
        bare: Result of `measure` for the bare model.
        kind: One of `KINDS`.

    Returns:
        A tuple of multiples of the parameters' bytes.
    """
    a, b, unit = own[kind], bare[kind], bare["parameters"]
    middle = statistics.median(a) - statistics.median(b)
    return (min(a) - max(b)) / unit, middle / unit, (max(a) - min(b)) / unit


def rows(model, results):
    """Yields the table row of each variant of a model."""
    bare = results["bare"]
    for variant, own in results.items():
        cells = []
        for kind in KINDS:
            if kind not in own:
                cells.append("-")
            elif variant == "bare":
                cells.append(f"({statistics.median(own[kind]) / own['parameters']:.2f})")
            else:
                low, middle, high = beyond(own, bare, kind)
                cells.append(f"{middle:.2f} ± {(high - low) / 2:.2f}")
        yield [model, variant, *cells]


def panels(results):
    """Returns the overhead of each variant for each model and kind of memory."""
    found = {}
    for model, own in results.items():
        variants = {name: one for name, one in own.items() if name != "bare"}
        for kind in KINDS:
            if kind in own["bare"]:
                title = kind if len(results) == 1 else f"{model}, {kind}"
                found[title] = {n: beyond(one, own["bare"], kind) for n, one in variants.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
