import first_step
import pytest

pytestmark = [pytest.mark.benchmarks, pytest.mark.processes]


def test_the_first_step_of_a_wrapped_model_is_compared_with_that_of_the_bare_one(capsys):
    variants = ["bare", "PolyakModel"]
    first_step.main(["--models", "tiny", "--processes", "1", "--variants", *variants])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["/", "bare"]
    assert [line.split()[1] for line in lines] == variants
    assert lines[0].split()[-1] == "1.00"
    assert float(lines[1].split()[2]) > 0
