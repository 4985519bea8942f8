import os

import pytest

from polyak_model.whole_files import folder_written_whole

PARTS = ("graph.pb", "weights")


def write(place, text="new"):
    with folder_written_whole(place, PARTS) as partial:
        (partial / "weights").mkdir(parents=True)
        (partial / "weights" / "0").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("former", [(), ("graph.pb",), None], ids=["empty", "old", "missing"])
def test_a_whole_folder_replaces_what_was_there(tmp_path, former):
    place = tmp_path / "served"
    if former is not None:
        place.mkdir()
        for name in former:
            (place / name).write_text("old")
    write(place)
    assert names(place) == ["weights"]
    assert (place / "weights" / "0").read_text() == "new"
    assert names(tmp_path) == ["served"]


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    write(tmp_path / "v1", "old")
    (tmp_path / "latest").symlink_to("v1")
    write(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1" / "weights" / "0").read_text() == "new"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_exchanged_stays(tmp_path, monkeypatch, failing):
    place, rename, calls = tmp_path / "served", os.rename, []
    write(place, "old")

    def rename_sometimes(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_sometimes)
    expected = "Cannot write '.*served': Input/output error. What was there before is unchanged"
    with pytest.raises(OSError, match=expected):
        write(place)
    assert (place / "weights" / "0").read_text() == "old"
    assert names(tmp_path) == ["served"]


def test_a_file_or_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(NotADirectoryError, match="it is a file.*Choose another name"):
        write(tmp_path / "notes.txt")
    with pytest.raises(FileExistsError, match="'notes.txt' for instance"):
        write(tmp_path)
    assert names(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_nothing_is_left_of_a_folder_that_nobody_wrote(tmp_path):
    with pytest.raises(FileNotFoundError), folder_written_whole(tmp_path / "served", PARTS):
        pass
    assert names(tmp_path) == []
