import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model.errors import InputError
from polyak_model.weight_files.selection import choose_best, choose_last, in_order, list_folder

HISTORY = "epoch,loss,val_loss\n0,3,0.5\n1,2,0.3\n2,1.5,NA\n3,1,0.4\n4,0.5,0.4\n"


@pytest.fixture
def folder(tmp_path):
    for n in (1, 2, 9, 10):
        (tmp_path / f"epoch-{n}.keras").touch()
    (tmp_path / "history.csv").write_text(HISTORY)
    return tmp_path


def names(paths):
    return [path.name for path in paths]


def test_the_files_of_a_folder_are_listed_by_name_and_number(folder):
    expected = [f"epoch-{n}.keras" for n in (1, 2, 9, 10)]
    assert names(list_folder(folder, "out.keras")) == expected
    assert names(choose_last(list_folder(folder, "out.keras"), 2)) == expected[2:]


def test_the_output_of_an_earlier_run_and_hidden_files_are_not_listed(folder):
    (folder / "zzz.keras").touch()
    (folder / ".zzz.keras").touch()
    assert len(list_folder(folder, folder / "zzz.keras")) == 4


def test_shards_are_not_listed(tmp_path):
    for n in (1, 2):
        (tmp_path / f"epoch-{n}.weights.json").touch()
        (tmp_path / f"epoch-{n}_00000.weights.h5").touch()
    files = list_folder(tmp_path, "out.weights.h5")
    assert names(files) == ["epoch-1.weights.json", "epoch-2.weights.json"]
    for n in (1, 2):
        (tmp_path / f"epoch-{n}.weights.json").unlink()
    assert len(list_folder(tmp_path, "out.weights.h5")) == 2


def test_a_folder_with_several_kinds_of_files_or_no_files_is_refused(folder, tmp_path):
    (folder / "epoch-1.weights.h5").touch()
    with pytest.raises(InputError, match=r"files in .weights.h5 and .keras. Name the files"):
        list_folder(folder, "out.keras")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no weight files"):
        list_folder(tmp_path / "empty", "out.keras")
    with pytest.raises(InputError, match="No such file"):
        list_folder(tmp_path / "nowhere", "out.keras")


@given(st.lists(st.text("a1²0-.٣", max_size=6), max_size=8))
def test_any_names_can_be_ordered_whatever_order_they_come_in(texts):
    assert in_order(texts) == in_order(texts[::-1])
    assert sorted(texts) == sorted(in_order(texts))


@given(st.lists(st.integers(0, 2000), min_size=1, unique=True))
def test_numbers_in_names_are_ordered_by_value(numbers):
    paths = [f"run/epoch-{n}-{1 / (n + 1):.2f}.keras" for n in numbers]
    ordered = [f"run/epoch-{n}-{1 / (n + 1):.2f}.keras" for n in sorted(numbers)]
    assert in_order(paths) == ordered


@pytest.mark.parametrize(("count", "problem"), [(1, "at least 2"), (5, "but there are 4")])
def test_an_invalid_number_of_files_is_refused(folder, count, problem):
    with pytest.raises(InputError, match=problem):
        choose_last(list_folder(folder, "out.keras"), count)


def best(folder, numbers, count=2, column="val_loss", mode="min", pattern="epoch-{:02d}.keras"):
    paths = [folder / pattern.format(n) for n in numbers]
    return names(choose_best(paths, count, folder / "history.csv", column, mode))


def test_the_best_epochs_are_chosen_in_order_and_the_earlier_of_equal_ones(folder):
    assert best(folder, range(1, 6)) == ["epoch-02.keras", "epoch-04.keras"]
    assert best(folder, [5, 4, 2, 1]) == ["epoch-02.keras", "epoch-04.keras"]
    assert best(folder, [5, 2, 1], 3) == [f"epoch-{n:02}.keras" for n in (1, 2, 5)]
    assert best(folder, range(1, 6), mode="max") == ["epoch-01.keras", "epoch-04.keras"]
    assert best(folder, range(1, 6), column="loss") == ["epoch-04.keras", "epoch-05.keras"]


@pytest.mark.parametrize(
    "pattern",
    [
        "weights.{:02d}-0.53.weights.h5",
        "resnet50-epoch{}-loss1e-05.keras",
        "{}.weights.json",
        "Epoch_{:04d}.keras",
        "net-{}.keras",
    ],
)
def test_the_epoch_is_found_in_the_name(folder, pattern):
    assert len(best(folder, [1, 2], pattern=pattern)) == 2


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("best.keras", "no number"), ("v2-{}.keras", "numbers 2, 1"), ("0.5.keras", "no number")],
)
def test_a_name_with_an_ambiguous_epoch_is_refused(folder, pattern, found):
    with pytest.raises(InputError, match=found):
        best(folder, [1, 2], pattern=pattern)


def test_two_files_of_one_epoch_are_refused(folder):
    paths = [folder / "a-1.keras", folder / "b-1.keras"]
    with pytest.raises(InputError, match="are both of epoch 1"):
        choose_best(paths, 2, folder / "history.csv", "loss", "min")


@pytest.mark.parametrize("epoch", [0, 6])
def test_an_epoch_without_a_row_is_refused(folder, epoch):
    with pytest.raises(InputError, match=f"is of epoch {epoch}, counted from 1, but"):
        best(folder, [1, 2, epoch])


def test_epochs_without_a_score_cannot_be_chosen(folder):
    with pytest.raises(InputError, match="Received: 3, but there are 2"):
        best(folder, [1, 2, 3], 3)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no column 'epoch' but none"),
        ("epoch\n1\n", "no column 'val_loss' but epoch"),
        ("val_loss\n1\n", "no column 'epoch'"),
        ("epoch,val_loss\n0,1\n0,2\n", "two rows of epoch 0"),
        ("epoch,val_loss\nfirst,1\n", "an epoch in it is 'first'"),
        ("epoch,val_loss\n,1\n", "an epoch in it is"),
        ("epoch,val_loss\n0,1,2\n1\n", "Received: 2, but there are 1"),
        ("epoch,val_loss\n0,\ud800\n", "cannot be read"),
        ("epoch,val_loss\n0,\0\n", "Received: 2|cannot be read|no row"),
        ("epoch,val_loss\n" + "9" * 5000 + ",1\n", "an epoch in it is"),
        ("epoch,val_loss\n0," + "9" * 10**6 + "\n", "cannot be read"),
    ],
)
def test_an_invalid_history_is_refused(folder, content, problem):
    (folder / "history.csv").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=problem) as caught:
        best(folder, [1, 2])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_missing_history_is_refused(folder):
    (folder / "history.csv").unlink()
    with pytest.raises(InputError, match=r"history.csv': it cannot be read \(No such file"):
        best(folder, [1, 2])
