"""Names of averages, and of the routes that they are."""

from polyak_model import rules
from polyak_model.errors import check_choice

ALIAS = "average"
RAW, ENSEMBLE = "raw", "ensemble"


def check_averages(average):
    """Returns the rules that are given by the argument `average` of `PolyakModel`.

    Args:
        average: A decay or a rule, or a dict of them by name.

    Returns:
        A dict of rules by name; a single average is called `"average"`.

    Raises:
        ValueError: If a name or a rule is invalid.

    Example:

    >>> check_averages({"short": 0.99})["short"].decay
    0.99
    """
    if not isinstance(average, dict):
        return {ALIAS: rules.get(average)}
    if not average:
        raise ValueError(
            "`average` must name at least one average, e.g. {'short': 0.99, 'long': 0.999}. "
            "Received: average={}."
        )
    found = {}
    for name, rule in average.items():
        _check_name(name)
        try:
            found[name] = rules.get(rule)
        except ValueError as error:
            raise ValueError(f"In average[{name!r}]: {error}") from error
    return found


def _check_name(name):
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            "`average` must be a dict from identifiers to rules, since their names become those "
            f"of logs. Received: the name {name!r}. Use letters, digits and underscores."
        )
    if name in (ALIAS, RAW, ENSEMBLE):
        raise ValueError(
            f"An average cannot be called {name!r}, which is taken: {ALIAS!r} is the first "
            f"average, {RAW!r} the trained model, {ENSEMBLE!r} both. Received: "
            f"average={{{name!r}: ...}}. Choose another name."
        )


def check_route(argument, route, averages):
    """Returns the name of a route, where `"average"` is the first average.

    Args:
        argument: Name of the argument, for the message.
        route: What was passed.
        averages: The names of the averages, in order.

    Raises:
        ValueError: If there is no such route.

    Example:

    >>> check_route("using", "average", ["short", "long"])
    'short'
    """
    if route == ALIAS:
        return next(iter(averages))
    return check_choice(argument, route, (*averages, RAW, ENSEMBLE))


def check_report(report, inference, averages):
    """Returns the routes that `evaluate` reports, the default route first.

    Args:
        report: Routes, or None for the default route alone.
        inference: The default route.
        averages: The names of the averages, in order.
    """
    if report is None:
        return (inference,)
    if isinstance(report, str):
        example = (*averages, RAW, ENSEMBLE)
        raise ValueError(
            f"`report` must be a list or tuple of routes, e.g. {example}. "
            f"Received: report={report!r}. For one route write report=({report!r},)."
        )
    found = [check_route("report", route, averages) for route in report]
    return tuple(dict.fromkeys([inference, *found]))
