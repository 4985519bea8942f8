"""The progress bar of commands that may take long."""

import contextlib
import sys

from rich.console import Console
from rich.progress import Progress


@contextlib.contextmanager
def show_progress(description, quiet=False):
    """Shows a progress bar on stderr while the block runs, and erases it at the end.

    Nothing is shown where stderr is not a terminal.

    Args:
        description: A string, what is being done.
        quiet: Bool. Whether to show nothing. Defaults to False.

    Yields:
        `update(share, description)`: sets the share done, a float in [0, 1], and
        the description. Until its first call the bar pulses.
    """
    bar = Progress(
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        disable=quiet or not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(description, total=None)

        def update(share, description=description):
            bar.update(task, total=1.0, completed=share, description=description)

        yield update
