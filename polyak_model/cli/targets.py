"""The options that name averages to rebuild: `--rule` and the length."""

from polyak_model import rules
from polyak_model.errors import InputError

# For each option: the rule, and how it is made from a value.
_MAKERS = {
    "relative-width": ("power", rules.PowerAverage.from_relative_width),
    "gamma": ("power", rules.PowerAverage),
    "decay": ("exponential", rules.ExponentialAverage),
    "half-life": ("exponential", rules.ExponentialAverage.from_half_life),
    "eta": ("polynomial", rules.PolynomialAverage),
}
RULES = ("power", "exponential", "uniform", "polynomial")
_EXAMPLES = {
    "power": "--relative-width 0.1",
    "exponential": "--half-life 1000",
    "polynomial": "--eta 3",
}


def make_rule(rule, lengths, start_step=0):
    """Returns the rule that the options of a command name.

    Args:
        rule: Value of `--rule`, or None: the rule that the length belongs to.
        lengths: Dict from the name of an option to its value, or None.
        start_step: Value of `--start-step`. Defaults to 0.

    Returns:
        A `polyak_model.rules.Rule`.

    Raises:
        InputError: If the options contradict each other or are out of range.

    Example:

    >>> make_rule(None, {"decay": 0.9, "eta": None})
    ExponentialAverage(decay=0.9, debias=True, warmup=False, start_step=0, update_every=1)
    >>> make_rule("uniform", {}, start_step=500)
    UniformAverage(start_step=500, update_every=1)
    """
    given = [(name, value) for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        names = " and ".join(f"`--{name}`" for name, _ in given)
        raise InputError(f"An average has one length. Received: {names}. Leave all but one out.")
    if rule == "uniform" or (rule is None and not given and start_step):
        if given:
            raise InputError(f"`--{given[0][0]}` does not apply to --rule uniform. Leave it out.")
        return rules.UniformAverage(start_step)
    if not given:
        example = _EXAMPLES.get(rule, "--relative-width 0.1, --half-life 1000 or --rule uniform")
        raise InputError(
            f"The average to rebuild must have a length. Received: none. Try {example}."
        )
    ((name, value),) = given
    kind, make = _MAKERS[name]
    if rule not in (None, kind):
        raise InputError(
            f"`--{name}` does not apply to --rule {rule}. Leave it out, or try {_EXAMPLES[rule]}."
        )
    try:
        return make(value, start_step=start_step)
    except ValueError as error:
        raise InputError(f"`--{name}` is out of range: {error}") from error


def describe_rule(rule):
    """Returns a rule in a few words.

    Args:
        rule: A `polyak_model.rules.Rule`.

    Example:

    >>> describe_rule(rules.PowerAverage.from_relative_width(0.1))
    'power, relative width 0.1'
    >>> describe_rule(rules.UniformAverage(start_step=500))
    'uniform from step 500'
    """
    start = f" from step {rule.start_step}" if rule.start_step else ""
    if isinstance(rule, rules.PowerAverage):
        return f"power, relative width {rule.relative_width:.4g}{start}"
    if isinstance(rule, rules.ExponentialAverage):
        return f"exponential, decay {rule.decay:.9g}{start}"
    if isinstance(rule, rules.UniformAverage):
        return f"uniform{start}"
    if isinstance(rule, rules.PolynomialAverage):
        return f"polynomial, eta {rule.eta:g}{start}"
    return repr(rule)
