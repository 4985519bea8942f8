import pytest

from polyak_model.errors import InputError
from polyak_model.weight_files.safe_config import check_config

DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1}}


def is_function(module, name):
    return (module, name) in {("activations", "tanh"), ("ops", "cos")}


def check(config):
    check_config({"config": {"layers": [DENSE, config]}}, "model.keras", is_function)


def make_function(module, name):
    return {"module": module, "class_name": "function", "config": name}


@pytest.mark.parametrize(
    "config",
    [
        {"module": "keras", "class_name": "Sequential", "config": {}},
        {"module": "keras.optimizers.schedules", "class_name": "CosineDecay", "config": {}},
        {"module": "keras.src.models.functional", "class_name": "Functional", "config": {}},
        {"module": "keras.src.ops.numpy", "class_name": "Add", "config": {}},
        {
            "module": "keras.src.backend.torch.optimizers.torch_sgd",
            "class_name": "SGD",
            "config": {},
        },
        {"class_name": "__keras_tensor__", "config": {"shape": [None, 3]}},
        make_function("builtins", "tanh"),
        make_function("keras.activations", "tanh"),
        make_function("keras.ops", "cos"),
    ],
)
def test_objects_of_keras_are_accepted(config):
    check(config)


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({"class_name": "__lambda__", "config": {"value": "4wAA"}}, "a lambda, whose code"),
        *(
            ({"module": "keras.layers", "class_name": name, "config": {}}, f"a layer {name}")
            for name in ("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
        ),
        ({"module": "os", "class_name": "System", "config": {}}, "'System' of 'os'"),
        ({"module": "kerasx.layers", "class_name": "Dense", "config": {}}, "'kerasx.layers'"),
        ({"module": "keras.layersx", "class_name": "Dense", "config": {}}, "'keras.layersx'"),
        ({"module": "keras.utils", "class_name": "FeatureSpace", "config": {}}, "'keras.utils'"),
        ({"module": "keras.src.saving", "class_name": "Any", "config": {}}, "'keras.src.saving'"),
        (
            {"module": "keras.src.backend.torch", "class_name": "Any", "config": {}},
            "of 'keras.src.b",
        ),
        ({"module": "keras.models", "class_name": "load_model", "config": {}}, "'load_model'"),
        ({"module": None, "class_name": "MyLayer", "config": {}}, "needs 'MyLayer', which"),
        ({"class_name": "__typespec__", "config": []}, "'__typespec__'"),
        ({"module": ["os"], "class_name": "A", "config": {}}, "'A' of \\['os'\\]"),
        ({"module": "keras.layers", "class_name": ["Lambda"], "config": {}}, "Lambda"),
        ({"module": "keras.layers", "class_name": None, "config": {}}, "None"),
        (make_function("builtins", "eval"), "'eval' of 'builtins'"),
        (make_function("builtins", ["tanh"]), "tanh"),
        (make_function("keras.utils", "get_file"), "'get_file' of 'keras.utils'"),
        (make_function("keras.saving", "load_model"), "'load_model'"),
        (make_function("os", "system"), "'system' of 'os'"),
        (make_function(None, "tanh"), "'tanh'"),
    ],
)
def test_a_config_that_would_run_other_code_is_refused(config, needed):
    for hidden in (config, {"config": {"activation": config}}, {"build_config": [[config]]}):
        with pytest.raises(InputError, match=needed) as caught:
            check(hidden)
        assert "'model.keras'" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_config_may_be_nested_deeply():
    config = DENSE
    for _ in range(100_000):
        config = {"config": config}
    check(config)
