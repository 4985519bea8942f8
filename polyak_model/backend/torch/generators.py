"""The global generators of random numbers."""

import contextlib
import random

import keras
import numpy as np
import torch
from keras.src.backend.common import global_state

_OF_KERAS = "global_seed_generator"


@contextlib.contextmanager
def unchanged_generators():
    python, numpy = random.getstate(), np.random.get_state()
    generator = global_state.get_global_attribute(_OF_KERAS)
    state = generator and keras.ops.copy(generator.state)
    try:
        # That of the CPU and those of all accelerators.
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if generator is None:  # It is created when it is first used.
            global_state.set_global_attribute(_OF_KERAS, None)
        else:
            generator.state.assign(state)
