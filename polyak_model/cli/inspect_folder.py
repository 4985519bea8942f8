"""`polyak-model inspect FOLDER`: which averages can be rebuilt from snapshots."""

from polyak_model.cli.targets import describe_rule
from polyak_model.errors import printable
from polyak_model.posthoc.reach import find_reachable, half_lives, relative_widths
from polyak_model.snapshots.folder import read_run
from polyak_model.snapshots.rebuilding import fit

ERRORS = (0.01, 0.05)


def describe_folder(folder):
    """Describes the snapshots in a folder in types that JSON knows.

    Args:
        folder: Its path.

    Returns:
        A dict with `run`, `steps`, `averages` (a dict from name to a description
        of the rule), `reachable` and `notes`. `reachable` has, for each error as
        a string, `relative_widths` and `half_lives`, lists of ranges.

    Raises:
        InputError: If the snapshots cannot be used.
    """
    run = read_run(folder)
    basis = fit(run)
    widths = find_reachable(basis, relative_widths(), ERRORS)
    lives = find_reachable(basis, half_lives(run.step), ERRORS)
    return {
        "run": run.snapshots[-1].record.run,
        "steps": [each.record.step for each in run.snapshots],
        "averages": {name: describe_rule(rule) for name, rule in run.rules.items()},
        "reachable": {
            str(error): {"relative_widths": w, "half_lives": h}
            for error, w, h in zip(ERRORS, widths, lives, strict=True)
        },
        "notes": run.notes,
    }


def print_folder(description):
    """Prints what `describe_folder` returned.

    Args:
        description: A dict.
    """
    steps = description["steps"]
    print(f"run        {printable(description['run'])}")
    print(f"snapshots  {len(steps)}, from step {steps[0]:,} to {steps[-1]:,}")
    for name, rule in description["averages"].items():
        print(f"average    {printable(name)}: {rule}")
    for note in description["notes"]:
        print(printable(note))
    print("\nWhat can be rebuilt at the last step, by the expected error:\n")
    for error, lengths in description["reachable"].items():
        percent = f"{100 * float(error):g} %"
        print(f"{percent}  relative widths {_ranges(lengths['relative_widths'])}")
        print(f"{' ' * len(percent)}  half-lives {_ranges(lengths['half_lives'])} steps")


def _ranges(ranges):
    return ", ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges) or "none"
