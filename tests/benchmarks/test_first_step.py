import first_step
import pytest

pytestmark = [pytest.mark.benchmarks, pytest.mark.processes]


def test_the_first_step_of_a_wrapped_model_is_compared_with_that_of_the_bare_one(
    monkeypatch, capsys
):
    variants, run = ["bare", "PolyakModel"], first_step.run

    def run_one_of_them(model, variant):
        # Importing Keras takes most of the time of a process, so the other is measured in this one.
        return (first_step.measure if variant == "bare" else run)(model, variant)

    monkeypatch.setattr(first_step, "run", run_one_of_them)
    first_step.main(["--models", "tiny", "--processes", "1", "--variants", *variants])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["/", "bare"]
    assert [line.split()[1] for line in lines] == variants
    assert lines[0].split()[-1] == "1.00"
    assert float(lines[1].split()[2]) > 0
