import random

import keras
import numpy as np
import pytest
from keras import layers
from models import LazyClassifier, compile_classifier, make_classifier

from polyak_model import PolyakModel, UniformAverage
from polyak_model.average.clone_check import pair_weights
from polyak_model.average.cloning import clone_model


def make_functional():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    shared = layers.Dense(4, name="shared")
    joined = layers.Concatenate()([shared(inputs["a"]), shared(inputs["b"])])
    return keras.Model(inputs, [layers.Dense(2)(joined), layers.Dense(1)(joined)])


def make_built_subclass():
    model = LazyClassifier()
    model(np.ones((2, 6), "float32"))
    return model


MAKERS = pytest.mark.parametrize(
    "make",
    [make_classifier, make_functional, make_built_subclass, LazyClassifier],
    ids=["sequential", "functional", "subclass", "unbuilt"],
)


@MAKERS
def test_a_clone_shares_no_variable_and_has_the_same_architecture(make):
    model = make()
    clone = clone_model(model)
    assert type(clone) is type(model)
    assert clone.built is model.built
    assert not {id(v) for v in model.variables} & {id(v) for v in clone.variables}
    assert len(pair_weights(model, clone)) == len(model.weights)


@MAKERS
def test_cloning_leaves_the_model_and_pythons_random_state_alone(make):
    model = make()
    weights, state = model.get_weights(), random.getstate()
    clone_model(model)
    assert random.getstate() == state
    assert len(weights) == len(model.weights)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_clone_of_a_compiled_model_carries_no_optimizer():
    inner = compile_classifier(keras.Sequential([keras.Input((6,)), make_classifier()]))
    compile_classifier(inner.layers[0])
    clone = clone_model(inner)
    assert not clone.compiled
    assert not clone.layers[0].compiled


def test_a_clone_keeps_the_frozen_state_of_each_layer():
    model = make_classifier()
    model.layers[0].trainable = False
    assert [layer.trainable for layer in clone_model(model).layers] == [
        layer.trainable for layer in model.layers
    ]


def test_an_adapted_normalization_is_the_same_in_the_clone():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(5, 2, size=(50, 3)))
    inner = keras.Sequential([keras.Input((3,)), normalization, layers.Dense(1)])
    x = np.ones((2, 3), "float32")
    model = PolyakModel(inner)
    np.testing.assert_array_equal(model.predict(x, verbose=0), inner.predict(x, verbose=0))


class Handle:
    """An object of a C library, which nothing can look into."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle 'Handle' object")


class Foreign(layers.Dense):
    """A layer that keeps such objects."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.handles = [Handle()]


def make_foreign():
    return keras.Sequential([keras.Input((3,)), Foreign(2, name="odd")])


def test_an_object_that_cannot_be_copied_is_refused_by_name_with_the_way_out():
    message = "`handles` of 'odd' of class .*Foreign holds a .*Handle, .*Pass `clone_function`"
    with pytest.raises(ValueError, match=message):
        PolyakModel(make_foreign())


def test_a_model_loaded_with_its_graph_is_refused_by_name(tmp_path):
    keras.Sequential([keras.Input((3,)), layers.Dense(2)]).export(tmp_path / "it", verbose=False)
    layer = layers.TFSMLayer(tmp_path / "it", call_endpoint="serve", name="loaded")
    with pytest.raises(ValueError, match="of 'loaded' of class .*TFSMLayer.*`clone_function`"):
        PolyakModel(keras.Sequential([keras.Input((3,)), layer, layers.Dense(1)]))


def test_a_clone_function_serves_a_model_that_cannot_be_copied():
    model = PolyakModel(make_foreign(), clone_function=make_foreign)
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), model.raw_model.predict(x, verbose=0)
    )


def test_a_clone_function_that_shares_variables_is_refused_by_name():
    inner = make_classifier()
    path = inner.layers[0].kernel.path
    with pytest.raises(ValueError, match=f"shares the variable '{path}'"):
        PolyakModel(inner, clone_function=lambda: inner)


def test_a_clone_function_that_shares_a_layer_is_refused_by_name():
    inner = make_classifier()
    first = inner.layers[0]
    with pytest.raises(ValueError, match=f"shares the variable '{first.bias.path}|kernel"):
        PolyakModel(inner, clone_function=lambda: keras.Sequential([keras.Input((6,)), first]))


def test_a_clone_function_of_another_shape_is_refused_by_the_first_variable_that_differs():
    def make(width):
        return keras.Sequential(
            [keras.Input((6,)), layers.Dense(4, name="one"), layers.Dense(width, name="two")]
        )

    with pytest.raises(
        ValueError, match=r"differs is '.*two/kernel' of shape \(4, 3\).*Received in the clone: "
    ):
        PolyakModel(make(3), clone_function=lambda: make(2))


def test_a_clone_function_of_fewer_layers_is_refused_by_the_variable_left_over():
    def make(depth):
        return keras.Sequential(
            [keras.Input((6,)), *(layers.Dense(6, name=f"layer_{i}") for i in range(depth))]
        )

    with pytest.raises(ValueError, match="without a partner is '.*layer_2/kernel'"):
        PolyakModel(make(3), clone_function=lambda: make(2))


def test_a_clone_function_that_returns_no_model_is_refused():
    with pytest.raises(TypeError, match="`clone_function` must return a keras.Model.*Received: 3"):
        PolyakModel(make_classifier(), clone_function=lambda: 3)


def test_a_clone_function_may_leave_out_layers_without_weights():
    def without_dropout():
        kept = [layer for layer in make_classifier().layers if "dropout" not in layer.name]
        return keras.Sequential([keras.Input((6,)), *kept])

    inner = make_classifier()
    x = np.ones((2, 6), "float32")
    model = PolyakModel(inner, clone_function=without_dropout)
    np.testing.assert_array_equal(model.predict(x, verbose=0), inner.predict(x, verbose=0))


def make_sharing():
    shared = layers.BatchNormalization(name="shared")
    doubled = layers.Lambda(lambda x: 2 * x)
    first = keras.Sequential([keras.Input((3,)), shared, doubled])
    second = keras.Sequential([keras.Input((3,)), layers.Dense(3), shared])
    inputs = keras.Input((3,))
    return keras.Model(inputs, first(inputs) + second(inputs) + shared(inputs))


def make_sharing_sequence():
    shared = layers.Dense(3)
    return keras.Sequential([keras.Input((3,)), shared, keras.Sequential([shared, layers.ReLU()])])


@pytest.mark.parametrize("make", [make_sharing, make_sharing_sequence])
def test_a_layer_shared_between_nested_models_is_shared_in_the_clone(make):
    model = PolyakModel(make(), UniformAverage())
    assert len(model.average_model.weights) == len(model.raw_model.weights)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    np.testing.assert_array_equal(model(x), model.raw_model(x))
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    expected = model.predict(x, verbose=0, using="raw")
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    model.fit(x, x, verbose=0)
    assert not np.array_equal(model.predict(x, verbose=0), model.predict(x, verbose=0, using="raw"))


WORDS = np.array([["red"], ["blue"], ["red"], ["green"]])


def make_reader(adapted):
    lookup = layers.StringLookup(output_mode="one_hot", max_tokens=5)
    if adapted:
        lookup.adapt(WORDS)
    inputs = keras.Input((1,), dtype="string")
    return keras.Model(inputs, layers.Dense(2)(lookup(inputs)))


def test_a_table_adapted_before_wrapping_is_in_the_clone():
    model = PolyakModel(make_reader(adapted=True))
    x = keras.ops.convert_to_tensor(WORDS)
    np.testing.assert_array_equal(model(x), model.raw_model(x))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_layer_adapted_after_wrapping_is_in_the_clone(adapted):
    vectorization = layers.TextVectorization(output_sequence_length=3)
    normalization = layers.Normalization()
    if adapted:
        vectorization.adapt(["red blue", "blue"])
        normalization.adapt(np.ones((4, 2)))
    text, numbers = keras.Input((), dtype="string"), keras.Input((2,))
    embedded = layers.Flatten()(layers.Embedding(10, 2)(vectorization(text)))
    outputs = layers.Dense(1)(layers.Concatenate()([embedded, normalization(numbers)]))
    model = PolyakModel(keras.Model([text, numbers], outputs))
    vectorization.adapt(["green red blue", "red green", "red"])
    normalization.adapt(np.random.default_rng(0).normal(3, 2, (50, 2)))
    x = [keras.ops.convert_to_tensor(["red blue", "green grey"]), keras.ops.ones((2, 2))]
    np.testing.assert_array_equal(model(x), model.raw_model(x))
    np.testing.assert_array_equal(model.average_model(x), model.raw_model(x))
