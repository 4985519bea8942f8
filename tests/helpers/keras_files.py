"""What is in a file of Keras, to compare two of them."""

import io
import zipfile

import h5py


def contents_of(path):
    """Returns the contents of a `.keras` or `.weights.h5` file, but for its date, as a dict."""
    if path.suffix != ".keras":
        return _groups_and_tensors(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    del members["metadata.json"]
    return {
        name: _groups_and_tensors(io.BytesIO(data)) if name.endswith(".h5") else data
        for name, data in members.items()
    }


def _groups_and_tensors(source):
    found = {}

    def add(name, each):
        is_tensor = isinstance(each, h5py.Dataset)
        value = (each.dtype, each.shape, each[()].tobytes()) if is_tensor else None
        found[name] = dict(each.attrs), value

    with h5py.File(source) as file:
        file.visititems(add)
        return {"": dict(file.attrs), **found}
