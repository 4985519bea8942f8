"""Tables as aligned text."""


def format_table(header, rows, left=1):
    """Aligns cells in columns.

    Args:
        header: List of strings.
        rows: List of lists of as many strings. What a terminal would obey rather
            than show is escaped, since names come from files.
        left: How many columns are aligned to the left; the others hold numbers.

    Returns:
        A string without a newline at the end.

    Example:

    >>> print(format_table(["layer", "size"], [["dense", "8"], ["output", "1,024"]]))
    layer    size
    dense       8
    output  1,024
    """
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def printable(text):
    """Escapes what a terminal would obey rather than show.

    Args:
        text: A string.

    Example:

    >>> printable("dense"), printable("\\x1b[2J")
    ('dense', '\\\\x1b[2J')
    """
    return text if text.isprintable() else ascii(text)[1:-1]
