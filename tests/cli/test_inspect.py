import json
import os
import pathlib
import shutil
import subprocess
import sys

import h5py
import keras
import pytest
from wrappers import DESCRIPTION, KINDS, describe, make_wrapper

import polyak_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the files of a wrapper and of a plain model."""
    folder = tmp_path_factory.mktemp("files")
    model = make_wrapper("sequential")
    model.save(folder / "wrapper.keras")
    model.save_weights(folder / "wrapper.weights.h5")
    model.average_model.save(folder / "plain.keras")
    keras.Sequential([keras.Input((6,)), model]).save_weights(folder / "larger.weights.h5")
    (folder / "text.npz").write_text("no arrays")
    return folder


def read_table(text, header):
    """Returns the rows of the table under a header, as lists of words."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == [header])
    return [line.split() for line in lines[first + 1 : lines.index("", first)]]


def test_the_variables_are_listed_with_their_total(saved, run):
    text = run("inspect", saved / "plain.keras")
    assert text.startswith("The model:\n")
    rows = read_table(text, "variable")
    assert rows[:2] == [
        ["layers/batch_normalization/vars/0", "norm", "(4,)", "float32", "4"],
        ["layers/batch_normalization/vars/1", "norm", "(4,)", "float32", "4"],
    ]
    assert ["layers/dense/vars/0", "first", "(6,", "4)", "float32", "24"] in rows
    assert rows[-1] == ["total", "54"] == ["total", str(KINDS["sequential"]().count_params())]
    assert ": 2 variables, 2 parameters." in text
    assert "average" not in text


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_the_rule_the_step_and_the_distances_of_a_wrapper_are_shown(saved, run, ending, tmp_path):
    path = shutil.copy(saved / f"wrapper{ending}", tmp_path)
    text = run("inspect", path)
    assert text.startswith("The raw model; averages have the same variables:\n")
    assert read_table(text, "variable")[-1] == ["total", "54"]
    assert "\nOptimizer adam" in text
    assert "\nrule  ExponentialAverage(decay=0.5" in text
    assert "\nstep  3\n" in text
    rows = read_table(text + "\n\n", "layer")
    layers = ["layers/batch_normalization", "layers/dense", "layers/dense_1", "total"]
    assert [row[0] for row in rows] == layers
    assert all(float(number) > 0 for row in rows for number in row[1:])


def test_a_file_without_its_rule_is_inspected(saved, run, tmp_path):
    path = shutil.copy(saved / "wrapper.weights.h5", tmp_path)
    describe(path, text=None)
    assert "\nrule  not written in this file\n" in run("inspect", path)


def test_a_wrapper_inside_a_larger_model_is_shown_with_its_path(saved, run):
    text = run("inspect", saved / "larger.weights.h5")
    assert text.startswith("The model:\n")
    assert "The average at layers/polyak_model:\n" in text
    assert "\nstep  3\n" in text


def test_control_characters_in_names_are_escaped(saved, run, tmp_path):
    path = shutil.copy(saved / "wrapper.weights.h5", tmp_path)
    rule = {"class_name": "\x1b[2J", "config": {"\n": "\x07"}}
    describe(path, text=DESCRIPTION | {"averages": {"average": rule}})
    with h5py.File(path, "r+") as file:
        file["raw_model/layers/dense/vars"].attrs["name"] = "\x1b[31m\n[red]red"
    text = run("inspect", path)
    assert text.replace("\n", "").isprintable()
    assert "\\x1b[31m\\n[red]red" in text


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_json_has_the_same_content_as_the_text(saved, run, ending):
    path = saved / f"wrapper{ending}"
    content = json.loads(run("inspect", "--json", path))
    assert content["file"] == str(path)
    assert content["parameters"] == sum(each["parameters"] for each in content["variables"]) == 54
    assert [content["optimizer"][key] for key in ("variables", "parameters")] == [14, 94]
    assert content["optimizer"]["names"][0].startswith("adam")
    (average,) = content["averages"]
    assert (average["path"], average["step"]) == ("", 3)
    assert average["rule"]["config"]["decay"] == 0.5
    rows = read_table(run("inspect", path) + "\n\n", "layer")
    assert rows == [
        [each["layer"], f"{each['distance']:.4g}", f"{each['relative']:.4g}"]
        for each in average["distances"]
    ]


def test_json_of_a_plain_model_has_no_averages(saved, run):
    assert json.loads(run("inspect", saved / "plain.keras", "--json"))["averages"] == []


def test_json_has_null_for_numbers_that_json_lacks(saved, run, tmp_path):
    path = shutil.copy(saved / "wrapper.weights.h5", tmp_path)
    with h5py.File(path, "r+") as file:
        file["raw_model/layers/dense/vars/0"][...] = 0
        file["raw_model/layers/dense/vars/1"][...] = 0
    text = run("inspect", path, "--json")
    distances = json.loads(text, parse_constant=pytest.fail)["averages"][0]["distances"]
    assert {each["layer"]: each["relative"] for each in distances}["layers/dense"] is None


@pytest.mark.processes
def test_neither_keras_nor_tensorflow_is_imported(saved):
    program = (
        "import sys; from polyak_model.cli.app import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'keras', 'tensorflow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    root = pathlib.Path(polyak_model.__file__).parents[1]
    for arguments in (
        ["inspect", "wrapper.keras"],
        ["extract", "wrapper.keras", "-o", "out.keras"],
        ["soup", "plain.keras", "plain.keras", "--data", "text.npz", "-o", "out.keras"],
    ):
        result = subprocess.run(
            [*command, *arguments],
            cwd=saved,
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert result.stdout.splitlines()[-1] == f"{2 * (arguments[0] == 'soup')} []"


@pytest.mark.parametrize("name", ["none.keras", "text.keras", "text.weights.h5", "folder", "x.h5"])
def test_other_files_are_refused(refused, tmp_path, name):
    (tmp_path / "folder.keras").mkdir()
    for path in ("text.keras", "text.weights.h5"):
        (tmp_path / path).write_text("no weights")
    assert name in refused("inspect", name)


def test_a_file_of_two_models_that_differ_is_refused(saved, refused, tmp_path):
    path = shutil.copy(saved / "wrapper.weights.h5", tmp_path)
    with h5py.File(path, "r+") as file:
        del file["averages/average/layers/dense/vars/1"]
    line = refused("inspect", path)
    assert "'layers/dense/vars/1' has shape (4,) in the raw model and None in the average" in line
