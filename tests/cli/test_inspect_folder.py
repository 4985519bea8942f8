import json

import pytest
from snapshot_samples import STEPS, write_run


@pytest.fixture(autouse=True)
def folder(working_folder, tmp_path):
    write_run(tmp_path / "run")


def test_the_run_and_what_can_be_rebuilt_are_printed(run):
    lines = run("inspect", "run").splitlines()
    assert lines[:4] == [
        "run        a",
        "snapshots  16, from step 50 to 800",
        "average    short: power, relative width 0.03",
        "average    long: power, relative width 0.2",
    ]
    assert lines[5] == "What can be rebuilt at the last step, by the expected error:"
    assert lines[7].startswith("1 %  relative widths 0.02")
    assert lines[8].startswith("     half-lives 1")
    assert lines[8].endswith(" steps")
    assert lines[9].startswith("5 %  relative widths 0.01")


def test_json_has_the_steps_and_the_ranges(run):
    described = json.loads(run("inspect", "run", "--json"))
    assert described["steps"] == list(STEPS)
    ((shortest, longest),) = described["reachable"]["0.01"]["relative_widths"]
    assert shortest < 0.03 < 0.2 < longest


def test_damage_is_refused(refused, tmp_path):
    next((tmp_path / "run").iterdir()).write_bytes(b"damaged")
    assert "Cannot use 'run/snapshot-" in refused("inspect", "run")
