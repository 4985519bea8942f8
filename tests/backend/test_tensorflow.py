import dataclasses
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import compile_classifier, make_classifier

from polyak_model import PolyakModel, backend
from polyak_model.backend.common import optimizers_of


def variables(*values, dtype="float32"):
    return tuple(keras.Variable(np.array(value, dtype)) for value in values)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_assignment_copies_where_the_weight_is_positive(dtype):
    for weight, expected in ((0.0, [0]), (0.3, [1])):
        target, source = variables([0], [1], dtype=dtype)
        backend.assign([(target, source)], tf.constant(weight, "float64"))
        np.testing.assert_array_equal(target.numpy(), np.array(expected, dtype))


def test_a_function_is_called_when_its_condition_holds():
    (counter,) = variables(0.0)
    traced = tf.function(lambda c: backend.when(c, lambda: counter.assign_add(1.0)))
    for condition in (True, False, True):
        traced(tf.constant(condition))
        backend.when(condition, lambda: counter.assign_add(10.0))
    assert float(counter) == 22


def test_steps_of_all_optimizers_of_a_model_count():
    class TwoPlayers(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.optimizers.SGD()
            self.second = keras.optimizers.Adam()

    model = TwoPlayers()
    (weight,) = variables([1.0])
    assert int(backend.optimizer_step(model)) == 0
    model.first.apply([tf.constant([0.1])], [weight])
    model.second.apply([tf.constant([0.1])], [weight])
    assert int(backend.optimizer_step(model)) == 2
    assert not backend.may_skip_steps(model)


@pytest.mark.parametrize(
    ("optimizer", "may_skip"),
    [
        (keras.optimizers.SGD, False),
        (lambda: keras.optimizers.SGD(gradient_accumulation_steps=2), True),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), True),
    ],
)
def test_accumulation_and_loss_scaling_may_skip_steps(optimizer, may_skip):
    model = compile_classifier(make_classifier(), optimizer())
    assert backend.may_skip_steps(model) is may_skip


@dataclasses.dataclass
class Players:
    first: keras.optimizers.Optimizer
    others: dict


@pytest.mark.parametrize(
    "keep",
    [
        lambda first, second: {"one": first, "other": second},
        lambda first, second: [first, (second,)],
        lambda first, second: types.SimpleNamespace(first=first, more={"second": [second]}),
        lambda first, second: Players(first, {"second": second}),
        lambda first, second: {first, second},
    ],
    ids=["dict", "list", "namespace", "dataclass", "set"],
)
def test_optimizers_are_found_wherever_a_model_keeps_them(keep):
    first, second = keras.optimizers.SGD(), keras.optimizers.Adam()
    inner = keras.Sequential([keras.layers.Dense(1)])
    inner.kept = keep(first, second)
    model = keras.Sequential([keras.Input((2,)), inner])
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    assert {*optimizers_of(model)} == {model.optimizer, first, second}
    assert len(optimizers_of(model)) == 3


class Trained(backend.TrainingStep, keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = keras.layers.Dense(1)

    def call(self, x):
        return self.layer(x)

    def _train_batch(self, data):
        return {"ours": keras.ops.sum(data[0])}


def test_a_step_of_ours_replaces_that_of_keras_and_no_other(mode):
    model = Trained()
    model.compile("sgd", "mse", **mode)
    x, y = np.ones((4, 2)), np.ones((4, 1))
    history = model.fit(x, y, validation_data=(x, y), batch_size=4, verbose=0).history
    assert history["ours"] == [8.0]
    assert history["val_loss"] == [model.evaluate(x, y, verbose=0)]
    assert model.predict(x, verbose=0).shape == (4, 1)


def test_symbolic_inputs_have_the_shapes_and_dtypes_of_the_batch():
    symbolic = backend.symbolic({"a": tf.zeros((2, 3)), "b": [tf.constant(["x"])], "c": None})
    assert (symbolic["a"].shape, symbolic["a"].dtype) == ((2, 3), "float32")
    assert symbolic["b"][0].dtype == "string"
    assert symbolic["c"] is None


class Probe(tf.Module):
    """Changes a variable outside of traces, and records whether a trace is for an export."""

    def __init__(self):
        self.state = tf.Variable(3.0)
        self.exports = []

    @tf.function
    def call(self, x):
        self.exports.append(backend.traces_for_export())
        backend.outside_trace(lambda: self.state.assign_add(1.0))
        return x


def test_an_export_is_recognized_and_no_other_trace_is(tmp_path):
    probe = Probe()
    probe.call(tf.zeros(2))
    signature = probe.call.get_concrete_function(tf.zeros(3))
    assert probe.exports == [False, False]
    tf.saved_model.save(probe, tmp_path / "traced", signatures=signature)
    archive = keras.export.ExportArchive()
    archive.add_endpoint("serve", probe.call.python_function, [tf.TensorSpec((None,))])
    archive.write_out(tmp_path / "tracing", verbose=False)
    assert probe.exports[2:]
    assert all(probe.exports[2:])
    assert not backend.traces_for_export()


def test_a_function_called_outside_a_trace_is_called_once_and_adds_nothing_to_the_graph():
    probe = Probe()
    function = probe.call.get_concrete_function(tf.zeros(2))
    function(tf.zeros(2))
    assert float(probe.state) == 4.0
    assert function.graph.variables == ()


def test_an_error_outside_a_trace_is_raised():
    with pytest.raises(ZeroDivisionError):
        backend.outside_trace(lambda: 1 / 0)


class CountsTraces(layers.Layer):
    """Counts its calls, in training and else, of which compiled steps make one for each trace."""

    def __init__(self):
        super().__init__()
        self.traces = {True: 0, False: 0}

    def call(self, inputs, training=None):
        self.traces[bool(training)] += 1
        return inputs


def make_counting():
    return keras.Sequential([keras.Input((6,)), CountsTraces(), layers.Dense(3), layers.Softmax()])


class WithItsOwnLoss(keras.Sequential):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_a_training_step_is_traced_once_though_keras_itself_traces_it_twice(batches):
    inner = make_counting()
    model = PolyakModel(compile_classifier(inner), {"short": 0.9, "long": 0.99})
    model.fit(*batches, batch_size=4, verbose=0)
    assert inner.layers[0].traces[True] == 1
    bare = compile_classifier(make_counting())
    bare.fit(*batches, batch_size=4, verbose=0)
    assert bare.layers[0].traces[True] == 2


def test_an_evaluation_of_several_routes_is_traced_once(batches):
    inner = make_counting()
    model = PolyakModel(compile_classifier(inner), report=("average", "raw"))
    before = inner.layers[0].traces[False]
    model.evaluate(*batches, verbose=0)
    assert inner.layers[0].traces[False] - before == 1


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("of_class", [keras.Sequential, WithItsOwnLoss])
def test_training_is_that_of_the_bare_model_whether_it_is_built_early_or_not(
    of_class, sparse, batches
):
    data = tf.data.Dataset.from_tensor_slices(batches).batch(4)
    if sparse:
        data = data.map(lambda x, y: (tf.sparse.from_dense(x), y))
    weights = []
    for wrap in (lambda model: model, PolyakModel):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,), sparse=sparse)
        inner = of_class([inputs, layers.Dense(5, activation="relu"), layers.Dense(3, "softmax")])
        wrap(compile_classifier(inner)).fit(data, shuffle=False, verbose=0)
        weights.append(inner.get_weights())
    for expected, received in zip(*weights, strict=True):
        np.testing.assert_array_equal(received, expected)
