"""The strategies of TensorFlow that models and optimizers were created under.

Keras reads and writes the component of the current replica in a training step, and so does an
average: every replica updates its own, all alike, and none waits for another.
"""

import keras
import tensorflow as tf


def strategy_of(model):
    """Returns the `tf.distribute.Strategy` that a model was created under, or None."""
    # Where there is none, Keras returns the current strategy.
    return model._distribute_strategy


def strategy_of_optimizer(optimizer):
    """Returns the `tf.distribute.Strategy` that an optimizer was created under, or None."""
    with tf.Graph().as_default():  # No scope is open in a new graph.
        default = tf.distribute.get_strategy()
    strategy = optimizer._distribution_strategy
    return None if strategy is default else strategy


def current_strategy():
    """Returns the `tf.distribute.Strategy` whose scope is open, or None."""
    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None


def waits_for_replicas(strategy):
    """Returns whether replicas wait for each other in an optimizer's step.

    TensorFlow then forbids that step inside a condition of a graph.
    """
    mirrored = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
    return isinstance(strategy, mirrored)


def local_replicas(strategy):
    """Returns how many replicas of a strategy belong to this process."""
    return len(strategy.extended.worker_devices)


def outside_replicas():
    """Returns whether the current code runs once rather than on each replica."""
    return tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy()


def on_each_component(function, *variables):
    """Calls a function of variables; outside of replicas, once for each set of components.

    Args:
        function: Callable that assigns to its first argument, a variable.
        *variables: Variables and tensors.
    """
    values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    if isinstance(values[0], tf.distribute.DistributedValues) and outside_replicas():
        strategy = values[0].distribute_strategy
        with strategy.scope():
            strategy.extended.update(values[0], function, args=tuple(values[1:]), group=False)
    else:
        function(*variables)
