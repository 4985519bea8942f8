"""Parts of PyTorch, and of Keras on PyTorch, that are not public."""

import keras
import pytest
from keras.src.backend.common import global_state

if keras.backend.backend() != "torch":
    pytest.skip("for PyTorch", allow_module_level=True)

import torch
import torch.utils.weak

LISTS = ("_foreach_add_", "_foreach_copy_", "_foreach_lerp_", "_foreach_sub", "_foreach_sub_")
FUNCTIONS = [
    *((torch, name) for name in LISTS),
    (torch.utils.weak, "WeakTensorKeyDictionary"),
    (keras.Variable, "_initialize"),
    (keras.Layer, "_post_build"),
    (keras.Layer, "_track_variables"),
    (keras.Model, "_symbolic_build"),
]


@pytest.mark.parametrize(
    ("owner", "name"), FUNCTIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_installed_version_has_each_private_function(owner, name):
    assert callable(getattr(owner, name, None)), f"{name} is missing in the installed version."


def test_keras_keeps_parameters_where_they_are_looked_for():
    layer = keras.layers.Dense(1)
    layer.build((None, 2))
    assert isinstance(layer.kernel._value, torch.nn.Parameter)
    assert {*layer._torch_params} == {weight.path for weight in layer.weights}
    assert "_torch_params" in vars(layer)["_modules"]


def test_keras_keeps_the_device_of_a_scope_where_it_is_looked_for():
    assert global_state.get_global_attribute("torch_device") is None
    with keras.device("cpu"):
        assert global_state.get_global_attribute("torch_device") == "cpu"
