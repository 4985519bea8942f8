"""Fixtures and markers of all tests. Keras is imported by the tests that use it, not here."""

import gc
import os
import pathlib
import re
import sys
import tempfile

import closed_forms
import hypothesis
import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A first call compiles and the machine may be busy: the time of one example says nothing.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

TESTS = pathlib.Path(__file__).parent
MODES = {"eager": {"run_eagerly": True}, "graph": {}, "xla": {"jit_compile": True}}
MODES["graph with shipped thresholds"] = {}
BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
if BACKEND == "jax" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Many tests compile the same model. Workers of pytest-xdist inherit the folder.
    _compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if BACKEND == "jax":
    # XLA takes most of the time, and a third less of it with this, which was seen to change no
    # result. In the mode "xla", tests compile as users do. Of several values the last one counts.
    _quick = "--xla_backend_optimization_level=1"
    os.environ["XLA_FLAGS"] = f"{_quick} {os.environ.get('XLA_FLAGS', '')}"
if BACKEND == "torch":
    # Of small operations, threads take most of the time: the laws take half of it with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# JAX compiles everything by XLA; on PyTorch, Keras compiles nothing unless told to.
MODES_OF = {"jax": {"eager", "xla"}, "torch": {"eager"}}
# Modules with laws of all backends. In them a marker excepts what is about TensorFlow, or about
# files and scores, which are the same wherever the state of a model can be read and written.
OF_ALL_BACKENDS = {
    "test_backup_and_restore.py",
    "test_batch_norm.py",
    "test_between_fits.py",
    "test_callbacks.py",
    "test_distribution.py",
    "test_exclusion.py",
    "test_fingerprint.py",
    "test_inference.py",
    "test_interface.py",
    "test_jax.py",
    "test_jax_custom_steps.py",
    "test_jax_guide.py",
    "test_jax_interrupts.py",
    "test_jax_memory.py",
    "test_jax_packing.py",
    "test_jax_update.py",
    "test_joint_model.py",
    "test_keras_callbacks.py",
    "test_kinds_of_model.py",
    "test_larger_model.py",
    "test_laws.py",
    "test_model.py",
    "test_monitor.py",
    "test_optimizers.py",
    "test_overhead.py",
    "test_private_parts.py",
    "test_processes.py",
    "test_routed_model.py",
    "test_saveable_model.py",
    "test_several_averages.py",
    "test_share_frozen.py",
    "test_shared_files.py",
    "test_shadow.py",
    "test_threads.py",
    "test_torch.py",
    "test_torch_private_parts.py",
    "test_torch_processes.py",
    "test_torch_update.py",
    "test_ways_of_training.py",
}

COSTS = {"processes", "memory", "zoo", "benchmarks", "slow"}
# CPU seconds, those of child processes included, above which a test needs such a marker. They
# depend less than wall time on the load of the machine, but one that takes 20 s on two idle cores
# was seen to take 50 s on two slow and busy ones.
LIMIT = 60
# Folders and modules without quick tests, which `-m quick` does not import.
NEVER_QUICK = {"backend", "benchmarks", "science", "training"} | {
    "test_app.py",
    "test_attribute_access.py",
    "test_average_snapshots.py",
    "test_backup_and_restore.py",
    "test_batch_norm.py",
    "test_callbacks.py",
    "test_changed_before_wrapping.py",
    "test_checkpoints_with_keras.py",
    "test_copies.py",
    "test_demo.py",
    "test_export.py",
    "test_joint_model.py",
    "test_measured_errors.py",
    "test_model.py",
    "test_monitor.py",
    "test_notebooks.py",
    "test_refreshing.py",
    "test_routed_model.py",
    "test_scoring.py",
    "test_shadow.py",
    "test_soup.py",
    "test_sweep.py",
    "test_sweeping_with_keras.py",
}
QUICK_RULES = [closed_forms.RULES[name] for name in ("debiased", "late-and-rare")]

# Helpers have no doctests.
collect_ignore = ["helpers"]


class _NoDoctests:
    """A plugin: the laws of all backends are in this folder alone."""

    def pytest_ignore_collect(self, collection_path):
        is_module = collection_path.suffix == ".py"
        return (is_module and not collection_path.is_relative_to(TESTS)) or None


def pytest_configure(config):
    if config.option.markexpr == "backends":
        # As a plugin it acts on other folders, too, whose modules need packages of the commands.
        config.pluginmanager.register(_NoDoctests())


def pytest_ignore_collect(collection_path, config):
    name, marker = collection_path.name, config.option.markexpr
    if marker == "backends":
        ignored = name.endswith(".py") and name not in OF_ALL_BACKENDS
    else:
        ignored = marker == "quick" and name in NEVER_QUICK
    of = re.match(r"test_(jax|torch)", name)
    ignored = ignored or (of is not None and of[1] != BACKEND)
    return ignored or None  # None leaves the decision to pytest.


@pytest.hookimpl(tryfirst=True)  # Before pytest selects by marker.
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "strategy" in getattr(item, "fixturenames", ()):
            item.add_marker("tensorflow")
        if item.path.name in OF_ALL_BACKENDS and not item.get_closest_marker("tensorflow"):
            item.add_marker("backends")
        if is_quick(item):
            item.add_marker("quick")
    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = filter(runs_here, items)
    if "tensorflow" in sys.modules:
        import devices

        devices.add_second_device()
    if "keras" in sys.modules:
        # Looking for garbage need not look through Keras and its backend each time, nor at the many
        # objects of a trace while they are made.
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)


def runs_here(item):
    """Returns whether a test, in the mode that it is run in, is one of the current backend."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return BACKEND == "tensorflow" or not (
        item.get_closest_marker("tensorflow")
        or parameters.get("mode") in [*MODES.keys() - MODES_OF[BACKEND]]
    )


def is_quick(item):
    """Returns whether a test is cheap: of the laws, those in graph mode and with a few rules."""
    if is_costly(item) or not item.path.is_relative_to(TESTS):
        return False
    if not NEVER_QUICK.isdisjoint(item.path.relative_to(TESTS).parts):
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if (
        item.path.name == "test_laws.py"
        and parameters.get("rule", QUICK_RULES[0]) not in QUICK_RULES
    ):
        return False
    return parameters.get("mode", "graph") == "graph"


def is_costly(item):
    return any(item.get_closest_marker(cost) for cost in COSTS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(os.times()[:4])
    result = yield
    seconds = sum(os.times()[:4]) - before
    if seconds > LIMIT and not is_costly(item):
        pytest.fail(f"took {seconds:.0f} s of CPU time: mark its cost, one of {sorted(COSTS)}")
    return result


@pytest.fixture(autouse=True)
def fresh_keras():
    """Each test starts with the same seed, names and dtype policy, whatever ran before it."""
    if "keras" not in sys.modules:
        yield
        return
    import keras

    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    # Python looks for garbage when there is enough; after each test that takes longer than many do.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.fixture(autouse=True, scope="module")
def unfollowed_leftovers():
    """What a module leaves alive is not followed again by `gc.collect()`, which Keras calls."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["eager", "graph", "xla"])
def mode(request, monkeypatch):
    """Arguments of `compile` for eager, graph and XLA execution, or for those a test names."""
    if request.param == "graph":
        from polyak_model.backend.tensorflow import update

        # Some variables of a small model are then updated as large ones are, the others in pairs.
        monkeypatch.setattr(update, "LARGE", 16)
        monkeypatch.setattr(update, "HUGE", 16)
        monkeypatch.setattr(update, "FEW", 2)
    if request.param == "xla" and BACKEND == "jax":
        import frameworks

        from polyak_model.backend.jax import packing

        frameworks.compile_as_shipped(monkeypatch)
        monkeypatch.setattr(packing, "FEW", 2)  # Small models are packed as large ones are.
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
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
