"""Tiny weight files, written without Keras."""

import json
import zipfile

import h5py
import ml_dtypes
import numpy as np

TENSORS = {
    "layers/dense/vars/0": np.arange(6, dtype="float32").reshape(3, 2) / 7,
    "layers/dense/vars/1": np.array([0.5, -1.5, 3.0], ml_dtypes.bfloat16),
    "layers/dropout/seed_generator/vars/0": np.array([3, 4], "uint32"),
    "optimizer/vars/0": np.int64(12),
}
CONFIG = {"class_name": "Functional", "config": {"name": "m"}, "compile_config": {"loss": "mse"}}
METADATA = {"keras_version": "3.15.1"}


def write_hdf5(path, tensors=TENSORS, **options):
    """Writes a file in `.weights.h5` as Keras does.

    Args:
        path: Where.
        tensors: A dict from name to array.
        **options: Of `h5py.Group.create_dataset`.

    Returns:
        `path`.
    """
    with h5py.File(path, "w") as file:
        for name, array in tensors.items():
            group = file.require_group(name.rpartition("/")[0])
            group.attrs["name"] = name.split("/")[-3 if name.count("/") > 1 else 0]
            dataset = file.create_dataset(name, data=array, **options)
            if array.dtype == ml_dtypes.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
    return path


def write_keras(path, tensors=TENSORS, config=CONFIG, compression=zipfile.ZIP_STORED, **members):
    """Writes a file in `.keras`.

    Args:
        path: Where.
        tensors: A dict from name to array, or the bytes of `model.weights.h5`.
        config: A dict.
        compression: Of the members.
        **members: More of them, name and bytes; `None` leaves one out.

    Returns:
        `path`.
    """
    if not isinstance(tensors, bytes):
        tensors = write_hdf5(path.with_name("model.weights.h5"), tensors).read_bytes()
        path.with_name("model.weights.h5").unlink()
    everything = {
        "metadata.json": json.dumps(METADATA).encode(),
        "config.json": json.dumps(config).encode(),
        "model.weights.h5": tensors,
        **members,
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in everything.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def write_shards(path, tensors=TENSORS):
    """Writes a file in `.weights.json` with each tensor in its own shard.

    Args:
        path: Where.
        tensors: A dict from name to array.

    Returns:
        `path`.
    """
    weight_map = {}
    for n, (name, array) in enumerate(tensors.items()):
        shard = path.name.replace(".weights.json", f"_{n:05}.weights.h5")
        write_hdf5(path.with_name(shard), {name: array})
        weight_map.setdefault("/" + name.rpartition("/")[0], []).append(shard)
    path.write_text(json.dumps({"metadata": {"total_size": 0.0}, "weight_map": weight_map}))
    return path


def write_safetensors(path, tensors=TENSORS, metadata=None):
    """Writes a file in `.safetensors` with the package of that name.

    Args:
        path: Where.
        tensors: A dict from name to array.
        metadata: A dict of strings.

    Returns:
        `path`.
    """
    import safetensors.numpy  # The tests of other backends run without it.

    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, path, metadata)
    return path


WRITERS = {".weights.h5": write_hdf5, ".keras": write_keras, ".weights.json": write_shards}
