"""Reads what a PolyakModel wrote to a weight file, without Keras."""

import typing

from polyak_model.saving import layout
from polyak_model.weight_files.keras_archive import parse_json
from polyak_model.weight_files.refusal import refusal

_LONGEST_DESCRIPTION = 4 * 2**20


class Wrapper(typing.NamedTuple):
    """The groups of one PolyakModel in a file.

    Attributes:
        path: The group of the PolyakModel; "" if it is the whole file.
        average: The group of the average model.
        raw: The group of the raw model.
        state: The group of the step, the description and the residuals.
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
        List of `Wrapper`, sorted by path; a PolyakModel that is the whole file
        comes first.

    Example:

    >>> from polyak_model.weight_files.reader import WeightFile
    >>> groups = dict.fromkeys(["", "average_model", "layers/dense_net", "layers/shadow"], {})
    >>> find_wrappers(WeightFile("a.weights.h5", ".weights.h5", {}, groups))
    [Wrapper(path='', average='average_model', raw='layers/dense_net', state='layers/shadow')]
    """
    found = []
    for average in sorted(weights.attributes):
        path, _, name = average.rpartition("/")
        if name == layout.AVERAGE:
            layers = _children(weights, _join(path, layout.LAYERS))
            state = _find_state(weights, layers)
            raw = [layer for layer in layers if layer != state]
            if state and len(raw) == 1:
                found.append(Wrapper(path, average, raw[0], state))
    return sorted(found)


def find_whole_wrapper(weights):
    """Returns the `Wrapper` of a file that is one PolyakModel.

    Args:
        weights: A `WeightFile`.

    Raises:
        InputError: If the file is of another model.
    """
    wrappers = find_wrappers(weights)
    if not wrappers:
        raise refusal(
            weights.path,
            "it contains no average",
            "Name a file that PolyakModel.save or save_weights wrote",
        )
    if wrappers[0].path:
        raise refusal(
            weights.path,
            f"it is of a model with a PolyakModel inside, at {wrappers[0].path!r}",
            "Load it with Keras and save the `average_model` or `raw_model` of that part",
        )
    return wrappers[0]


def check_plain(files):
    """Checks that no file is of a PolyakModel, which contains two models.

    Args:
        files: `WeightFile`s.

    Raises:
        InputError: If one is.
    """
    for file in files:
        if any(not wrapper.path for wrapper in find_wrappers(file)):
            raise refusal(
                file.path,
                "it is the file of a PolyakModel, which contains two models",
                "Extract one of them first: polyak-model extract FILE --contents average -o OUT",
            )


def read_step(weights, wrapper):
    """Reads the number of optimizer steps since averaging started.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        An int.

    Raises:
        InputError: If the file does not contain it.
    """
    step = weights.variables.get(layout.variable_path(wrapper.state, layout.STEP))
    if step is None or step.shape != () or step.dtype != "int64":
        raise refusal(weights.path, f"{wrapper.state!r} does not contain the step of the average")
    return int(step.read())


def read_rule(weights, wrapper):
    """Reads the averaging rule.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        A dict with `class_name` and `config`; None for a file of weights alone
        by an early version, which does not contain the rule.

    Raises:
        InputError: If the description is damaged.
    """
    description = weights.variables.get(_description(wrapper.state))
    if description is not None:
        if description.dtype != "uint8" or description.nbytes > _LONGEST_DESCRIPTION:
            raise refusal(weights.path, f"{description.name!r} is not the description of a rule")
        text = description.read().tobytes()
        rule = parse_json(text, f"its {description.name!r}", weights.path).get("rule")
    elif weights.config is not None and not wrapper.path:
        rule = _get(weights.config, "config", layout.CONFIG_RULE)
    else:
        return None
    if not isinstance(_get(rule, "class_name"), str) or not isinstance(_get(rule, "config"), dict):
        raise refusal(weights.path, "it does not describe the averaging rule")
    return rule


def _join(path, name):
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
    # If the class of the raw model has the same name, the state is the second of the two.
    named = [layer for layer in layers if layout.STATE.fullmatch(layer.rpartition("/")[2])]
    return max(named, key=len, default=None)


def _description(state):
    return layout.variable_path(state, layout.DESCRIPTION)


def _get(value, *keys):
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
