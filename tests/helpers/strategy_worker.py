"""One of several workers that train together; run by test_strategies.py with a TF_CONFIG."""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
from models import CROSSENTROPY, make_classifier

from polyak_model import PolyakModel, UniformAverage

ROUTES = ("average", "raw", "ensemble")


def make_plain():
    """Makes a net whose training does not depend on how a batch is divided."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def train(model, x, y, strategy):
    """Takes a step for each global batch, and returns the raw weights after each."""

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True))
            loss = tf.reduce_sum(loss) / 8
        weights = model.trainable_variables
        model.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        model.update_average()

    @tf.function
    def train_step(x, y):
        strategy.run(replica_step, args=(x, y))

    iterates = []
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    for batch in strategy.experimental_distribute_dataset(dataset):
        train_step(*batch)
        iterates.append(model.raw_model.get_weights())
    return iterates


def named(prefix, arrays):
    """Returns arrays under numbered names."""
    return {f"{prefix}{i}": array for i, array in enumerate(arrays)}


def wrap(make):
    """Makes a compiled wrapper whose optimizer is built, since no replica can build one."""
    model = PolyakModel(make(), UniformAverage(start_step=2))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), CROSSENTROPY)
    model.optimizer.build(model.trainable_variables)
    return model


def main(folder, index):
    """Trains, and writes what this worker holds to a file."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    data = np.load(folder / "data.npz")
    results = {}
    for make in (make_plain, make_classifier):
        with strategy.scope():
            model = wrap(make)
        start = model.raw_model.get_weights()
        iterates = [start, *train(model, data["x"], data["y"], strategy)]
        name = make.__name__
        results[f"{name}/step"] = model.average_step
        results |= named(f"{name}/average", model.average_model.get_weights())
        for i, iterate in enumerate(iterates):
            results |= named(f"{name}/iterate{i}/", iterate)
        for route in ROUTES if make is make_classifier else ():
            results[f"{name}/{route}"] = model.predict(data["x"], verbose=0, using=route)
        # TensorFlow's convention: every worker saves, and only the chief's file is kept.
        model.save(folder / f"{name}{'' if index == 0 else '-temporary'}.keras")
    try:
        model.evaluate(data["x"], data["y"], verbose=0)
    except ValueError as error:
        results["refusal"] = str(error)
    np.savez(folder / f"worker{index}.npz", **results)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
