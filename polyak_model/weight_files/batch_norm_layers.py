"""Finds the BatchNormalization layers of a weight file, without the model."""

import re

from polyak_model.errors import printable

_CLASSES = ("BatchNormalization", "SyncBatchNormalization")
# Keras names groups and layers after the class unless they have a name.
_NAME = re.compile(r"(sync_)?batch_normalization(_\d+)?")


def find_batch_statistics(file):
    """Finds BatchNormalization layers by the names of groups and the config.

    Args:
        file: A `WeightFile`.

    Returns:
        A sorted list of the names of their groups or, if there are none, of the
        layers in the config. A layer of a subclass may be in neither.
    """
    owners = {name.rpartition("/vars/")[0] for name in file.variables}
    groups = {
        owner
        for owner in owners
        if _NAME.fullmatch(owner.rpartition("/")[2])
        or _NAME.fullmatch(str(file.attributes.get(f"{owner}/vars", {}).get("name", "")))
    }
    return sorted(groups or map(printable, _find_in_config(file.config)))


def _find_in_config(config):
    """Yields names of layers; without recursion, since a config may be nested deep."""
    pending = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            name, config = item.get("class_name"), item.get("config")
            if name in _CLASSES:
                yield str(config.get("name", name)) if isinstance(config, dict) else name
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
