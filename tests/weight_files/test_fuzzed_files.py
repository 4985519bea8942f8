import json
import os
import pathlib
import subprocess
import sys

import pytest

import polyak_model
from polyak_model.weight_files.reader import ENDINGS

FILES = 400


@pytest.mark.processes
@pytest.mark.parametrize("kind", ENDINGS)
def test_a_damaged_file_is_averaged_or_refused_in_one_line(tmp_path, kind):
    """Without a traceback, a crash of HDF5 or a hang, and with nothing half written."""
    worker = pathlib.Path(__file__).parents[1] / "helpers" / "fuzz_worker.py"
    root = str(pathlib.Path(polyak_model.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, worker, tmp_path, kind, "0", str(FILES)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["written"] + outcome["refused"] == FILES
    # Damage that only ever hits what nobody reads, or all of it, would test nothing.
    assert min(outcome.values()) > 10
