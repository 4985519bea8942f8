"""The progress bar of commands that may take long."""

import contextlib
import sys

from rich.console import Console
from rich.progress import Progress


@contextlib.contextmanager
def show_progress(description, quiet=False):
    """Shows a progress bar on stderr while the block runs, and erases it at the end.

    Nothing is shown unless stderr is a terminal that can move its cursor.

    Args:
        description: A string, what is being done.
        quiet: Bool. Whether to show nothing. Defaults to False.

    Yields:
        `update(share, description)`: sets the share done, a float in [0, 1], and
        the description. Until its first call the bar pulses.
    """
    console = Console(stderr=True)
    # FORCE_COLOR makes rich take a pipe for a terminal.
    is_hidden = quiet or not sys.stderr.isatty() or console.is_dumb_terminal
    bar = Progress(console=console, transient=True, redirect_stdout=False, disable=is_hidden)
    with bar:
        task = bar.add_task(description, total=None)

        def update(share, description=description):
            bar.update(task, total=1.0, completed=share, description=description)

        yield update
