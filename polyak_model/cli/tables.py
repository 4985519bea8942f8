"""Tables as aligned columns of text."""

import io
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyak_model.errors import printable

# Wider than any table, so that no name is wrapped where a program may read it.
_UNLIMITED = 2**16


def format_table(header, rows, left=1):
    """Formats a table as plain text.

    Args:
        header: List of strings.
        rows: List of lists of as many strings. Control characters in them are
            escaped, since names may come from files.
        left: Int, how many columns are aligned to the left. The others contain
            numbers and are aligned to the right. Defaults to 1.

    Returns:
        A string without a newline at the end.

    Example:

    >>> print(format_table(["layer", "size"], [["dense", "8"], ["output", "1,024"]]))
    layer    size
    dense       8
    output  1,024
    """
    console = Console(file=io.StringIO(), width=_UNLIMITED, force_terminal=False)
    console.print(_make_table(header, rows, left))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def print_table(header, rows, left=1):
    """Prints a table: with a bold header and wrapped names on a terminal, else as plain text.

    Args:
        header: List of strings.
        rows: List of lists of as many strings.
        left: Int, how many columns are aligned to the left. Defaults to 1.
    """
    if sys.stdout.isatty():
        Console().print(_make_table(header, rows, left))
    else:
        print(format_table(header, rows, left))


def _make_table(header, rows, left):
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(header):
        is_number = i >= left
        table.add_column(
            Text(printable(name)),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    for row in rows:
        # A string would be parsed as markup, a text is not.
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
