"""Parts of Keras and of backends that are not public, which only `polyak_model.backend` may use."""

import ast
import importlib
import pathlib
import types

import keras
import pytest

import polyak_model

PACKAGE = pathlib.Path(polyak_model.__file__).parent
MODULES = [
    "jax._src.core.trace_state_clean",
    "jax._src.distributed.global_state",
    "jax._src.interpreters.ad",
    "keras.src.backend.common.global_state",
    "keras.src.backend.common.stateless_scope.get_stateless_scope",
    "keras.src.backend.common.stateless_scope.in_stateless_scope",
    "keras.src.backend.common.symbolic_scope.in_symbolic_scope",
    "keras.src.backend.compute_output_spec",
    "keras.src.export",
    "keras.src.models.Functional",
    "keras.src.ops.function.Function",
    "keras.src.ops.function.make_node_key",
    "keras.src.ops.node.Node",
    "keras.src.ops.operation.Operation",
    "keras.src.saving.keras_saveable.KerasSaveable",
    "keras.src.saving.serialization_lib.SafeModeScope",
    "keras.src.trainers.trainer.Trainer",
    "keras.src.utils.io_utils.print_msg",
    "keras.src.utils.summary_utils.count_params",
    "keras.src.utils.summary_utils.readable_memory_size",
    "keras.src.utils.summary_utils.weight_memory_size",
    "keras.src.utils.tracking.DotNotTrackScope",
    "keras.src.utils.tracking.Tracker",
    "tensorflow.python.eager.context",
    "tensorflow.python.framework.auto_control_deps.register_acd_resource_resolver",
    "tensorflow.python.ops.control_flow_util.GraphOrParentsInXlaContext",
    "tensorflow.python.ops.stateful_random_ops",
    "tensorflow.python.saved_model",
    "tensorflow.python.trackable.base.Trackable",
    "tensorflow.python.trackable.data_structures.ListWrapper",
    "tensorflow.python.trackable.data_structures._DictWrapper",
    "tensorflow.python.trackable.data_structures._TupleWrapper",
]
LAYER = (
    "_build_shapes_dict",
    "_call_has_training_arg",
    "_clear_losses",
    "_flatten_layers",
    "_get_regularization_losses",
    "_non_trainable_variables",
    "_seed_generators",
    "_track_variable",
    "_trainable_variables",
)
MODEL = (
    "_assert_compile_called",
    "_compile_config",
    "_compile_loss",
    "_compile_metrics",
    "_eval_epoch_iterator",
    "_loss_tracker",
    "_symbolic_build",
)
ATTRIBUTES = [
    *(("layer", name) for name in LAYER),
    *(("model", name) for name in MODEL),
    ("metric", "_direction"),
    ("variable", "_path"),
    ("backup", "_current_epoch"),
    ("backup", "_last_batch_seen"),
    ("backup", "_save_model"),
]
OF_TENSORFLOW = [
    ("epoch", "_distributed_dataset"),
    ("model", "_distribute_strategy"),
    ("model", "_maybe_symbolic_build"),
    ("optimizer", "_distribution_strategy"),
]
OF_JAX = [
    ("model", "_get_jax_state"),
    ("model", "_jax_state"),
    ("model", "_make_function"),
    ("model", "_purge_model_variables"),
    ("variable", "_layout"),  # Keras 3.8 has it on no other backend.
]
on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="is used on JAX alone")


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """Objects that have the attributes, by the names of their owners."""
    layer = keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((2,)), layer])
    metric = keras.metrics.BinaryAccuracy()
    model.compile("sgd", "mse", metrics=[metric])
    x, y = keras.ops.ones((2, 2)), keras.ops.ones((2, 1))
    backup = keras.callbacks.BackupAndRestore(tmp_path_factory.mktemp("backup"))
    # Keras deletes some attributes at the end of `fit`.
    during = types.SimpleNamespace()
    watch = keras.callbacks.LambdaCallback(
        on_test_begin=lambda logs: vars(during).update(vars(model))
    )
    model.fit(x, y, validation_data=(x, y), callbacks=[backup, watch], verbose=0)
    return {
        "layer": [layer],
        "variable": [layer.kernel],
        "model": [model, during],
        "metric": [metric],
        "optimizer": [model.optimizer],
        "backup": [backup],
        "epoch": epochs(x),
    }


def epochs(x):
    if keras.backend.backend() != "tensorflow":
        return []
    import tensorflow as tf
    from keras.src.backend.tensorflow.trainer import TFEpochIterator

    return [TFEpochIterator(tf.distribute.get_strategy(), x)]


@pytest.mark.parametrize("name", MODULES)
def test_the_installed_version_has_each_private_name(name):
    module, _, attribute = name.rpartition(".")
    pytest.importorskip(name.partition(".")[0])
    try:
        missing = not hasattr(importlib.import_module(module), attribute)
        if missing:
            importlib.import_module(name)
    except ImportError:
        pytest.fail(f"{name} is missing in the installed version.")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *ATTRIBUTES,
        *(pytest.param(*each, marks=pytest.mark.tensorflow) for each in OF_TENSORFLOW),
        *(pytest.param(*each, marks=on_jax) for each in OF_JAX),
    ],
)
def test_the_installed_version_has_each_private_attribute(owners, owner, name):
    assert any(hasattr(each, name) for each in owners[owner]), (
        f"The {owner} has no attribute {name} in the installed version."
    )


def private_uses(source):
    """Yields the private names of Keras and of backends in the source of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr, ast.unparse(node)]
        elif isinstance(node, ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value.startswith("_") else []
        else:
            continue
        attributes = {name for _, name in ATTRIBUTES + OF_TENSORFLOW + OF_JAX}
        private = ("jax._src", "keras.src", "tensorflow.python", "tf.python")
        yield from (name for name in names if name in attributes or name.startswith(private))


@pytest.mark.parametrize(
    "code",
    [
        "from keras.src.models import Functional",
        "import tensorflow.python.eager",
        "layers = model._flatten_layers()",
        "getattr(model, '_compile_config')",
        "def _symbolic_build(self): pass",
    ],
)
def test_private_uses_are_found(code):
    assert [*private_uses(code)]


def test_only_the_backend_uses_private_parts():
    outside = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "backend"
    ]
    found = {
        str(path.relative_to(PACKAGE)): uses
        for path in outside
        if (uses := [*private_uses(path.read_text(encoding="utf-8"))])
    }
    assert outside
    assert found == {}


def test_the_lists_are_complete():
    used = {
        name
        for path in (PACKAGE / "backend").rglob("*.py")
        for name in private_uses(path.read_text(encoding="utf-8"))
    }
    attributes = {name for _, name in ATTRIBUTES + OF_TENSORFLOW + OF_JAX}
    listed = attributes | {*MODULES}
    assert {name for name in used if name.startswith("_")} == attributes
    assert {name for name in used if not name.startswith("_")} <= listed
