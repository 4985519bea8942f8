"""Where the average, the raw model and the state of averaging lie in the file of a PolyakModel."""

import re
import typing

from polyak_model.weight_files.keras_archive import parse_json
from polyak_model.weight_files.refusal import refusal

AVERAGE = "average_model"
_STATE_NAME = re.compile(r"shadow(_\d+)?")
_LONGEST_DESCRIPTION = 32 * 2**20


class Wrapper(typing.NamedTuple):
    """The groups of one PolyakModel in a file.

    Attributes:
        path: The group of the PolyakModel; "" when the file is of it alone.
        average: The group of the average model.
        raw: The group of the raw model.
        state: The group of the step, the rule and the residuals.
    """

    path: str
    average: str
    raw: str
    state: str


def find_wrappers(weights):
    """Finds every PolyakModel in a file.

    Args:
        weights: A `WeightFile`.

    Returns:
        List of `Wrapper`, in the order of their paths; a PolyakModel that is the
        whole file comes first.

    Example:

    >>> from polyak_model.weight_files.reader import WeightFile
    >>> groups = dict.fromkeys(["", "average_model", "layers/dense_net", "layers/shadow"], {})
    >>> find_wrappers(WeightFile("a.weights.h5", ".weights.h5", {}, groups))
    [Wrapper(path='', average='average_model', raw='layers/dense_net', state='layers/shadow')]
    """
    found = []
    for average in sorted(weights.attributes):
        path, _, name = average.rpartition("/")
        if name == AVERAGE:
            layers = _children(weights, join(path, "layers"))
            state = _find_state(weights, layers)
            raw = [layer for layer in layers if layer != state]
            if state and len(raw) == 1:
                found.append(Wrapper(path, average, raw[0], state))
    return sorted(found)


def check_plain(files):
    """Raises `InputError` if one of the files is of a PolyakModel, which is two models.

    Args:
        files: `WeightFile`s.
    """
    for file in files:
        if any(not wrapper.path for wrapper in find_wrappers(file)):
            raise refusal(
                file.path,
                "it is the file of a PolyakModel, which is two models",
                "Take one of them out first: polyak-model extract FILE --contents average -o OUT",
            )


def join(path, name):
    """Returns the path of a group inside another, "" being the outermost.

    Example:

    >>> join("", "layers"), join("layers", "dense")
    ('layers', 'layers/dense')
    """
    return f"{path}/{name}" if path else name


def _children(weights, path):
    inside = path + "/"
    return [
        name
        for name in weights.attributes
        if name.startswith(inside) and "/" not in name.removeprefix(inside)
    ]


def _find_state(weights, layers):
    described = [layer for layer in layers if _description(layer) in weights.variables]
    if len(described) == 1:
        return described[0]
    # A raw model whose class has the same name comes first and takes the plain one.
    named = [layer for layer in layers if _STATE_NAME.fullmatch(layer.rpartition("/")[2])]
    return max(named, key=len, default=None)


def _description(state):
    return f"{state}/vars/description"


def read_step(weights, wrapper):
    """Reads how many optimizer steps were averaged.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        An int.

    Raises:
        InputError: If the file does not say.
    """
    step = weights.variables.get(f"{wrapper.state}/vars/0")
    if step is None or step.shape != () or step.dtype != "int64":
        raise refusal(weights.path, f"{wrapper.state!r} does not hold the step of the average")
    return int(step.read())


def read_rule(weights, wrapper):
    """Reads by which rule was averaged.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        A dict with `class_name` and `config`, or None if the file does not say:
        a file of weights alone that an early version wrote.

    Raises:
        InputError: If what the file says is no rule.
    """
    description = weights.variables.get(_description(wrapper.state))
    if description is not None:
        if description.dtype != "uint8" or description.nbytes > _LONGEST_DESCRIPTION:
            raise refusal(weights.path, f"{description.name!r} is no description of an average")
        text = description.read().tobytes()
        rule = parse_json(text, f"its {description.name!r}", weights.path).get("rule")
    elif weights.config is not None and not wrapper.path:
        rule = _get(weights.config, "config", "average")
    else:
        return None
    if not isinstance(_get(rule, "class_name"), str) or not isinstance(_get(rule, "config"), dict):
        raise refusal(weights.path, "it does not say by which rule was averaged")
    return rule


def _get(value, *keys):
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
