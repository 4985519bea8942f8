"""Trains with backups in processes that are killed at random, for `test_backups.py`.

`python kill_worker.py FOLDER KILLS SEED` trains without interruption in FOLDER/whole. It then
trains in FOLDER/0, FOLDER/1, ... to the end, and restarts the process after each kill, until it has
killed KILLS processes in all, about half of them while they were writing a file.
"""

import contextlib
import itertools
import os
import pathlib
import random
import signal
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from polyak_model import AverageCheckpoint, PolyakModel, PowerAverage

EPOCHS = 12


def make_model():
    keras.utils.set_random_seed(1)
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Dropout(0.3, seed=1),
            layers.Dense(3, activation="softmax"),
        ]
    )
    inner.compile(
        optimizer=keras.optimizers.Adam(0.1),
        loss="sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    return PolyakModel(inner, PowerAverage(2, start_step=3, update_every=2), compensated=True)


def train(folder, order):
    """Trains to the end, from a backup if there is one, and saves the final state."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(32, 6)).astype("float32")
    y = generator.integers(0, 3, size=32)
    model = make_model()
    best = AverageCheckpoint(folder / "best.keras", save_best_only=True)
    callbacks = [
        best,
        AverageCheckpoint(folder / "{epoch:02d}.weights.h5", contents="both", keep_last=2),
        keras.callbacks.BackupAndRestore(folder / "backup"),
        keras.callbacks.LambdaCallback(on_train_batch_begin=lambda *_, **__: mark(folder, "begun")),
    ]
    model.fit(
        x,
        y,
        batch_size=16,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=callbacks[::order],
    )
    average = keras.models.load_model(folder / "best.keras")
    state = [*model.variables, *model.average_model.variables, *model.optimizer.variables]
    arrays = [variable.numpy() for variable in (*state, *average.weights)]
    np.savez(folder / "state.npz", *arrays, best=best.best, scored=average.evaluate(x, y))
    mark(folder, "finished")


def mark(folder, event):
    (folder / event).touch()


def train_killed(folder, kills, generator):
    """Trains in child processes, kills at most `kills` of them, and returns how many it killed."""
    folder.mkdir()
    order = generator.choice((1, -1))
    killed = 0
    while not (folder / "finished").exists():
        (folder / "begun").unlink(missing_ok=True)
        # Importing TensorFlow takes seconds, and it has started no threads yet.
        child = os.fork()
        if child == 0:
            train(folder, order)
            os._exit(0)
        if killed < kills:
            wait_for(folder, "begun", child)
            if generator.random() < 0.5:
                wait_for_writing(folder, generator.randint(1, 9), child)
                time.sleep(generator.expovariate(500))
            else:
                time.sleep(generator.uniform(0, 1))
            os.kill(child, signal.SIGKILL)
            killed += not (folder / "finished").exists()
        _, status = os.waitpid(child, 0)
        if status not in (0, signal.SIGKILL):
            raise RuntimeError(f"The training failed after {killed} kills.")
    return killed


def is_running(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_for(folder, event, child):
    while is_running(child) and not (folder / event).exists():
        time.sleep(0.001)


def wait_for_writing(folder, times, child):
    """Waits until the child has begun to write the given number of files."""
    seen = partial_files(folder)
    while is_running(child) and times > 0:
        now = partial_files(folder)
        times -= len(now - seen)
        seen |= now
        time.sleep(0.0005)


def partial_files(folder):
    names = os.listdir(folder)
    with contextlib.suppress(FileNotFoundError):
        names += os.listdir(folder / "backup")
    return {name for name in names if name.startswith(".polyak_model-partial-")}


def main(folder, kills, seed):
    generator = random.Random(seed)
    train_killed(folder / "whole", 0, generator)
    done = 0
    for number in itertools.count():
        done += train_killed(folder / str(number), kills - done, generator)
        if done == kills:
            break
        print(f"{done} kills of {kills}", file=sys.stderr)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
