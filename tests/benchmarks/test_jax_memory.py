import pathlib

import pytest
from frameworks import compile_as_shipped

pytestmark = pytest.mark.benchmarks


def test_a_step_takes_no_copy_of_an_average(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "benchmarks")
    import memory_jax

    compile_as_shipped(monkeypatch)
    rows = memory_jax.main(["--model", "mlp-10M"])
    assert [row[0] for row in rows] == [*memory_jax.SHOWN]
    extra = {name: float(ratio) for name, _, ratio in rows}
    for averages, name in enumerate(("bare", "PolyakModel", "two averages", "three averages")):
        assert extra[name] == pytest.approx(averages, abs=0.05)
    # Two copies of the weights, and XLA's temporary buffers.
    assert 2 <= extra["compensated"] < 2.8
