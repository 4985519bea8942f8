from polyak_model.cli.tables import format_table


def test_a_table_has_one_line_per_row_whatever_the_names_contain():
    names = [
        "plain",
        "[red]text",
        ":smile:",
        "two\nlines",
        "\x1b[2Jcleared",
        "\u202egnp",
        "größe",
    ]
    table = format_table(["name", "size"], [[name, "1"] for name in names])
    assert len(table.splitlines()) == 1 + len(names)
    assert table.replace("\n", "").isprintable()
    assert all(name in table for name in ("größe", "[red]text", ":smile:"))
    assert len({len(line) for line in table.splitlines()}) == 1


def test_a_long_name_is_neither_cut_nor_wrapped():
    name = "layer/" * 100
    assert format_table(["name", "size"], [[name, "1000"]]).splitlines()[1] == f"{name}  1000"
