"""Reads what a PolyakModel wrote to a weight file, without Keras."""

import typing

from polyak_model.errors import InputError
from polyak_model.saving import layout
from polyak_model.weight_files.refusal import refusal

_LONGEST_DESCRIPTION = 4 * 2**20


class Wrapper(typing.NamedTuple):
    """The groups of one PolyakModel in a file.

    Attributes:
        path: The group of the PolyakModel; "" if it is the whole file.
        averages: Dict with the group of each average model, by name.
        raw: The group of the raw model.
        state: The group of the step, of master copies and of residuals.
        description: The path of the description, which files of an early
            version lack.
    """

    path: str
    averages: dict
    raw: str
    state: str
    description: str


def find_wrappers(weights):
    """Finds every PolyakModel in a file.

    Args:
        weights: A `WeightFile`.

    Returns:
        List of `Wrapper`, sorted by path; a PolyakModel that is the whole file
        comes first.

    Example:

    >>> from polyak_model.weight_files.reader import WeightFile
    >>> groups = dict.fromkeys(["averages", "averages/short", "raw_model", "shadow"], {})
    >>> (wrapper,) = find_wrappers(WeightFile("a.weights.h5", ".weights.h5", {}, groups))
    >>> wrapper.averages, wrapper.raw
    ({'short': 'averages/short'}, 'raw_model')
    """
    found = []
    for group in weights.attributes:
        path, _, name = group.rpartition("/")
        if name == layout.AVERAGES:
            found.append(_find_groups(weights, path))
        elif name == layout.AVERAGE_1:
            found.append(_find_groups_of_format_1(weights, path))
    return sorted(filter(None, found), key=lambda wrapper: wrapper.path)


def _find_groups(weights, path):
    names = [layout.AVERAGES, layout.RAW, layout.STATE]
    averages, raw, state = (_join(path, name) for name in names)
    if raw not in weights.attributes or state not in weights.attributes:
        return None
    groups = {group.rpartition("/")[2]: group for group in _children(weights, averages)}
    description = layout.variable_path(path, layout.DESCRIPTION)
    return Wrapper(path, groups, raw, state, description)


def _find_groups_of_format_1(weights, path):
    layers = _children(weights, _join(path, layout.LAYERS_1))
    state = _find_state_of_format_1(weights, layers)
    raw = [layer for layer in layers if layer != state]
    if not state or len(raw) != 1:
        return None
    averages = {layout.ONLY: _join(path, layout.AVERAGE_1)}
    return Wrapper(path, averages, raw[0], state, _description_of_format_1(state))


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
    name = layout.STEP if _is_named(weights, wrapper) else layout.STEP_1
    step = weights.variables.get(layout.variable_path(wrapper.state, name))
    if step is None or step.shape != () or step.dtype not in ("int32", "int64"):
        raise refusal(weights.path, f"{wrapper.state!r} does not contain the step of the average")
    return int(step.read())


def read_description(weights, wrapper):
    """Reads the description of the averages.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        A dict, see `layout.decode`; None for a file of an early version, which
        does not contain it.

    Raises:
        InputError: If the description cannot be read.
        ValueError: If it is damaged, or of a newer format.
    """
    description = weights.variables.get(wrapper.description)
    if description is None:
        return None
    if description.dtype != "uint8" or description.nbytes > _LONGEST_DESCRIPTION:
        raise refusal(weights.path, f"{description.name!r} is not the description of a rule")
    return layout.decode(description.read())


def read_rules(weights, wrapper):
    """Reads the averaging rules.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        A dict by name of the average, in the order of the model, of dicts with
        `class_name` and `config`; of None for a file of weights alone by an
        early version, which does not contain the rule.

    Raises:
        InputError: If the description is damaged.
    """
    return read_rules_and_shared(weights, wrapper)[0]


def read_rules_and_shared(weights, wrapper):
    """Reads the averaging rules, and which weights averages share with the raw model.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        Tuple of the dict of `read_rules` and a list of positions.

    Raises:
        InputError: If the description is damaged.
    """
    try:
        description = read_description(weights, wrapper)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"Cannot use {str(weights.path)!r}. {error}") from error
    shared = [] if description is None else description.get("shared", [])
    if description is not None:
        rules = description.get("averages", {layout.ONLY: description.get("rule")})
    elif weights.config is not None and not wrapper.path:
        rules = {layout.ONLY: _get(weights.config, "config", layout.CONFIG_RULE)}
    else:
        return dict.fromkeys(wrapper.averages), shared
    for rule in rules.values():
        if not isinstance(_get(rule, "class_name"), str) or not isinstance(
            _get(rule, "config"), dict
        ):
            raise refusal(weights.path, "it does not describe the averaging rule")
    if set(rules) != set(wrapper.averages):
        raise refusal(
            weights.path,
            f"it describes the averages {sorted(rules)} and contains {sorted(wrapper.averages)}",
        )
    return rules, shared


def _is_named(weights, wrapper):
    return layout.variable_path(wrapper.state, layout.STEP) in weights.variables


def _join(path, name):
    return f"{path}/{name}" if path else name


def _children(weights, path):
    inside = path + "/"
    return [
        name
        for name in weights.attributes
        if name.startswith(inside) and "/" not in name.removeprefix(inside)
    ]


def _find_state_of_format_1(weights, layers):
    described = [x for x in layers if _description_of_format_1(x) in weights.variables]
    if len(described) == 1:
        return described[0]
    # If the class of the raw model has the same name, the state is the second of the two.
    named = [layer for layer in layers if layout.STATE_1.fullmatch(layer.rpartition("/")[2])]
    return max(named, key=len, default=None)


def _description_of_format_1(state):
    return layout.variable_path(state, layout.DESCRIPTION)


def _get(value, *keys):
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
