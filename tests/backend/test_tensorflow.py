import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from models import compile_classifier, make_classifier

from polyak_model import backend


def variables(*values, dtype="float32"):
    return tuple(keras.Variable(np.array(value, dtype)) for value in values)


SHAPES = [(), (1,), (5,), (2, 4), (7, 3)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_fingerprint_is_the_same_however_it_is_computed(dtype):
    several = [keras.Variable(np.random.rand(*shape), dtype=dtype) for shape in SHAPES]

    def take():
        return backend.fingerprint(several)

    assert int(take()) == int(tf.function(take)()) == int(tf.function(take, jit_compile=True)())


@given(
    values=st.lists(st.integers(-8, 8), min_size=6, max_size=6),
    steps=st.lists(st.integers(-2, 2), min_size=6, max_size=6),
)
def test_a_fingerprint_tells_any_two_values_apart(values, steps):
    values, moved = np.array(values, "float32"), np.array(values, "float32") + np.array(steps)
    one, other = (backend.fingerprint(variables(v[:4], v[4:])) for v in (values, moved))
    assert (int(one) == int(other)) == np.array_equal(values, moved)
    assert int(one) != 0


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


def test_symbolic_inputs_have_the_shapes_and_dtypes_of_the_batch():
    symbolic = backend.symbolic({"a": tf.zeros((2, 3)), "b": [tf.constant(["x"])], "c": None})
    assert (symbolic["a"].shape, symbolic["a"].dtype) == ((2, 3), "float32")
    assert symbolic["b"][0].dtype == "string"
    assert symbolic["c"] is None


class Asked(tf.Module):
    """Reads a variable apart, and notes each time whether its graph is traced for an export."""

    def __init__(self):
        self.state = tf.Variable(3.0)
        self.answers = []

    @tf.function
    def ask(self, x):
        self.answers.append(backend.traces_for_export())
        backend.outside_trace(lambda: self.state.assign_add(1.0))
        return x


def test_a_graph_is_traced_for_export_while_it_is_written_and_at_no_other_time(tmp_path):
    asked = Asked()
    asked.ask(tf.zeros(2))
    signature = asked.ask.get_concrete_function(tf.zeros(3))
    assert asked.answers == [False, False]
    tf.saved_model.save(asked, tmp_path / "traced", signatures=signature)
    archive = keras.export.ExportArchive()
    archive.add_endpoint("serve", asked.ask.python_function, [tf.TensorSpec((None,))])
    archive.write_out(tmp_path / "tracing", verbose=False)
    assert asked.answers[2:]
    assert all(asked.answers[2:])
    assert not backend.traces_for_export()


def test_what_is_done_apart_is_done_once_and_leaves_nothing_in_the_graph():
    asked = Asked()
    function = asked.ask.get_concrete_function(tf.zeros(2))
    function(tf.zeros(2))
    assert float(asked.state) == 4.0
    assert function.graph.variables == ()


def test_what_fails_apart_fails_here():
    with pytest.raises(ZeroDivisionError):
        backend.outside_trace(lambda: 1 / 0)
