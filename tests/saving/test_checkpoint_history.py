"""What was written last is newest, and the best score is that of the training's own past."""

import os
import pathlib
import shutil

import h5py
import pytest

from polyak_model.saving.checkpoint_history import CheckpointHistory, Position
from polyak_model.saving.score_record import read_record, write_record

START = Position(0, 0, 0)


class Training:
    """Moves a position and writes files at it, as the callback does."""

    def __init__(
        self, folder, at=START, run="this", filepath="{epoch}.weights.h5", callback="best"
    ):
        self.folder, self.run = folder, run
        self.history = CheckpointHistory(str(folder / filepath), callback)
        self.go_to(at)

    def go_to(self, position):
        """Begins a fit at a position."""
        self.position = position
        self.history.resume(self.run, position)
        return self

    def step(self, branch=0):
        """Takes a step and ends an epoch; the weights depend on the step and the branch."""
        iterations, step, _ = self.position
        self.position = Position(iterations + 1, step + 1, 100 * iterations + branch + 1)
        self.history.leave(self.position)
        return self.position

    def write(self, name, best=None, keep=None, **changes):
        path = self.folder / f"{name}.weights.h5"
        path.parent.mkdir(exist_ok=True)
        record = self.history.record(path, self.position, best)
        h5py.File(path, "w").close()
        write_record(path, {**record, **changes})
        self.history.add(record)
        if keep:
            self.history.remove_older(keep)

    def improve(self, name, score, branch=0):
        """Takes a step that leads to the best score so far."""
        position = self.step(branch)
        self.write(name, score)
        return position


def names(folder):
    return sorted(path.name.split(".")[0] for path in folder.iterdir() if path.is_file())


# Newest


def test_the_file_written_last_is_newest_whatever_the_counters_say(tmp_path):
    training = Training(tmp_path)
    for name, step in enumerate((9, 5, 5, 0, 7)):
        training.go_to(Position(step, step, name))
        training.write(name, keep=2)
    assert names(tmp_path) == ["3", "4"]


def test_the_order_goes_on_in_another_process(tmp_path):
    first = Training(tmp_path)
    for name in "abc":
        first.step()
        first.write(name)
    Training(tmp_path).write("d", keep=2)
    assert names(tmp_path) == ["c", "d"]


def test_a_callback_that_another_process_overtook_writes_the_newest_file(tmp_path):
    first = Training(tmp_path)
    first.write("a")
    second = Training(tmp_path)
    for name in "bcd":
        second.write(name)
    first.go_to(first.position).write("e", keep=1)
    assert names(tmp_path) == ["e"]


def test_the_order_does_not_depend_on_clocks(tmp_path):
    training = Training(tmp_path)
    for name in range(3):
        training.write(name)
        os.utime(tmp_path / f"{name}.weights.h5", (0, 10**9 - name))
    training.write("3", keep=2)
    assert names(tmp_path) == ["2", "3"]


def test_the_branch_that_training_left_is_older_than_the_branch_it_took(tmp_path):
    training = Training(tmp_path)
    positions = [training.improve(name, 1 / (1 + name)) for name in range(6)]
    training.go_to(positions[2])
    for name in (3, 4):
        training.step(branch=1)
        training.write(name, keep=3)
    assert names(tmp_path) == ["3", "4", "5"]
    training.step(branch=1)
    training.write(5, keep=3)
    training.step(branch=1)
    training.write(6, keep=3)
    assert names(tmp_path) == ["4", "5", "6"]


@pytest.mark.parametrize("lacking", [["sequence"], ["sequence", "file", "improvements"]])
def test_files_of_early_versions_are_ordered_by_step_and_older_than_new_ones(tmp_path, lacking):
    training = Training(tmp_path)
    for name, step in (("c", 3), ("a", 1), ("b", 2)):
        training.write(name)
        record = read_record(tmp_path / f"{name}.weights.h5")
        record = {key: value for key, value in record.items() if key not in lacking}
        write_record(tmp_path / f"{name}.weights.h5", {**record, "step": step, "score": 1.0 / step})
    again = Training(tmp_path)
    if "improvements" in lacking:
        assert again.history.best == 1 / 3
    again.write("new", keep=2)
    assert names(tmp_path) == ["c", "new"]


# Whose


def test_files_of_other_trainings_and_callbacks_stay(tmp_path):
    Training(tmp_path, run="another").write("x")
    Training(tmp_path, callback="another").write("y")
    (tmp_path / "z.weights.h5").write_text("notes")
    training = Training(tmp_path)
    for name in "abc":
        training.write(name, keep=1)
    assert names(tmp_path) == ["c", "x", "y", "z"]


@pytest.mark.parametrize("copy", [shutil.copy, shutil.move], ids=["copied", "moved"])
def test_a_file_under_a_name_that_the_user_gave_it_is_the_users(tmp_path, copy):
    training = Training(tmp_path)
    training.write("a")
    copy(tmp_path / "a.weights.h5", tmp_path / "favourite.weights.h5")
    for name in "bc":
        training.write(name, keep=1)
    assert names(tmp_path) == ["c", "favourite"]


def test_the_files_of_a_folder_that_was_moved_are_still_the_trainings(tmp_path):
    (tmp_path / "old").mkdir()
    training = Training(tmp_path / "old", filepath="{epoch}/w.weights.h5")
    for name in range(3):
        training.write(f"{name}/w")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = Training(tmp_path / "new", filepath="{epoch}/w.weights.h5")
    moved.write("3/w", keep=2)
    found = [path.parent.name for path in (tmp_path / "new").glob("*/w.weights.h5")]
    assert sorted(found) == ["2", "3"]


def test_a_file_that_the_user_removed_counts_no_longer(tmp_path):
    training = Training(tmp_path)
    for name in "abc":
        training.write(name)
    (tmp_path / "c.weights.h5").unlink()
    training.write("d", keep=3)
    assert names(tmp_path) == ["a", "b", "d"]


def test_files_that_cannot_be_removed_are_reported_once(tmp_path, monkeypatch):
    training = Training(tmp_path)
    for name in "ab":
        training.write(name)

    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", refuse)
        with pytest.warns(UserWarning, match="Cannot remove the old checkpoint.*denied"):
            training.write("c", keep=1)
        training.write("d", keep=1)
    training.write("e", keep=1)
    assert names(tmp_path) == ["e"]


# Best


@pytest.fixture
def positions(tmp_path):
    """The positions of three improvements, to 0.3, 0.2 and 0.1, each two steps after another."""
    training = Training(tmp_path)
    found = []
    for name in range(3):
        training.step()
        found.append(training.improve(name, (3 - name) / 10))
    return found


def test_a_training_that_goes_on_keeps_its_best_score(tmp_path, positions):
    assert Training(tmp_path, positions[2]).history.best == 0.1
    later = Position(99, 99, 12345)
    assert Training(tmp_path, later).history.best == 0.1


@pytest.mark.parametrize("same_process", [True, False])
def test_scores_after_the_position_training_goes_back_to_do_not_count(
    tmp_path, positions, same_process
):
    training = Training(tmp_path, positions[2])
    for position, best in ((positions[1], 0.2), (positions[0], 0.3), (Position(1, 1, 7), None)):
        moved = training.go_to(position) if same_process else Training(tmp_path, position)
        assert moved.history.best == best
    between = positions[0]._replace(iterations=3, step=3, weights=7)
    assert Training(tmp_path, between).history.best == 0.3


def test_a_file_that_a_later_branch_overwrote_does_not_lose_the_score_of_before(tmp_path):
    training = Training(tmp_path, filepath="best.weights.h5")
    first = training.improve("best", 0.3)
    training.improve("best", 0.2)
    again = Training(tmp_path, first, filepath="best.weights.h5")
    assert again.history.best == 0.3


def test_scores_of_an_abandoned_branch_do_not_return_with_the_counters(tmp_path, positions):
    training = Training(tmp_path, positions[0])
    training.improve("other", 0.25, branch=1)
    later = Position(99, 99, 12345)
    assert training.history.best == 0.25
    assert training.go_to(later).history.best == 0.25
    assert Training(tmp_path, later).history.best == 0.25


def test_going_back_to_the_branch_that_was_left_brings_its_scores_back(tmp_path, positions):
    training = Training(tmp_path, positions[0])
    training.improve("other", 0.25, branch=1)
    assert training.go_to(positions[2]).history.best == 0.1


@pytest.mark.parametrize("restarted", [{"step": 0}, {"iterations": 0}])
@pytest.mark.parametrize("same_process", [True, False])
def test_one_counter_that_starts_anew_forgets_no_score(
    tmp_path, positions, restarted, same_process
):
    position = Position(8, 8, 5)
    anew = position._replace(**restarted)
    training = (
        Training(tmp_path, position).go_to(anew) if same_process else Training(tmp_path, anew)
    )
    assert training.history.best == 0.1
    assert training.go_to(Position(1, 9, 6)).history.best == 0.1


def test_both_counters_that_start_anew_forget_no_score_where_the_weights_are_known(
    tmp_path, positions
):
    anew = positions[2]._replace(iterations=0, step=0)
    assert Training(tmp_path, anew).history.best == 0.1
    training = Training(tmp_path, Position(8, 8, 5))
    assert training.go_to(Position(0, 0, 5)).history.best == 0.1


def test_scores_of_before_both_counters_started_anew_stay_in_the_past_of_later_ones(
    tmp_path, positions
):
    training = Training(tmp_path, positions[2])
    training.go_to(positions[2]._replace(iterations=0, step=0))
    training.improve("new", 0.05, branch=1)
    assert Training(tmp_path, Position(2, 2, 12345)).history.best == 0.05


def test_another_training_has_no_score_yet(tmp_path, positions):
    training = Training(tmp_path, positions[2])
    training.run = "another"
    assert training.go_to(positions[2]).history.best is None
    assert Training(tmp_path, positions[2], run="another").history.best is None


def test_a_score_whose_file_was_not_written_is_not_the_best(tmp_path):
    training = Training(tmp_path)
    training.history.record(tmp_path / "1.weights.h5", training.step(), best=0.5)
    assert training.history.best is None


def test_a_long_history_fits_into_a_file(tmp_path):
    training = Training(tmp_path, filepath="best.weights.h5")
    for number in range(2000):
        training.step()
        record = training.history.record("best.weights.h5", training.position, 1 / (number + 3))
        training.history.add(record)
    position = training.improve("best", 1e-5 / 3)
    assert Training(tmp_path, position, filepath="best.weights.h5").history.best == 1e-5 / 3
