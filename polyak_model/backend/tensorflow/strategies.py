"""TensorFlow's strategies: variables of which every replica holds a component of its own.

Keras assigns in the training step to the component of the replica at hand, and so do averages:
every replica moves its own, alike on all, without waiting for the others. What the optimizer does
not keep alike (the statistics of BatchNormalization) is reduced first.
"""

import contextlib

import keras
import tensorflow as tf


@contextlib.contextmanager
def device(name):
    """Returns a context that places an average: its variables and its arithmetic.

    Args:
        name: A device such as `"CPU:0"`, or None for the one at hand.
    """
    # `tf.device(None)` would leave the one at hand, also that of a replica.
    placed = tf.device(name) if name else contextlib.nullcontext()
    with tf.variable_creator_scope(_one_for_each_replica), placed:
        yield


def _one_for_each_replica(create, **kwargs):
    # A variable with an aggregation waits for the other replicas at each assignment, which
    # TensorFlow forbids inside a condition.
    if kwargs.get("synchronization") != tf.VariableSynchronization.ON_READ:
        kwargs["aggregation"] = tf.VariableAggregation.NONE
    return create(**kwargs)


def strategy_of(model):
    """Returns the `tf.distribute.Strategy` that a model was created under, or None.

    Args:
        model: A `keras.Model`.
    """
    # Without a strategy Keras answers with the one at hand.
    return model._distribute_strategy


def strategy_of_optimizer(optimizer):
    """Returns the `tf.distribute.Strategy` that an optimizer was created under, or None.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
    """
    with tf.Graph().as_default():  # In a graph of its own no scope is open.
        default = tf.distribute.get_strategy()
    strategy = optimizer._distribution_strategy
    return None if strategy is default else strategy


def strategy_at_hand():
    """Returns the `tf.distribute.Strategy` whose scope is open, or None."""
    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None


def waits_for_replicas(strategy):
    """Tells whether optimizers let each replica wait for the others under a strategy.

    TensorFlow then forbids an optimizer's step inside a condition of a graph.

    Args:
        strategy: A `tf.distribute.Strategy`.
    """
    mirrored = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
    return isinstance(strategy, mirrored)


def local_replicas(strategy):
    """Returns how many replicas of a strategy belong to this process.

    Args:
        strategy: A `tf.distribute.Strategy`.
    """
    return len(strategy.extended.worker_devices)


def strategy_scope(model):
    """Returns a context that creates variables as those of a model were.

    Args:
        model: A `keras.Model`.
    """
    strategy = strategy_of(model)
    # A replica is inside the scope already, and may not open it.
    if strategy is None or not _outside_replicas():
        return contextlib.nullcontext()
    return strategy.scope()


def _outside_replicas():
    return tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy()


def on_each_replica(model, function):
    """Calls a function for each replica of a model's strategy, or once.

    Args:
        model: A `keras.Model`.
        function: Callable without arguments; its result is dropped.
    """
    strategy = strategy_of(model)
    if strategy is None or not _outside_replicas():
        function()
    else:
        strategy.run(tf.autograph.experimental.do_not_convert(lambda: function()))


def once(function):
    """Calls a function now, even inside a trace, and once for all replicas.

    Args:
        function: Callable without arguments; its result is dropped.
    """

    def lifted(strategy=None):
        with tf.init_scope():
            function()

    if _outside_replicas():
        lifted()
    else:
        tf.distribute.get_replica_context().merge_call(lifted)


def on_each_component(function, *variables):
    """Calls a function of variables; outside of replicas, once with the components of each.

    Args:
        function: Callable; it assigns to its first argument, a variable.
        *variables: Variables and tensors.
    """
    values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    if isinstance(values[0], tf.distribute.DistributedValues) and _outside_replicas():
        strategy = values[0].distribute_strategy
        with strategy.scope():
            strategy.extended.update(values[0], function, args=tuple(values[1:]), group=False)
    else:
        function(*variables)


def replicas():
    """Returns how many replicas run the code at hand, 1 outside of them."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def synchronize(variables):
    """Returns values of variables that are the same on all replicas.

    Floats are reduced to their mean; of anything else it is the value of the
    first replica. To be called by each replica, outside conditions.

    Args:
        variables: List of variables.
    """
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
