import os
import signal
import subprocess
import sys

import pytest

from polyak_model.weight_files.atomic_write import atomic_file, atomic_folder


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.txt"
    path.write_text("old")
    return path


def test_what_is_written_replaces_the_file_and_leaves_nothing_beside_it(path):
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def fail(path, failure):
    with atomic_file(path) as partial:
        partial.write_text("new")
        raise failure


@pytest.mark.parametrize("failure", [ValueError("own"), KeyboardInterrupt()])
def test_when_writing_fails_the_old_file_stays_and_the_failure_is_told(path, failure):
    with pytest.raises(type(failure)):
        fail(path, failure)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_of_the_system_names_the_file_and_what_became_of_it(path):
    with pytest.raises(
        OSError, match="Cannot write '.*model.txt': No space left on device"
    ) as told:
        fail(path, OSError(28, "a page of HDF5"))
    assert "What was there before is unchanged" in str(told.value)
    assert told.value.errno == 28


def test_nothing_is_begun_without_room_for_all_of_it(path):
    with pytest.raises(OSError, match="Cannot write '.*model.txt'"), atomic_file(path, 2**62):
        raise AssertionError("was begun")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_in_no_folder_is_refused(tmp_path):
    with pytest.raises(OSError, match="nowhere/model.txt': No such file or directory"):
        fail(tmp_path / "nowhere" / "model.txt", None)


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder"), atomic_file(tmp_path):
        pass


def test_a_link_keeps_pointing_at_the_file_which_is_replaced(path):
    link = path.with_name("best.txt")
    link.symlink_to(path)
    with atomic_file(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"


WRITE_UNTIL_KILLED = """
import os, signal, sys
from polyak_model.weight_files.atomic_write import atomic_file, atomic_folder
with atomic_file(sys.argv[1]) as partial:
    partial.write_text("new")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.read()
"""


def write_beside(path):
    with atomic_file(path.with_name("beside.txt")) as partial:
        partial.write_text("beside")


def write(path, ending):
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), ending]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.processes
@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signal and no such locks")
def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_live_one_writes_is_not(path):
    with write(path, "killed") as process:
        assert process.wait() == -signal.SIGKILL
    assert path.read_text() == "old"
    (abandoned,) = path.parent.glob(".polyak_model-partial-*")
    write_beside(path)
    assert abandoned.exists()
    os.utime(abandoned, (0, 0))
    with write(path, "alive") as process:
        assert process.stdout.readline() == b"writing\n"
        assert not abandoned.exists()
        (alive,) = path.parent.glob(".polyak_model-partial-*")
        os.utime(alive, (0, 0))
        write_beside(path)
        assert alive.exists()
    assert path.read_text() == "new"
    assert not list(path.parent.glob(".polyak_model-partial-*"))


# Folders

PARTS = ("graph.pb", "weights")


def write_folder(place, text="new"):
    with atomic_folder(place, PARTS) as partial:
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
    write_folder(place)
    assert names(place) == ["weights"]
    assert (place / "weights" / "0").read_text() == "new"
    assert names(tmp_path) == ["served"]


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    write_folder(tmp_path / "v1", "old")
    (tmp_path / "latest").symlink_to("v1")
    write_folder(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1" / "weights" / "0").read_text() == "new"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_exchanged_stays(tmp_path, monkeypatch, failing):
    place, rename, calls = tmp_path / "served", os.rename, []
    write_folder(place, "old")

    def rename_sometimes(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_sometimes)
    expected = "Cannot write '.*served': Input/output error. What was there before is unchanged"
    with pytest.raises(OSError, match=expected):
        write_folder(place)
    assert (place / "weights" / "0").read_text() == "old"
    assert names(tmp_path) == ["served"]


def test_a_file_or_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(NotADirectoryError, match="it is a file.*Choose another name"):
        write_folder(tmp_path / "notes.txt")
    with pytest.raises(FileExistsError, match="for instance 'notes.txt'"):
        write_folder(tmp_path)
    assert names(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_nothing_is_left_of_a_folder_that_nobody_wrote(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "served", PARTS):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_a_killed_process_put_aside_is_never_removed(tmp_path):
    former = tmp_path / ".polyak_model-partial-killed" / "former-served"
    former.mkdir(parents=True)
    os.utime(former.parent, (0, 0))
    write_folder(tmp_path / "served")
    assert former.exists()
