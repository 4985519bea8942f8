"""Memory that a compiled training step on JAX takes with averages, beyond the bare model's.

    KERAS_BACKEND=jax python benchmarks/memory_jax.py

Method: the training step is compiled with its state donated, as in `fit`. XLA reports the
bytes of its arguments, outputs and temporary buffers, of which outputs that take over a
donated argument count once. Their sum is the peak. The table shows it, and the difference
to the bare model's as a multiple of the bytes of the parameters; an average itself is 1.
"""

import argparse

import jax
from training_steps import MODELS, TITLE, VARIANTS, prepare_training

from polyak_model.cli.tables import print_table

SHOWN = ("bare", "PolyakModel", "two averages", "three averages", "compensated")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="mlp-10M")
    options = parser.parse_args(arguments)
    found = {name: measure(VARIANTS[name], *MODELS[options.model]) for name in SHOWN}
    bare = found["bare"][0]
    rows = [
        [name, f"{peak / 1e6:.1f}", f"{(peak - bare) / parameters:.3f}"]
        for name, (peak, parameters) in found.items()
    ]
    print(f"{TITLE}, {options.model}\n")
    print_table(["variant", "peak, MB", "extra / parameters"], rows)
    return rows


def measure(variant, make, batch_size):
    """Returns the peak of a training step and the size of the parameters, in bytes."""
    model, _, (x, y) = prepare_training(variant, make, batch_size)
    model.fit(x, y, batch_size=batch_size, verbose=0)  # It creates all variables.
    kinds = ("trainable", "non_trainable", "optimizer", "metrics")
    state = model._get_jax_state(**{f"{kind}_variables": True for kind in kinds})
    step = jax.jit(model.train_step, donate_argnums=0)
    used = step.lower(state, (x, y)).compile().memory_analysis()
    outputs = used.output_size_in_bytes - used.alias_size_in_bytes
    peak = used.argument_size_in_bytes + outputs + used.temp_size_in_bytes
    return peak, sum(weight.value.nbytes for weight in model.trainable_variables)


if __name__ == "__main__":
    main()
