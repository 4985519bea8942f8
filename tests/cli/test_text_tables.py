from polyak_model.cli.tables import format_table


def test_a_table_has_a_line_for_each_row_whatever_the_names_hold():
    names = ["plain", "two\nlines", "\x1b[2Jcleared", "\u202egnp", "größe"]
    table = format_table(["name", "size"], [[name, "1"] for name in names])
    assert len(table.splitlines()) == 1 + len(names)
    assert table.replace("\n", "").isprintable()
    assert "größe" in table
    assert len({len(line) for line in table.splitlines()}) == 1
