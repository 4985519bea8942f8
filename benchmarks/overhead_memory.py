"""What averaging adds to the memory of training.

    python benchmarks/overhead.py --memory

Claim: at most 1.05 times the parameters' bytes, at rest and at the peak of a step,
and 2.05 times with `compensated=True`.

Each variant trains in a process of its own, one after the other, since memory that a
process has had it seldom gives back. After three steps, six more are measured. Two
things are, each between steps (at rest) and at its highest within a step (peak):

- tensors: what TensorFlow's allocator says is in use. It hands out chunks from a pool
  and counts whole chunks, which may be up to twice as large as what was asked for, so
  that the same tensors may count more in one step than in another; those below
  256 KiB it does not count (TensorFlow 2.21). Not every version of TensorFlow counts.
- resident: the resident set of the process, as Linux tells it (`VmRSS`, and `VmHWM`
  after writing 5 to `/proc/self/clear_refs`, which resets it). It includes what lives
  in NumPy. Where TensorFlow has a pool, the pool keeps what it once had, so that the
  resident set at rest is that at the peak of some earlier step.

The table shows medians over the steps, less those of the bare model, as multiples of
the parameters' bytes, and half the range that differences between single steps span.
For the bare model it shows what it has itself: its resident set includes Python,
Keras and TensorFlow.
"""

import json
import statistics
import subprocess
import sys

import overhead_charts
import tensorflow as tf
from training_steps import MODELS, prepare

from polyak_model.cli.tables import format_table

WARMUP = 3
STEPS = 6
KINDS = ("tensors at rest", "tensors at peak", "resident at rest", "resident at peak")
TARGETS = (1.05, 2.05)


def main(options):
    """Measures all variants, each in a process of its own, prints a table and draws it.

    Returns:
        A dict from a model to one from a variant to what `measure` returns.
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
    print(f"{'XLA' if options.jit else 'plain graph'}, {STEPS} steps, of the parameters' bytes\n")
    cells = [row for model, own in results.items() for row in rows(model, own)]
    print(format_table(["model", "variant", *KINDS], cells, left=2))
    overhead_charts.draw_memory(options.plot, panels(results), TARGETS)
    return results


def measure(model, variant, jit, steps_per_execution):
    """Measures the memory of this process while it trains.

    Returns:
        A dict from each of `KINDS` that can be measured here to a list of bytes,
        an entry per step, and `parameters`, their bytes.
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
    """Forgets the highest memory so far."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    if tensors():
        tf.config.experimental.reset_memory_stats("CPU:0")


def resident():
    """Returns the bytes of the resident set, now and at its highest."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    now, highest = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return {"resident at rest": now, "resident at peak": highest}


def tensors():
    """Returns the bytes of tensors, now and at their highest; nothing where no one counts them."""
    try:
        info = tf.config.experimental.get_memory_info("CPU:0")
    except ValueError:
        return {}
    return {"tensors at rest": info["current"], "tensors at peak": info["peak"]}


def beyond(own, bare, kind):
    """Returns the lowest, the median and the highest difference to the bare model.

    Args:
        own: What `measure` returned of a variant.
        bare: What it returned of the bare model.
        kind: One of `KINDS`.

    Returns:
        A tuple of multiples of the parameters' bytes.
    """
    a, b, unit = own[kind], bare[kind], bare["parameters"]
    middle = statistics.median(a) - statistics.median(b)
    return (min(a) - max(b)) / unit, middle / unit, (max(a) - min(b)) / unit


def rows(model, results):
    """Yields the cells of each variant of a model."""
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
    """Returns for each model and kind of memory what each variant has beyond the bare model."""
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
