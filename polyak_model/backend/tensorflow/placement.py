"""Devices and replicas: where the variables and the arithmetic of an average are.

An optimizer keeps weights equal on all replicas. What it does not update, the statistics of
BatchNormalization, is averaged over the replicas first.
"""

import contextlib

import tensorflow as tf

from polyak_model.backend.tensorflow.strategies import outside_replicas, strategy_of


@contextlib.contextmanager
def device(name):
    # `tf.device(None)` would clear the current device, also that of a replica.
    placed = tf.device(name) if name else contextlib.nullcontext()
    with tf.variable_creator_scope(_without_aggregation), placed:
        yield


def _without_aggregation(create, **kwargs):
    # Assigning to a variable with an aggregation waits for the other replicas, which TensorFlow
    # forbids inside a condition.
    if kwargs.get("synchronization") != tf.VariableSynchronization.ON_READ:
        kwargs["aggregation"] = tf.VariableAggregation.NONE
    return create(**kwargs)


def place_like(variable, other):
    pass  # Variables are copied with their strategy.


def strategy_scope(model):
    strategy = strategy_of(model)
    # A replica is inside the scope already and must not enter it again.
    if strategy is None or not outside_replicas():
        return contextlib.nullcontext()
    return strategy.scope()


# In a `tf.function` of the user's, AutoGraph would convert all that is called.
@tf.autograph.experimental.do_not_convert
def on_each_replica(model, function):
    strategy = strategy_of(model)
    if strategy is None or not outside_replicas():
        function()
    else:
        # In a `tf.function`, `run` converts what it is passed.
        strategy.run(tf.autograph.experimental.do_not_convert(lambda: function()))


def once(function):
    def lifted(strategy=None):
        with tf.init_scope():
            function()

    if outside_replicas():
        lifted()
    else:
        tf.distribute.get_replica_context().merge_call(lifted)


def replicas():
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def synchronize(variables):
    context = tf.distribute.get_replica_context()
    values = [tf.convert_to_tensor(variable) for variable in variables]
    is_first = tf.cast(tf.equal(context.replica_id_in_sync_group, 0), tf.int64)
    groups = (
        # In float64 the mean of equal float32 values is that value, bit for bit.
        (tf.distribute.ReduceOp.MEAN, True, lambda value: tf.cast(value, tf.float64)),
        (tf.distribute.ReduceOp.SUM, False, lambda value: tf.cast(value, tf.int64) * is_first),
    )
    for operation, floating, prepare in groups:
        chosen = [i for i, value in enumerate(values) if value.dtype.is_floating == floating]
        if chosen:
            reduced = context.all_reduce(operation, [prepare(values[i]) for i in chosen])
            for i, value in zip(chosen, reduced, strict=True):
                values[i] = tf.cast(value, values[i].dtype)
    return values
