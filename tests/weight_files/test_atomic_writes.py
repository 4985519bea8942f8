import os
import signal
import stat
import subprocess
import sys

import h5py
import pytest

from polyak_model.errors import InputError
from polyak_model.weight_files.atomic_write import PREFIX, atomic_file, atomic_folder
from polyak_model.weight_files.output import writing
from polyak_model.weight_files.writer import created_weights

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.txt"
    path.write_text("old")
    return path


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(path):
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
def test_when_writing_fails_the_old_file_stays_and_the_failure_is_raised(path, failure):
    with pytest.raises(type(failure)):
        fail(path, failure)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_of_the_system_names_the_file_and_says_that_it_is_unchanged(path):
    with pytest.raises(
        OSError, match="Cannot write '.*model.txt': No space left on device"
    ) as caught:
        fail(path, OSError(28, "a page of HDF5"))
    assert "What was there before is unchanged" in str(caught.value)
    assert caught.value.errno == 28


def test_nothing_is_written_without_space_for_all_of_it(path):
    with pytest.raises(OSError, match="Cannot write '.*model.txt'"), atomic_file(path, 2**62):
        raise AssertionError("writing has started")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_in_a_missing_folder_is_refused(tmp_path):
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
def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_running_one_is_not(path):
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


def make_old_folder(path, *files):
    path.mkdir()
    for name in files:
        (path / name).write_text("kept")
    os.utime(path, (0, 0))
    return path


def test_folders_that_this_package_did_not_make_are_never_removed(path):
    folders = [
        make_old_folder(path.with_name(".partial-results"), "model.keras"),
        make_old_folder(path.with_name(f"{PREFIX}empty")),
        make_old_folder(path.with_name(f"{PREFIX}notes"), "notes.txt"),
    ]
    elsewhere = make_old_folder(path.with_name("elsewhere"), "made-by-polyak_model")
    path.with_name(f"{PREFIX}link").symlink_to(elsewhere)
    write_beside(path)
    assert all(folder.is_dir() for folder in folders)
    assert (folders[0] / "model.keras").read_text() == "kept"
    assert (elsewhere / "made-by-polyak_model").exists()


def permissions(path):
    status = path.stat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755, 0o444])
def test_a_replaced_file_hands_on_its_mode(path, mode):
    path.chmod(mode)
    before = permissions(path)
    with atomic_file(path) as partial:
        partial.write_text("new")
    assert permissions(path) == before
    assert path.read_text() == "new"


@posix
def test_a_new_file_has_the_mode_that_the_system_gives(path):
    expected = path.with_name("expected.txt")
    expected.write_text("")
    write_beside(path)
    assert permissions(path.with_name("beside.txt")) == permissions(expected)


@posix
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives files away")
def test_a_replaced_file_hands_on_its_owner(path):
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    with atomic_file(path) as partial:
        partial.write_text("new")
    assert permissions(path) == (0o640, 1234, 4321)


@posix
def test_a_file_of_another_owner_is_replaced_where_the_owner_cannot_be_set(path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    path.chmod(0o640)
    with atomic_file(path) as partial:
        partial.write_text("new")
    assert (path.read_text(), permissions(path)[0]) == ("new", 0o640)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "a page of HDF5"),
        OSError("Can't write data (errno = 28, error message = 'No space left on device')"),
        RuntimeError("unable to flush: file write failed: errno = 28, error message = '...'"),
    ],
)
def test_a_full_disk_is_called_a_full_disk_whatever_hdf5_raises(path, error):
    class FullDisk:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h5py, "File", lambda *_, **__: FullDisk())
        with (
            pytest.raises(InputError, match="model.txt': No space left on device. What was there"),
            writing(path) as partial,
            created_weights(partial, like=None),
        ):
            pass
    assert path.read_text() == "old"


# Folders

PARTS = ("graph.pb", "weights")


def write_folder(place, text="new"):
    with atomic_folder(place, PARTS) as partial:
        (partial / "weights").mkdir(parents=True)
        (partial / "weights" / "0").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("former", [(), ("graph.pb",), None], ids=["empty", "old", "missing"])
def test_a_written_folder_replaces_the_old_one(tmp_path, former):
    place = tmp_path / "served"
    if former is not None:
        place.mkdir()
        for name in former:
            (place / name).write_text("old")
    write_folder(place)
    assert names(place) == ["weights"]
    assert (place / "weights" / "0").read_text() == "new"
    assert names(tmp_path) == ["served"]


@posix
def test_a_replaced_folder_hands_on_its_mode(tmp_path):
    write_folder(tmp_path / "served", "old")
    (tmp_path / "served").chmod(0o750)
    write_folder(tmp_path / "served")
    assert permissions(tmp_path / "served")[0] == 0o750


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    write_folder(tmp_path / "v1", "old")
    (tmp_path / "latest").symlink_to("v1")
    write_folder(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1" / "weights" / "0").read_text() == "new"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_stays_if_the_exchange_fails(tmp_path, monkeypatch, failing):
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


def test_a_file_and_a_folder_with_other_contents_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(NotADirectoryError, match="it is a file.*Choose another name"):
        write_folder(tmp_path / "notes.txt")
    with pytest.raises(FileExistsError, match="for instance 'notes.txt'"):
        write_folder(tmp_path)
    assert names(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_nothing_is_left_if_no_folder_was_written(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "served", PARTS):
        pass
    assert names(tmp_path) == []


def test_the_old_folder_that_a_killed_process_moved_away_is_never_removed(tmp_path):
    former = tmp_path / f"{PREFIX}killed" / "former-served"
    former.mkdir(parents=True)
    (former.parent / "made-by-polyak_model").touch()
    os.utime(former.parent, (0, 0))
    write_folder(tmp_path / "served")
    assert former.exists()
