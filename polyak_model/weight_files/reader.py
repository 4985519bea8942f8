"""Opens weight files without Keras, as untrusted input."""

import contextlib
import dataclasses
import os
import pathlib

import h5py

from polyak_model.weight_files import safetensors_file
from polyak_model.weight_files.hdf5 import GuardedFile, list_variables
from polyak_model.weight_files.keras_archive import (
    CONFIG,
    METADATA,
    WEIGHTS,
    open_archive,
    open_member,
    parse_json,
    read_json,
)
from polyak_model.weight_files.refusal import in_one_line, opened, refusal, refusing

KERAS_ENDINGS = (".weights.h5", ".keras", ".weights.json")
ENDINGS = (*KERAS_ENDINGS, safetensors_file.ENDING)
_LONGEST_MAP = 16 * 2**20


@dataclasses.dataclass
class WeightFile:
    """An open weight file, see `open_weights`.

    Attributes:
        path: The path as it was given.
        kind: The ending: one of `ENDINGS`.
        variables: A dict from the path inside, such as `layers/dense/vars/0`,
            to a variable: `name`, `shape`, `dtype` (as Keras names it),
            `nbytes` and `read()`.
        attributes: A dict from the path of each group inside to its attributes,
            a dict; the outermost group is "". Empty for a `.safetensors` file.
        config: The contents of config.json, a dict; None unless a `.keras` file.
        metadata: The contents of metadata.json, a dict, in a `.keras` file, and
            the metadata of a `.safetensors` file; else None.
        archive: The open `zipfile.ZipFile`; None unless a `.keras` file.
        places: The paths of its parts: `path` and, for a `.weights.json` file,
            the shards.
    """

    path: os.PathLike | str
    kind: str
    variables: dict
    attributes: dict
    config: dict | None = None
    metadata: dict | None = None
    archive: object = None
    places: tuple = ()

    def __post_init__(self):
        self.places = (self.path, *self.places)


@contextlib.contextmanager
def open_weights(path):
    """Opens a file that Keras or safetensors saved, and checks everything but the numbers.

    No code from the file is executed, nothing is unpickled, and no other file is
    opened, except the shards that a `.weights.json` file names beside it.

    Args:
        path: A file that ends in one of `ENDINGS`.

    Yields:
        A `WeightFile`; its variables can be read until the file is closed.

    Raises:
        InputError: If the file is missing, damaged or contains what no weight
            file of Keras does.

    Example:

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.weights.h5")
    >>> with h5py.File(path, "w") as file:
    ...     file["layers/dense/vars/0"] = [0.5, 1.5]
    >>> with open_weights(path) as weights:
    ...     {name: variable.read() for name, variable in weights.variables.items()}
    {'layers/dense/vars/0': array([0.5, 1.5])}
    """
    with _OPENERS[find_kind(path)](path) as weights:
        yield weights


def find_kind(path):
    """Returns the one of `ENDINGS` in which a path ends.

    Raises:
        InputError: If it is a folder or has another ending.
    """
    if os.path.isdir(path):
        raise refusal(path, "it is a folder", "Name a file in it")
    kind = next((ending for ending in ENDINGS if str(path).endswith(ending)), None)
    if kind is None:
        expected = ", ".join(ENDINGS)
        remedy = "Save it with Keras under such a name"
        if str(path).endswith((".h5", ".hdf5")):
            remedy = "Load it with keras.models.load_model and save the model as .keras"
        raise refusal(path, f"its name must end in one of {expected}", remedy)
    return kind


@contextlib.contextmanager
def _open_hdf5(path):
    with _listed_file(path) as (variables, attributes):
        yield WeightFile(path, ".weights.h5", variables, attributes)


@contextlib.contextmanager
def _open_keras(path):
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(open_archive(path))
        config, metadata = (read_json(archive, name, path) for name in (CONFIG, METADATA))
        member = stack.enter_context(open_member(archive, WEIGHTS, path))
        variables, attributes = stack.enter_context(_listed(member, path))
        yield WeightFile(path, ".keras", variables, attributes, config, metadata, archive)


@contextlib.contextmanager
def _open_shards(path):
    shards = _read_weight_map(path)
    variables, attributes, places = {}, {}, set()
    with contextlib.ExitStack() as stack:
        for shard in sorted({shard for shard, _ in shards}):
            place = pathlib.Path(path).with_name(shard)
            found, groups = stack.enter_context(_listed_file(place))
            for name in found.keys() & variables.keys():
                raise refusal(path, f"{name!r} is in two of its shards")
            variables |= found
            attributes |= {name: groups[name] | attributes.get(name, {}) for name in groups}
            places |= {(shard, name.rpartition("/")[0]) for name in found}
        for shard, group in sorted(places ^ shards):
            raise refusal(
                path,
                f"it and its shard {shard!r} disagree about {group!r}",
                "Copy all shards again",
            )
        places = [pathlib.Path(path).with_name(shard) for shard, _ in shards]
        yield WeightFile(path, ".weights.json", variables, attributes, places=places)


@contextlib.contextmanager
def _open_safetensors(path):
    with safetensors_file.open_tensors(path) as (variables, metadata):
        yield WeightFile(path, safetensors_file.ENDING, variables, {}, metadata=metadata)


_OPENERS = dict(
    zip(ENDINGS, (_open_hdf5, _open_keras, _open_shards, _open_safetensors), strict=True)
)


def _read_weight_map(path):
    """Reads which groups are in which shards: a set of pairs (shard, group)."""
    with opened(path) as file:
        text = file.read(_LONGEST_MAP + 1)
    if len(text) > _LONGEST_MAP:
        raise refusal(path, f"it is longer than {_LONGEST_MAP:,} bytes")
    weight_map = parse_json(text, "it", path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise refusal(path, "it has no `weight_map`")
    pairs = set()
    for group, shards in weight_map.items():
        for shard in shards if isinstance(shards, list) else [shards]:
            if not isinstance(shard, str) or not shard.endswith(".weights.h5"):
                raise refusal(path, f"it names {in_one_line(shard)!r}, which is not a shard")
            if os.path.basename(shard) != shard or "\\" in shard or "\0" in shard:
                raise refusal(path, f"it names {in_one_line(shard)!r}, which is elsewhere")
            pairs.add((shard, group.strip("/")))
    return pairs


@contextlib.contextmanager
def _listed_file(path):
    with opened(path) as file, _listed(GuardedFile(file), path) as listed:
        yield listed


@contextlib.contextmanager
def _listed(guarded, source):
    with refusing(source, "it is not an HDF5 file, or damaged"):
        file = h5py.File(guarded, "r")
    with file:
        variables, attributes = list_variables(file, guarded, source)
        if not any(variable.needs_hdf5 for variable in variables.values()):
            file.close()
        yield variables, attributes
