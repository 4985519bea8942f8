import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf

from polyak_model.backend.tensorflow import update as moves

# A second logical device shows where variables are placed.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

# A first call compiles and the machine may be busy: the time of one example says nothing.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

# Looking for garbage need not look through TensorFlow each time.
gc.freeze()

MODES = {"eager": {"run_eagerly": True}, "graph": {}, "xla": {"jit_compile": True}}


@pytest.fixture(autouse=True)
def fresh_keras(request):
    """Each test starts with the same seed, names and dtype policy, whatever ran before it."""
    if "without_keras" in request.keywords:
        yield
        return
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    # Python looks for garbage when there is enough; after each test that takes longer than many do.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.fixture(params=list(MODES))
def mode(request, monkeypatch):
    """Arguments of `compile` for eager, graph and XLA execution."""
    if request.param == "graph":
        # Some variables of a small model then move as large ones do, the others together, by twos.
        monkeypatch.setattr(moves, "LARGE", 16)
        monkeypatch.setattr(moves, "HUGE", 16)
        monkeypatch.setattr(moves, "FEW", 2)
    return MODES[request.param]


@pytest.fixture
def batches():
    """Sixteen batches of four examples with integer labels."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 6)).astype("float32")
    return x, generator.integers(0, 3, size=64)


@pytest.fixture(scope="session")
def strategy():
    """Two logical CPUs; of two such strategies in a process TensorFlow mixes up the messages."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
