"""The private parts that copying by structure uses, by name."""

import keras
import pytest
from keras import layers

from polyak_model.backend import structure
from polyak_model.backend.tensorflow import copying


def parts(*lists):
    return [(owner, name) for each in lists for owner, names in each for name in names]


@pytest.mark.parametrize(
    ("owner", "name"),
    parts(structure.PRIVATE, copying.PRIVATE),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_private_part_that_copying_uses_exists(owner, name):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    function = keras.Model(model.inputs, model.outputs)
    layer = function.layers[-1]
    examples = [function, model, layer, layer._tracker, *layer._inbound_nodes, layer.output]
    found = [each for each in (*examples, layer.kernel) if isinstance(each, owner)]
    assert any(hasattr(each, name) for each in [owner, *found])
