import json
import pathlib

import pytest

pytestmark = pytest.mark.benchmarks


def test_all_variants_take_turns_in_one_fit_each(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "benchmarks")
    import overhead_jax

    path = tmp_path / "overhead.json"
    times = overhead_jax.main(["--models", "tiny", "--rounds", "3", "--json", str(path)])["tiny"]
    assert [*times][:5] == ["bare", "PolyakModel", "two averages", "three averages", "use_ema"]
    assert all(len(steps) == 3 and min(steps) > 0 for steps in times.values())
    assert json.loads(path.read_text("utf-8")) == {"tiny": times}
    assert "three averages" in capsys.readouterr().out
