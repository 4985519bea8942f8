"""The folder with the snapshots of one run: names, and which of them belong together."""

import contextlib
import os
import pathlib
import re
import typing

from polyak_model.errors import InputError
from polyak_model.posthoc.basis import Stored
from polyak_model.snapshots.record import read_record
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.refusal import reason

_NAME = re.compile(r"snapshot-\d{10,}\.weights\.h5")


class Snapshot(typing.NamedTuple):
    """A snapshot on disk.

    Attributes:
        path: A `pathlib.Path`.
        record: A `polyak_model.snapshots.record.Record`.
    """

    path: pathlib.Path
    record: typing.Any


class Run(typing.NamedTuple):
    """The snapshots of one run that can be combined.

    Attributes:
        snapshots: List of `Snapshot`s, ordered by step.
        notes: List of sentences about snapshots that do not count.
    """

    snapshots: list
    notes: list

    @property
    def rules(self):
        """The rules of the averages by name, a dict."""
        return self.snapshots[-1].record.rules

    @property
    def step(self):
        """The step of the last snapshot."""
        return self.snapshots[-1].record.step

    def stored(self):
        """Returns all averages in the snapshots, a list of `Stored`."""
        return [
            Stored(each.record.step, name, rule)
            for each in self.snapshots
            for name, rule in each.record.rules.items()
        ]


def snapshot_name(step):
    """Returns the name of the file of a step.

    Example:

    >>> snapshot_name(1234)
    'snapshot-0000001234.weights.h5'
    """
    return f"snapshot-{step:010d}.weights.h5"


def list_snapshots(folder):
    """Reads the records of all snapshots in a folder.

    Args:
        folder: Its path.

    Returns:
        A list of `Snapshot`s, in the order in which they were written.

    Raises:
        InputError: If the folder cannot be read, or a snapshot is damaged.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if _NAME.fullmatch(name))
    except OSError as error:
        raise _folder_error(folder, reason(error), "Check the path") from error
    found = []
    for name in names:
        path = pathlib.Path(folder, name)
        with open_weights(path) as weights:
            found.append(Snapshot(path, read_record(weights)))
    return sorted(found, key=lambda each: each.record.sequence)


def read_run(folder):
    """Finds the snapshots in a folder that can be combined.

    Args:
        folder: Its path.

    Returns:
        A `Run`.

    Raises:
        InputError: If there are none, or they differ in their run or rules.
    """
    snapshots = list_snapshots(folder)
    if not snapshots:
        raise _folder_error(
            folder, "it contains no snapshots", "Name the folder of an AverageSnapshots callback"
        )
    newest = snapshots[-1]
    for other in snapshots:
        if other.record.run != newest.record.run:
            raise _folder_error(
                folder,
                f"{newest.path.name!r} and {other.path.name!r} are of different runs",
                "Move the files of one of them to another folder",
            )
    snapshots, notes = _leave_out_abandoned(snapshots)
    for other in snapshots:
        if other.record.rules != newest.record.rules:
            raise _folder_error(
                folder,
                f"the rules differ: {_list_rules(other)} in {other.path.name!r}, "
                f"{_list_rules(newest)} in {newest.path.name!r}",
                "Move the files with the rules that do not count to another folder",
            )
    return Run(snapshots, notes)


def _leave_out_abandoned(snapshots):
    newest = snapshots[-1].record
    current = [each for each in snapshots if each.record.period == newest.period]
    # Training went back to an earlier step, and wrote others from there on.
    kept = [each for each in current if each.record.step <= newest.step]
    notes = [
        f"{count} of {len(snapshots)} snapshots do not count: {why}."
        for count, why in (
            (len(snapshots) - len(current), "averaging was restarted after them"),
            (len(current) - len(kept), f"training went back to an earlier step than {newest.step}"),
        )
        if count
    ]
    return sorted(kept, key=lambda each: each.record.step), notes


def _list_rules(snapshot):
    return " and ".join(f"{name}={rule}" for name, rule in snapshot.record.rules.items())


def _folder_error(folder, problem, remedy):
    return InputError(f"Cannot use the folder {str(folder)!r}: {problem}. {remedy}.")


@contextlib.contextmanager
def opened_snapshots(snapshots):
    """Opens snapshots.

    Args:
        snapshots: Iterable of `Snapshot`s.

    Yields:
        A dict from step to `WeightFile`.

    Raises:
        InputError: If one cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        yield {each.record.step: stack.enter_context(open_weights(each.path)) for each in snapshots}
