"""Memory that a compiled training step on JAX takes with averages, beyond the bare model's.

    KERAS_BACKEND=jax python benchmarks/memory_jax.py

Method: the training step is compiled with its state donated, as in `fit`. XLA reports the
bytes of its arguments, outputs and temporary buffers, of which outputs that take over a
donated argument count once. Their sum is the peak. The table shows it, and the difference
to the bare model's as a multiple of the bytes of the parameters; an average itself is 1.
"""

import argparse

import jax
import keras
import numpy as np
from training_steps import DECAY, MODELS

from polyak_model import PolyakModel
from polyak_model.cli.tables import print_table

DECAYS = (DECAY, 0.99, 0.9999)
# Name: the number of averages, and other arguments.
VARIANTS = {
    "bare": (0, {}),
    "PolyakModel": (1, {}),
    "two averages": (2, {}),
    "three averages": (3, {}),
    "compensated": (1, {"compensated": True}),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="mlp-10M")
    options = parser.parse_args(arguments)
    found = {name: measure(*MODELS[options.model], *VARIANTS[name]) for name in VARIANTS}
    bare = found["bare"][0]
    rows = [
        [name, f"{peak / 1e6:.1f}", f"{(peak - bare) / parameters:.3f}"]
        for name, (peak, parameters) in found.items()
    ]
    print(f"JAX {jax.__version__}, Keras {keras.__version__}, {options.model}\n")
    print_table(["variant", "peak, MB", "extra / parameters"], rows)
    return rows


def measure(make, batch_size, count, arguments):
    """Returns the peak of a training step and the size of the parameters, in bytes."""
    keras.utils.set_random_seed(0)
    model = inner = make()
    if count:
        averages = {f"average_{n}": decay for n, decay in enumerate(DECAYS[:count])}
        model = PolyakModel(inner, averages, **arguments)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.zeros((batch_size, *inner.inputs[0].shape[1:]), "float32")
    y = np.zeros(batch_size, "int32")
    model.fit(x, y, batch_size=batch_size, verbose=0)  # It creates all variables.
    kinds = ("trainable", "non_trainable", "optimizer", "metrics")
    state = model._get_jax_state(**{f"{kind}_variables": True for kind in kinds})
    step = jax.jit(model.train_step, donate_argnums=0)
    used = step.lower(state, (x, y)).compile().memory_analysis()
    outputs = used.output_size_in_bytes - used.alias_size_in_bytes
    peak = used.argument_size_in_bytes + outputs + used.temp_size_in_bytes
    return peak, sum(weight.value.nbytes for weight in inner.trainable_variables)


if __name__ == "__main__":
    main()
