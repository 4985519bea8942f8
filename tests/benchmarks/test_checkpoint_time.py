import checkpoints
import pytest

pytestmark = pytest.mark.benchmarks


def test_waiting_for_a_checkpoint_is_compared_with_copying_the_file():
    rows = checkpoints.main(["--width", "8", "--epochs", "3"])
    assert [row[0] for row in rows] == [".keras"] * 5 + [".weights.h5"] * 5
    assert rows[0][1:2] + rows[0][-1:] == ["copy, flushed", "1.00"]
    assert all(float(row[-1]) > 0 for row in rows)
