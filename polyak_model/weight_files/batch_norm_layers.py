"""Which layers of a weight file hold statistics of batches, found without the model."""

import re

_CLASSES = ("BatchNormalization", "SyncBatchNormalization")
# Keras names groups and layers after the class unless told otherwise.
_NAME = re.compile(r"(sync_)?batch_normalization(_\d+)?")


def find_batch_statistics(file):
    """Finds BatchNormalization layers by the names of groups and the configuration.

    Args:
        file: A `WeightFile`.

    Returns:
        A sorted list of names: of groups; where there are none, of the layers in
        the configuration. A layer of a subclass that has neither is not found.
    """
    holders = {name.rpartition("/vars/")[0] for name in file.variables}
    groups = {
        holder
        for holder in holders
        if _NAME.fullmatch(holder.rpartition("/")[2])
        or _NAME.fullmatch(str(file.attributes.get(f"{holder}/vars", {}).get("name", "")))
    }
    return sorted(groups or _configured(file.config))


def _configured(config):
    """Walks without recursion through a configuration that may be nested deep."""
    waiting = [config]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            name, config = item.get("class_name"), item.get("config")
            if name in _CLASSES:
                yield str(config.get("name", name)) if isinstance(config, dict) else name
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
