"""Groups of a weight file with training state: optimizers and metrics, which are not weights.

Keras names the children of `layers` after their classes, and all other groups
after attributes of the model, where an optimizer may have any name. It is
recognized by its variables: an integer scalar, the iterations, comes first; then
the learning rate, a float scalar, or, under a schedule, moments in the shapes of
the weights. A layer saves its trainable variables first. tf_keras saves compiled
metrics in a group `metrics`, which cannot be an attribute of a model.
"""


def find_training_state(weights):
    """Finds the groups with the state of optimizers and metrics.

    Args:
        weights: A `WeightFile`.

    Returns:
        Tuple `(optimizers, metrics)` of lists of groups.

    Example:

    >>> from polyak_model.weight_files.reader import WeightFile
    >>> groups = dict.fromkeys(["", "layers", "layers/optimizer", "optimizer", "metrics"], {})
    >>> find_training_state(WeightFile("a.weights.h5", ".weights.h5", {}, groups))
    (['optimizer'], ['metrics'])
    """
    optimizers, metrics = [], []
    for group in weights.attributes:
        parent, _, name = group.rpartition("/")
        if not group or parent.rpartition("/")[2] == "layers":
            continue
        if name == "metrics":
            metrics.append(group)
        elif name == "optimizer" or _has_optimizer_variables(weights, group):
            optimizers.append(group)
    return optimizers, metrics


def is_inside(name, groups):
    """Returns whether a variable or group is one of some groups or inside one.

    Example:

    >>> is_inside("optimizer/vars/0", ["optimizer"]), is_inside("optimizers", ["optimizer"])
    (True, False)
    """
    return any(name == group or name.startswith(f"{group}/") for group in groups)


def split_variables(weights, group=""):
    """Splits the variables of a model into its weights and the state of its optimizers.

    Args:
        weights: A `WeightFile`.
        group: The group of the model. Defaults to "", the whole file.

    Returns:
        Tuple `(model, optimizers)` of dicts from the path inside the group to
        the variable. Metrics are in neither.

    Example:

    >>> from polyak_model.weight_files.reader import WeightFile
    >>> file = {"layers/dense/vars/0": 1, "optimizer/vars/0": 2}
    >>> groups = dict.fromkeys(["", "layers", "layers/dense", "optimizer"], {})
    >>> split_variables(WeightFile("a.weights.h5", ".weights.h5", file, groups))
    ({'layers/dense/vars/0': 1}, {'optimizer/vars/0': 2})
    """
    optimizers, metrics = map(tuple, find_training_state(weights))
    prefix = f"{group}/" if group else ""
    model, state = {}, {}
    for name, variable in weights.variables.items():
        if name.startswith(prefix) and not is_inside(name, metrics):
            target = state if is_inside(name, optimizers) else model
            target[name.removeprefix(prefix)] = variable
    return model, state


def _has_optimizer_variables(weights, group):
    first, second = (weights.variables.get(f"{group}/vars/{n}") for n in range(2))
    if first is None or first.shape != () or "int" not in first.dtype:
        return False
    if second is None:
        return "optimizer" in group.rpartition("/")[2]
    if second.shape == ():
        return second.dtype.startswith("float")
    prefix = f"{group}/"
    others = {v.shape for name, v in weights.variables.items() if not name.startswith(prefix)}
    moments = [v.shape for name, v in weights.variables.items() if name.startswith(prefix)]
    return others.issuperset(shape for shape in moments if shape)
