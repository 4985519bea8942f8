"""Where TensorFlow places an average, and what it compiles and captures."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import LazyClassifier, assert_identical, compile_classifier, make_classifier
from tensorflow.python.eager import context as eager_context
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from polyak_model import PolyakModel
from polyak_model.backend.tensorflow import update as moves


@pytest.mark.parametrize(
    ("make", "mode"),
    [(make_classifier, {"jit_compile": True}), (LazyClassifier, {})],
    ids=["xla", "graph-lazy"],
)
def test_the_average_lives_on_the_device_that_was_asked_for(make, mode, batches):
    models = []
    for device in ("CPU:1", None):
        keras.utils.set_random_seed(1)
        inner = compile_classifier(make(), **mode)
        model = PolyakModel(
            inner, 0.9, device=device, compensated=True, report=("average", "raw", "ensemble")
        )
        model.fit(*batches, batch_size=4, verbose=0, validation_data=batches)
        models.append(model)
    away, beside = models
    placed = [v.value.device for v in [*away.average_model.weights, *away.shadow.weights]]
    assert len(placed) > 16
    assert {device[-5:] for device in placed} == {"CPU:1"}
    assert {v.value.device[-5:] for v in away.raw_model.weights} == {"CPU:0"}
    assert not away.average_model.jit_compile
    assert beside.average_model.jit_compile == beside.raw_model.jit_compile
    if not mode.get("jit_compile"):
        assert_identical(away.get_weights(), beside.get_weights())


def test_beside_an_average_on_a_device_of_its_own_the_raw_step_is_still_compiled(batches):
    contexts = []

    class Watched(keras.Sequential):
        def train_step(self, data):
            contexts.append(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))
            return super().train_step(data)

    x, y = batches
    inner = Watched(make_classifier().layers)
    model = PolyakModel(inner, 0.9, device="CPU:1")
    for jit_compile in (True, False):
        compile_classifier(model, jit_compile=jit_compile)
        model.train_on_batch(x, y)
        assert set(contexts) == {jit_compile}
        contexts.clear()


def test_without_a_device_of_its_own_the_average_lives_where_the_raw_model_was_wrapped():
    with tf.device("CPU:1"):
        model = PolyakModel(make_classifier(), 0.9, compensated=True)
    weights = [*model.raw_model.weights, *model.average_model.weights, *model.shadow.weights]
    assert {v.value.device[-5:] for v in weights} == {"CPU:1"}


@pytest.mark.parametrize("compensated", [False, True])
def test_averages_move_on_the_device_where_they_live(compensated, batches, monkeypatch):
    monkeypatch.setattr(moves, "LARGE", 16)
    monkeypatch.setattr(moves, "HUGE", 16)
    inner = compile_classifier(make_classifier())
    model = PolyakModel(inner, 0.9, device="CPU:1", compensated=compensated)
    model.fit(*batches, batch_size=64, verbose=0)
    context = eager_context.context()
    context.enable_run_metadata()
    model.train_on_batch(*batches)
    step = context.export_run_metadata().function_graphs[-1]
    context.disable_run_metadata()
    nodes = [node for part in step.partition_graphs for node in part.node]
    placed = {
        device: collections.Counter(node.op for node in nodes if node.device.endswith(device))
        for device in ("CPU:0", "CPU:1")
    }
    compiled = "PartitionedCall" if compensated else "StatefulPartitionedCall"
    of_averaging = {compiled, "IsFinite"}
    of_training = {"SparseSoftmaxCrossEntropyWithLogits", "BiasAddGrad", "Rsqrt"}
    assert of_averaging <= set(placed["CPU:1"])
    assert not of_averaging & set(placed["CPU:0"])
    assert of_training <= set(placed["CPU:0"])
    assert not of_training & set(placed["CPU:1"])
    # What crosses over: each raw weight once, and whether the optimizer took a step.
    assert placed["CPU:1"]["_Recv"] == len(inner.weights) + 1


class AsksItsAverage(PolyakModel):
    """Reports what the average answers before and after each step."""

    def train_step(self, data):
        before = self._asked(data)
        logs = super().train_step(data)
        return {**logs, "before": before, "after": self._asked(data)}

    def _asked(self, data):
        return keras.ops.sum(self.average_model(data[0], training=False)[:, 0])


@pytest.mark.parametrize(("steps_per_execution", "few"), [(1, 2), (4, 32)])
def test_a_training_step_that_asks_the_average_sees_it_before_and_after_it_moves(
    steps_per_execution, few, batches, monkeypatch
):
    monkeypatch.setattr(moves, "FEW", few)
    answers = []
    for mode in ({"run_eagerly": True}, {"steps_per_execution": steps_per_execution}):
        keras.utils.set_random_seed(1)
        model = AsksItsAverage(compile_classifier(make_classifier(), **mode), 0.5)
        logs = model.fit(*batches, batch_size=16, epochs=3, shuffle=False, verbose=0).history
        answers.append([logs["before"], logs["after"]])
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-5)
    assert len({*np.ravel(answers[0])}) > 3


def test_many_small_variables_are_captured_as_one(batches):
    model = PolyakModel(compile_classifier(make_classifier()), 0.9)
    model.fit(*batches, verbose=0)
    step = tf.function(lambda *data: model.train_step(data), autograph=False)
    captured = step.get_concrete_function(*map(tf.constant, batches)).captured_inputs
    handles = {id(v.value.handle) for v in model.average_model.weights}
    assert len(handles) == 8
    assert not handles & {id(tensor) for tensor in captured}
