"""Groups of a weight file with training state: optimizers and metrics, which are not weights.

Keras names the children of `layers` after their classes, and all other groups
after attributes of the model, where an optimizer may have any name. It is
recognized by its variables: an integer scalar, the iterations, comes first; then
the learning rate, a float scalar, or, under a schedule, moments in the shapes of
the weights. A layer saves its trainable variables first. tf_keras saves compiled
metrics in a group `metrics`, which cannot be an attribute of a model.
"""

import collections
import itertools


def find_training_state(weights):
    """Finds the groups with the state of optimizers and metrics.

    Args:
        weights: A `WeightFile`.

    Returns:
        Tuple `(optimizers, metrics)` of sets of groups.

    Example:

    >>> from polyak_model.weight_files.reader import WeightFile
    >>> groups = dict.fromkeys(["", "layers", "layers/optimizer", "optimizer", "metrics"], {})
    >>> find_training_state(WeightFile("a.weights.h5", ".weights.h5", {}, groups))
    ({'optimizer'}, {'metrics'})
    """
    optimizers, metrics = set(), set()
    shapes = collections.Counter(variable.shape for variable in weights.variables.values())
    for group in weights.attributes:
        parent, _, name = group.rpartition("/")
        if not group or parent.rpartition("/")[2] == "layers":
            continue
        if name == "metrics":
            metrics.add(group)
        elif name == "optimizer" or _is_optimizer(name, _own_variables(weights, group), shapes):
            optimizers.add(group)
    return optimizers, metrics


def is_inside(name, groups):
    """Returns whether a variable or group is in a set of groups or inside one of them.

    Example:

    >>> is_inside("optimizer/vars/0", {"optimizer"}), is_inside("optimizers", {"optimizer"})
    (True, False)
    """
    return any(path in groups for path in itertools.accumulate(name.split("/"), "{}/{}".format))


def split_variables(weights, group=""):
    """Splits the variables of a model into its weights and the state of its optimizers.

    Args:
        weights: A `WeightFile`.
        group: The group of the model. Defaults to "", the whole file.

    Returns:
        Tuple `(model, optimizers)` of dicts from the path inside the group to
        the variable. Metrics are in neither.

    Example:

    >>> import numpy as np
    >>> from polyak_model.weight_files.reader import WeightFile
    >>> file = dict.fromkeys(["layers/dense/vars/0", "optimizer/vars/0"], np.zeros(3))
    >>> groups = dict.fromkeys(["", "layers", "layers/dense", "optimizer"], {})
    >>> weights = WeightFile("a.weights.h5", ".weights.h5", file, groups)
    >>> [list(part) for part in split_variables(weights)]
    [['layers/dense/vars/0'], ['optimizer/vars/0']]
    """
    optimizers, metrics = find_training_state(weights)
    prefix = f"{group}/" if group else ""
    model, state = {}, {}
    for name, variable in weights.variables.items():
        if name.startswith(prefix) and not is_inside(name, metrics):
            target = state if is_inside(name, optimizers) else model
            target[name.removeprefix(prefix)] = variable
    return model, state


def _own_variables(weights, group):
    numbered = (weights.variables.get(f"{group}/vars/{n}") for n in itertools.count())
    return list(itertools.takewhile(lambda variable: variable is not None, numbered))


def _is_optimizer(name, variables, shapes):
    """Returns whether variables are those of an optimizer.

    Args:
        name: Name of their group.
        variables: List of variables.
        shapes: A `Counter` of the shapes of all variables in the file.
    """
    if not variables or variables[0].shape != () or "int" not in variables[0].dtype:
        return False
    if len(variables) == 1:
        return "optimizer" in name
    if variables[1].shape == ():
        return "float" in variables[1].dtype
    moments = collections.Counter(variable.shape for variable in variables if variable.shape)
    return all(shapes[shape] > count for shape, count in moments.items())
