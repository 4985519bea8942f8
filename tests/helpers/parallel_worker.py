"""One of two processes that train a model by `DistributedDataParallel`, in a loop of their own.

Usage: parallel_worker.py RANK ADDRESS FOLDER
"""

import pathlib
import sys

import keras
import numpy as np
import torch
from torch import distributed

from polyak_model import PolyakModel, UniformAverage


def main(rank, address, folder):
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    keras.utils.set_random_seed(rank)  # The first process decides on the weights.
    layers = [keras.Input((3,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)]
    model = PolyakModel(keras.Sequential(layers), UniformAverage())
    inner, optimizer = model.raw_model, keras.optimizers.SGD(0.1)
    parallel = torch.nn.parallel.DistributedDataParallel(inner)
    generator, iterates = np.random.default_rng(rank), []
    for _ in range(5):
        x = torch.tensor(generator.normal(size=(8, 3)), dtype=torch.float32)
        inner.zero_grad()
        ((parallel(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
        weights = inner.trainable_variables
        with torch.no_grad():
            optimizer.apply([weight.value.grad for weight in weights], weights)
        model.update_average()
        iterates.append(inner.get_weights())
    for index, (weight, *values) in enumerate(
        zip(model.average_model.get_weights(), *iterates, strict=True)
    ):
        np.testing.assert_allclose(weight, np.mean(values, axis=0), atol=1e-6)
        np.save(folder / f"{index}-of-{rank}.npy", weight)
    if rank == 0:
        model.save(folder / "model.keras")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
