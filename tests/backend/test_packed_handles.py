import gc
import importlib
import weakref

import pytest
import tensorflow as tf
from tensorflow.python.framework import auto_control_deps

from polyak_model.backend.tensorflow import packed_handles as handles


@pytest.fixture
def variables(monkeypatch):
    monkeypatch.setattr(handles, "FEWEST", 1)
    return [tf.Variable([float(number)]) for number in range(3)]


def add_one(packed):
    """Adds one to each packed variable and returns the operations."""
    return [
        tf.raw_ops.AssignAddVariableOp(resource=handle, value=tf.constant([1.0]))
        for handle in handles.unpack(packed)
    ]


def pack(variables):
    return handles.pack([variable.handle for variable in variables])


def read(variable):
    return variable.read_value().op.inputs[0].op


def precedes(first, last):
    """Returns whether TensorFlow must run one operation before another."""
    waiting, seen = [last], set()
    while waiting:
        operation = waiting.pop()
        if operation is first:
            return True
        if operation not in seen:
            seen.add(operation)
            waiting += [*operation.control_inputs, *(tensor.op for tensor in operation.inputs)]
    return False


def traced(function):
    """Returns what a function returned, nested lists of operations, once its graph is complete."""
    kept = []

    @tf.function(autograph=False)
    def outer():
        kept.append(function())
        return tf.constant(0)

    outer()
    return kept[-1]


def calls(graph_of):
    return [op for op in graph_of.graph.get_operations() if op.type.endswith("PartitionedCall")]


def test_packed_variables_are_written_to(variables):
    tf.function(lambda: add_one(pack(variables)) and None)()
    assert [float(v[0]) for v in variables] == [1, 2, 3]


def test_a_pack_is_captured_as_one(variables):
    function = tf.function(lambda: add_one(pack(variables)) and None).get_concrete_function()
    assert len(function.captured_inputs) == 1


def test_few_handles_are_captured_one_by_one(variables, monkeypatch):
    monkeypatch.setattr(handles, "FEWEST", 3)
    few = tf.function(lambda: add_one(pack(variables[:2])) and None).get_concrete_function()
    assert len(few.captured_inputs) == 2
    few()
    tf.function(lambda: add_one(pack(variables)) and None)()
    assert [float(v[0]) for v in variables] == [2, 3, 3]


def test_reads_by_the_variable_itself_keep_their_order_with_writes_to_the_pack(variables):
    def steps():
        before = [read(v) for v in variables]
        writes = add_one(pack(variables))
        return before, writes, [read(v) for v in variables]

    for before, write, after in zip(*traced(steps), strict=True):
        assert precedes(before, write)
        assert precedes(write, after)


def test_writes_to_two_packs_that_share_a_variable_keep_their_order(variables):
    first, second = traced(lambda: (add_one(pack(variables[:2])), add_one(pack(variables[1:]))))
    assert precedes(first[1], second[0])
    assert not precedes(first[0], second[0])


def test_writes_to_the_variables_of_one_pack_do_not_wait_for_each_other(variables):
    first, second, third = traced(lambda: add_one(pack(variables)))
    assert not precedes(first, second)
    assert not precedes(second, third)


def test_reads_keep_their_order_with_a_function_that_writes_to_a_pack(variables):
    inner = tf.function(lambda: add_one(pack(variables)) and None, autograph=False)

    def steps():
        before = read(variables[1])
        inner()
        after = read(variables[1])
        return before, *calls(after), after

    before, call, after = traced(steps)
    assert precedes(before, call)
    assert precedes(call, after)


def test_functions_that_pack_keep_their_order(variables):
    inner = tf.function(lambda: add_one(pack(variables)) and None, autograph=False)

    def steps():
        inner()
        written = add_one(pack(variables[1:]))
        inner()
        return calls(written[0]), written

    (first, last), written = traced(steps)
    assert precedes(first, last)
    assert all(precedes(first, each) and precedes(each, last) for each in written)


def test_functions_that_pack_other_variables_do_not_wait_for_each_other(variables):
    def add_one_to(some):
        return tf.function(lambda: add_one(pack(some)) and None, autograph=False)

    def steps():
        add_one_to(variables[:1])()
        add_one_to(variables[1:])()
        return calls(tf.constant(0).op)

    first, second = traced(steps)
    assert not precedes(first, second)


@pytest.mark.parametrize("reads", ["before", "after"])
def test_reads_keep_their_order_inside_a_branch(variables, reads):
    v = variables[0]

    @tf.function
    def answer(yes):
        value = tf.constant([0.0])
        if yes:
            if reads == "before":
                value = v.read_value()
            add_one(pack(variables))
            if reads == "after":
                value = v.read_value()
        return value

    assert float(answer(tf.constant(True))[0]) == (0 if reads == "before" else 1)


def test_turns_of_a_loop_keep_their_order(variables):
    v = variables[0]

    @tf.function
    def seen():
        values = tf.TensorArray(tf.float32, 50)
        for turn in tf.range(50):
            add_one(pack(variables))
            values = values.write(turn, v.read_value()[0])
        return values.stack()

    assert seen().numpy().tolist() == list(range(1, 51))


def test_a_pack_lives_as_long_as_the_function_that_captured_it(variables):
    function = tf.function(lambda: add_one(pack(variables)) and None)
    (packed,) = function.get_concrete_function().captured_inputs
    packed = weakref.ref(packed)
    function()
    assert packed() is not None
    del function
    gc.collect()
    assert packed() is None


def test_other_tensors_of_resources_are_left_alone(variables):
    stacked = [tf.stack([v.handle for v in variables])]
    traced(lambda: add_one(stacked))
    assert [float(v[0]) for v in variables] == [1, 2, 3]


@pytest.fixture
def without_resolver(monkeypatch):
    """Reloads the module as under a TensorFlow that lacks the resolver."""
    with monkeypatch.context() as patch:
        patch.delattr(auto_control_deps, "register_acd_resource_resolver")
        importlib.reload(handles)
    yield
    importlib.reload(handles)


@pytest.mark.usefixtures("without_resolver")
def test_without_a_resolver_handles_are_not_packed(variables):
    assert not handles.ENABLED
    function = tf.function(lambda: add_one(pack(variables)) and None).get_concrete_function()
    assert len(function.captured_inputs) == 3
    function()
    assert [float(v[0]) for v in variables] == [1, 2, 3]
