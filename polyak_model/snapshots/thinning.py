"""Which steps keep their snapshot, so that their number stays bounded however long a run is."""


def find_spacing(step, count):
    """Returns the power of two s for which a run of `step` steps has at most 2 `count` - 1 of s.

    Args:
        step: Int, the steps so far.
        count: Int, at least 1.

    Example:

    >>> [find_spacing(step, 16) for step in (1, 31, 32, 63, 64, 1000)]
    [1, 1, 2, 2, 4, 32]
    """
    spacing = 1
    while step // spacing >= 2 * count:
        spacing *= 2
    return spacing


def find_superfluous(steps, spacing):
    """Returns the steps whose snapshot is no longer needed.

    Of those between two multiples of the spacing, the first is kept: training may
    pass several steps in one batch. The last of all is kept, too.

    Args:
        steps: Iterable of ints.
        spacing: Int.

    Returns:
        A list of ints.

    Example:

    >>> find_superfluous([1, 2, 3, 4, 6, 7], 2)
    [1, 3]
    """
    steps = sorted(steps)
    first = {}
    for step in steps:
        first.setdefault(step // spacing, step)
    needed = {step for multiple, step in first.items() if multiple} | {*steps[-1:]}
    return [step for step in steps if step not in needed]
