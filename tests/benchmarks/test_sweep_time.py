import pytest
import sweep

pytestmark = pytest.mark.benchmarks


def test_a_sweep_is_compared_with_evaluating_the_model_and_reading_the_snapshots(capsys):
    seconds = sweep.main(["--width", "8", "--steps", "32", "--examples", "40", "--rounds", "1"])
    assert {len(values) for values in seconds.values()} == {1}
    printed = capsys.readouterr().out
    assert "16 snapshots, " in printed
    limit = 8 * seconds["one evaluation"][0] + 3 * seconds["reading the snapshots"][0]
    assert f"sweep / limit: {seconds['sweep'][0] / limit:.2f}" in printed
