"""Time until the first training step is done, of bare and wrapped models.

    python benchmarks/first_step.py

Claim: on TensorFlow `fit` of a wrapped model compiles its step in less time than that of
the bare model, because it is traced once instead of twice. Method: `fit` on one batch, in
a fresh process for each variant, in turns; CPU seconds of the process, which depend less
on what else the machine does. Making, compiling and wrapping the model are not included.
"""

import argparse
import statistics
import subprocess
import sys
import time

from training_steps import MODELS, VARIANTS

from polyak_model.cli.tables import print_table

SHOWN = ("bare", "PolyakModel", "three averages", "Keras use_ema")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["transformer", "efficientnet"]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*SHOWN])
    parser.add_argument("--processes", type=int, default=5, help="of each variant")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(measure(*options.one))
        return
    rows = []
    for model in options.models:
        seconds = {variant: [] for variant in options.variants}
        for _ in range(options.processes):
            for variant in seconds:
                seconds[variant].append(run(model, variant))
        middle = {variant: statistics.median(values) for variant, values in seconds.items()}
        for variant, values in seconds.items():
            spread = f"{min(values):.2f} to {max(values):.2f}"
            ratio = middle[variant] / middle[options.variants[0]]
            rows.append([model, variant, f"{middle[variant]:.2f}", spread, f"{ratio:.2f}"])
    print_table(["model", "variant", "CPU, s", "range", f"/ {options.variants[0]}"], rows, left=2)


def run(model, variant):
    """Returns the seconds that a process of its own measures."""
    command = [sys.executable, __file__, "--one", model, variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(model, variant):
    """Returns the CPU seconds of `fit` on one batch."""
    import keras

    make, batch_size = MODELS[model]

    def compile_model(model, **optimizer):
        model.compile(
            keras.optimizers.Adam(**optimizer),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )

    keras.utils.set_random_seed(0)
    model = VARIANTS[variant].build(make, compile_model)
    x = keras.ops.convert_to_numpy(keras.ops.zeros((batch_size, *model.input_shape[1:])))
    y = keras.ops.convert_to_numpy(keras.ops.zeros((batch_size,), "int32"))
    begun = time.process_time()
    model.fit(x, y, batch_size=batch_size, verbose=0)
    return time.process_time() - begun


if __name__ == "__main__":
    main()
