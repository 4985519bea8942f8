"""Copies by structure: what they keep of the original, and that they share nothing with it."""

import collections
import functools
import gc
import inspect
import random
import sys
import threading
import types
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops
from model_zoo import KINDS
from object_graphs import assert_shares_nothing

import polyak_model
from polyak_model.average.clone_check import check_disjoint
from polyak_model.average.cloning import complete_clone, copy_unshared

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")


def call(model, x):
    """Returns the outputs of a model as a flat list of arrays."""
    return [np.asarray(output) for output in keras.tree.flatten(model(x))]


def assert_copies(model, x=X):
    """Copies a model and compares the copy with it; returns the copy."""
    before = model.get_weights()
    clone = polyak_model.clone_model(model)
    check_disjoint(model, clone)
    assert_shares_nothing(model, clone)
    assert type(clone) is type(model)
    assert not clone.compiled
    for one, other in zip(model.variables, clone.variables, strict=True):
        assert describe(one) == describe(other)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    if x is not None:
        for one, other in zip(call(model, x), call(clone, x), strict=True):
            np.testing.assert_array_equal(one, other)
    return clone


def describe(variable):
    names = ("name", "path", "shape", "dtype", "trainable", "regularizer", "constraint")
    # The oldest Keras does not know the last.
    return [getattr(variable, name, None) for name in (*names, "aggregation", "synchronization")]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_copy_of_every_kind_shares_nothing(kind):
    model = kind.make()
    kind.prepare(model)
    assert_copies(model, None)


class Parts(keras.Model):
    """A model whose constructor takes a layer, a list of layers and a number; it has no config."""

    def __init__(self, encoder, blocks, scale):
        super().__init__()
        self.encoder = encoder
        self.blocks = blocks
        self.scale = scale

    def call(self, inputs):
        outputs = self.encoder(inputs)
        for block in self.blocks:
            outputs = block(outputs)
        return self.scale * outputs


def make_parts():
    model = Parts(layers.Dense(5), [layers.Dense(5), layers.BatchNormalization()], 3)
    model(X)
    return model


def test_a_model_whose_constructor_takes_layers_is_copied():
    clone = assert_copies(make_parts())
    assert clone.scale == 3


class Margin(keras.layers.Layer):
    """Has default arguments and `**kwargs`, so that its config tells the defaults."""

    def __init__(self, margin=0.5, **kwargs):
        super().__init__()
        self.margin = margin

    def call(self, inputs):
        return inputs - self.margin


def test_a_copy_keeps_arguments_that_a_config_loses():
    model = keras.Sequential([keras.Input((6,)), Margin(9.0), layers.Dense(2)])
    assert assert_copies(model).layers[0].margin == 9.0


class NoKeywords(keras.layers.Layer):
    """A layer whose constructor takes no `**kwargs`."""

    def __init__(self, width):
        super().__init__()
        self.dense = layers.Dense(width)

    def call(self, inputs):
        return self.dense(inputs)


def test_a_functional_model_of_a_layer_without_keyword_arguments_is_copied():
    inputs = keras.Input((6,))
    assert_copies(keras.Model(inputs, NoKeywords(3)(inputs) + 1.0))


def test_a_layer_shared_between_nested_models_is_shared_in_the_copy():
    inputs, others = keras.Input((6,)), keras.Input((6,))
    shared = layers.Dense(6)
    first = keras.Model(inputs, layers.Dense(6)(shared(inputs)))
    part = keras.Model(inputs, first.layers[1].output)
    model = keras.Model(others, [shared(others), first(others), part(others) * 2])
    clone = assert_copies(model)
    assert clone.get_config() == model.get_config()
    assert_copies(clone)


@pytest.mark.parametrize("change", ["lora", "int8"])
def test_a_copy_keeps_what_was_changed_inside_attention(change):
    inputs = keras.Input((3, 6))
    attention = layers.MultiHeadAttention(2, 4)
    model = keras.Model(inputs, attention(inputs, inputs))
    for part in (attention.query_dense, attention.output_dense):
        part.enable_lora(2) if change == "lora" else part.quantize("int8")
    assert_copies(model, X[:, None] * np.ones((1, 3, 1), "float32"))


Pair = collections.namedtuple("Pair", "first second")


class NamedOutputs(keras.Model):
    """Holds a named tuple of layers, and returns one of outputs."""

    def __init__(self):
        super().__init__()
        self.pair = Pair(layers.Dense(2), layers.Dense(3))
        self.input_spec = layers.InputSpec(ndim=2)

    def call(self, inputs):
        return Pair(self.pair.first(inputs), self.pair.second(inputs))


def test_a_copy_keeps_named_tuples_and_input_specs():
    model = NamedOutputs()
    model(X)
    clone = assert_copies(model)
    assert type(clone(X)) is Pair
    assert clone.input_spec is not model.input_spec
    with pytest.raises(ValueError, match="ndim"):
        clone(X[0])


class ByIdentity(keras.Model):
    """Finds numbers by layers, and layers by their `id`."""

    def __init__(self):
        super().__init__()
        self.parts = {"all": [layers.Dense(6), layers.Dense(6)]}
        self.by_id = {id(part): part for part in self.parts["all"]}
        self.numbers = {part: i for i, part in enumerate(self.parts["all"], start=1)}
        self.group = set(self.parts["all"])

    def call(self, inputs):
        for part in self.parts["all"]:
            inputs = self.by_id[id(part)](inputs) * self.numbers[part] * (part in self.group)
        return inputs


def test_dicts_and_sets_of_layers_or_their_ids_hold_those_of_the_copy():
    model = ByIdentity()
    model(X)
    clone = assert_copies(model)
    clone.parts["all"][0].kernel.assign_add(ops.ones((6, 6)))
    assert not np.array_equal(clone(X), model(X))


def make_closures():
    dense, factor = layers.Dense(6), 2.0
    dense.build((None, 6))

    def twice(x):
        return dense(x) * factor

    chain = [keras.Input((6,)), layers.Lambda(twice), layers.Lambda(lambda x: twice(x) + 1)]
    return keras.Sequential(chain)


def test_a_function_that_holds_a_layer_is_copied_with_it():
    model = make_closures()
    clone = polyak_model.clone_model(model)
    assert_shares_nothing(model, clone)
    expected = np.asarray(model(X))
    dense = clone.layers[0].function.__closure__[0].cell_contents
    np.testing.assert_array_equal(clone(X), expected)
    dense.kernel.assign(2 * dense.kernel)
    assert not np.allclose(clone(X), expected)
    np.testing.assert_array_equal(model(X), expected)


def test_a_function_that_holds_nothing_to_copy_is_shared():
    model = keras.Sequential([keras.Input((6,)), layers.Lambda(lambda x: x + 1)])
    assert polyak_model.clone_model(model).layers[0].function is model.layers[0].function


class Odds(keras.Model):
    """Holds what else a model may hold."""

    def __init__(self):
        import tensorflow as tf

        super().__init__()
        self.dense = layers.Dense(6)
        self.lock = threading.Lock()
        self.generator = np.random.default_rng(3)
        self.random = random.Random(2)
        self.names = types.SimpleNamespace(groups=collections.defaultdict(list, all=[self.dense]))
        self.recent = collections.deque([self.dense], maxlen=2)
        self.views = [
            types.MappingProxyType({0: self.dense}),
            collections.UserDict({0: self.dense}),
            collections.UserList([self.dense]),
            collections.ChainMap({}, {0: self.dense}),
        ]
        self.partial = functools.partial(self.dense, training=False)
        self.weak = weakref.ref(self.dense)
        self.traced = tf.function(self.plain)
        self.scale = tf.Variable(3.0)
        self.noise = tf.random.Generator.from_seed(1)
        self.table = tf.lookup.experimental.MutableHashTable("string", "int64", -1)
        self.table.insert(["a"], tf.constant([7], "int64"))
        self.module = tf.Module()
        self.module.several = [tf.Variable(1.0)]
        self.module.named = {"one": (tf.Variable(2.0),)}

    def plain(self, inputs):
        return self.dense(inputs) * self.scale

    def call(self, inputs):
        return self.partial(inputs) + self.traced(inputs)


@pytest.mark.tensorflow
def test_what_else_a_model_holds_is_copied():
    import tensorflow as tf

    model = Odds()
    model(X)
    clone = assert_copies(model)
    assert clone.names.groups["all"][0] is clone.recent[0] is clone.weak() is clone.dense
    assert clone.recent.maxlen == 2
    assert all(view[0] is clone.dense for view in clone.views)
    assert clone.names.groups["new"] == []
    assert clone.generator.random() == model.generator.random()
    assert clone.random.random() == model.random.random()
    np.testing.assert_array_equal(clone.noise.uniform([2]), model.noise.uniform([2]))
    clone.table.insert(["a"], tf.constant([8], "int64"))
    assert [int(each.table.lookup(tf.constant("a"))) for each in (model, clone)] == [7, 8]
    expected = np.asarray(model(X))
    clone.scale.assign(5.0)
    clone.module.named["one"][0].assign(9.0)
    np.testing.assert_array_equal(model(X), expected)
    assert not np.allclose(clone(X), expected)
    assert float(model.module.named["one"][0]) == 2.0


def test_a_copy_of_a_wrapper_has_averages_of_its_own():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    model = polyak_model.PolyakModel(inner, {"short": 0.5, "long": 0.9})
    before = model.average_models["long"].get_weights()
    clone = polyak_model.clone_model(model)
    check_disjoint(model, clone)
    clone.compile("sgd", "mse")
    clone.fit(X, np.ones((4, 2)), verbose=0)
    assert [clone.average_step, model.average_step] == [1, 0]
    for mine, other, old in zip(
        clone.average_models["long"].weights,
        model.average_models["long"].weights,
        before,
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(other), old)
        assert np.any(np.asarray(mine) != old)


@pytest.mark.tensorflow
def test_a_checkpoint_of_a_copy_restores_into_the_copy(tmp_path):
    import tensorflow as tf

    model = make_parts()
    clone = polyak_model.clone_model(model)
    before = model.encoder.get_weights()
    clone.encoder.set_weights([weight + 1 for weight in before])
    path = tf.train.Checkpoint(model=clone).write(str(tmp_path / "clone"))
    bare = tf.train.Checkpoint(model=model).write(str(tmp_path / "model"))
    clone.encoder.set_weights(before)
    tf.train.Checkpoint(model=clone).read(path).assert_consumed()
    received = zip(before, model.encoder.weights, clone.encoder.weights, strict=True)
    for weight, one, other in received:
        np.testing.assert_array_equal(one, weight)
        np.testing.assert_array_equal(other, weight + 1)
    assert tf.train.list_variables(path) == tf.train.list_variables(bare)


@pytest.mark.parametrize("make", [make_parts, make_closures, Odds])
def test_original_and_copy_are_freed_without_each_other(make):
    model = make()
    clone = polyak_model.clone_model(model)
    gone = weakref.ref(clone)
    del clone
    gc.collect()
    assert gone() is None
    clone = polyak_model.clone_model(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(clone.layers) > 0


def test_a_copy_of_a_trained_model_is_uncompiled_and_both_go_on_training():
    model = make_parts()
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(X, X[:, :5], verbose=0)
    clone = assert_copies(model)
    assert not hasattr(clone, "optimizer")
    for each in (model, clone):
        each.compile("sgd", "mse")
    ours, theirs = (each.fit(X, X[:, :5], epochs=2, verbose=0).history for each in (model, clone))
    assert ours["loss"] == theirs["loss"]


@pytest.mark.tensorflow
def test_an_unbuilt_copy_becomes_a_copy_of_what_the_model_has_become(tmp_path):
    import tensorflow as tf

    model = Parts(layers.Dense(5), [layers.Dense(5)], 3)
    clone = polyak_model.clone_model(model)
    assert not clone.weights
    clone.compile("sgd", "mse")
    model(X)
    complete_clone(model, clone)
    assert clone.compiled
    assert_shares_nothing(model, clone)
    np.testing.assert_array_equal(clone(X), model(X))
    paths = [
        tf.train.Checkpoint(model=each).write(str(tmp_path / name))
        for name, each in (("model", model), ("clone", clone))
    ]
    names = [
        {n for n, _ in tf.train.list_variables(path) if "optimizer" not in n} for path in paths
    ]
    assert names[0] == names[1]


def test_a_long_chain_of_layers_needs_no_deep_stack():
    inputs = outputs = keras.Input((2,))
    for _ in range(200):
        outputs = layers.Identity()(outputs)
    model = keras.Model(inputs, outputs)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        clone = polyak_model.clone_model(model)
    finally:
        sys.setrecursionlimit(limit)
    assert len(clone.layers) == 201


class Drawing(keras.initializers.Initializer):
    """Draws from the global generators of NumPy and Python."""

    def __call__(self, shape, dtype=None):
        return np.random.normal(size=shape) + random.random()


def draw():
    """Returns numbers drawn from all global generators."""
    import tensorflow as tf

    return [
        random.random(),
        np.random.random(),
        float(keras.random.uniform(())),
        float(tf.random.uniform(())),
        float(tf.random.get_global_generator().uniform(())),
    ]


@pytest.mark.tensorflow
@pytest.mark.parametrize("clone_function", [None, lambda: make_drawing()])
def test_wrapping_draws_no_random_numbers(clone_function):
    import tensorflow as tf

    drawn = []
    for wrap in (False, True):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(3)
        tf.random.get_global_generator().reset_from_seed(3)
        model = make_drawing()
        draw()
        if wrap:
            wrapper = polyak_model.PolyakModel(model, clone_function=clone_function)
        model.build((None, 6))
        if wrap:
            wrapper.build((None, 6))
            assert len(wrapper.average_model.weights) == 4
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def make_drawing():
    return keras.Sequential(
        [layers.Dense(4, kernel_initializer=Drawing()), layers.Dropout(0.5), layers.Dense(2)]
    )


class Unnamed(keras.metrics.Metric):
    """A metric without a config, whose constructor takes no name."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.total = self.add_variable((), "zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(self.factor)

    def result(self):
        return self.total


def test_metrics_and_losses_are_copied_without_a_config():
    metric, loss = Unnamed(2.0), keras.losses.CategoricalCrossentropy(label_smoothing=0.25)
    copy = copy_unshared({"metrics": [metric, "mae"], "loss": (loss, None)})
    copy["metrics"][0].update_state(0, 0)
    assert float(copy["metrics"][0].result()) == 2.0
    assert float(metric.result()) == 0.0
    assert copy["metrics"][1] == "mae"
    assert copy["loss"][0].get_config() == loss.get_config()
    assert_shares_nothing(metric, copy["metrics"][0])


def test_a_copied_loss_reads_the_layers_of_the_clone():
    model = make_parts()
    clone = polyak_model.clone_model(model)

    def penalty(y_true, y_pred):
        return ops.sum(model.encoder.kernel)

    copy = copy_unshared(penalty, model, clone)
    clone.encoder.kernel.assign(ops.ones((6, 5)))
    assert float(copy(None, None)) == 30.0
    assert copy_unshared(model.call, model, clone).__self__ is clone


def test_a_copied_function_reads_the_learning_rate_of_the_optimizer_that_trains():
    optimizer = keras.optimizers.SGD(0.5)
    copy = copy_unshared([lambda y_true, y_pred: optimizer.learning_rate, optimizer])
    optimizer.learning_rate = 0.25
    assert float(copy[0](None, None)) == 0.25
    assert copy[1] is not optimizer
