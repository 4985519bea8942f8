import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

from polyak_model import PolyakModel, PowerAverage, UniformAverage, __version__
from polyak_model.saving import layout

RULES = {"late": keras.saving.serialize_keras_object(UniformAverage(start_step=5))}


def make_weights(*units):
    return keras.Sequential([keras.Input((3,)), *map(keras.layers.Dense, units)]).weights


def make_wrapper():
    layers = [keras.Input((2,)), keras.layers.Dense(3, dtype="bfloat16"), keras.layers.Dropout(0.5)]
    inner = keras.Sequential(layers)
    inner.compile("sgd", "mse")
    model = PolyakModel(inner, PowerAverage(2), compensated=True)
    model.fit(np.ones((4, 2)), np.ones((4, 3)), verbose=0)
    return model


def read_tensors(path):
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item.shape

    with h5py.File(path) as file:
        file.visititems(visit)
        description = json.loads(file["vars/description"][()].tobytes())
        step = file["shadow/vars/step"][()]
    return found, description, step


def test_the_groups_names_and_description_of_format_2_are_these(tmp_path):
    model = make_wrapper()
    model.save_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "a.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)
        config = json.loads(archive.read("config.json"))
    for path in (tmp_path / "a.weights.h5", tmp_path / "model.weights.h5"):
        tensors, description, step = read_tensors(path)
        del tensors["vars/description"]
        assert tensors == {
            "averages/average/layers/dense/vars/0": (2, 3),
            "averages/average/layers/dense/vars/1": (3,),
            "averages/average/optimizer/vars/0": (),
            "averages/average/optimizer/vars/1": (),
            "raw_model/layers/dense/vars/0": (2, 3),
            "raw_model/layers/dense/vars/1": (3,),
            "raw_model/optimizer/vars/0": (),
            "raw_model/optimizer/vars/1": (),
            "shadow/vars/step": (),
            "shadow/vars/fingerprint": (),
            "shadow/vars/average.origin": (),
            "shadow/vars/average.master.0": (2, 3),
            "shadow/vars/average.residual.0": (2, 3),
            "shadow/vars/average.master.1": (3,),
            "shadow/vars/average.residual.1": (3,),
            "shadow/vars/average.seed_0": (2,),
            "shadow/vars/raw.seed_0": (2,),
        }
        assert step == 1
        assert description == {
            "format": 2,
            "version": __version__,
            "run": model.shadow.run,
            "averages": {
                "average": {
                    "module": "polyak_model.rules",
                    "class_name": "PowerAverage",
                    "config": {"gamma": 2.0, "start_step": 0, "update_every": 1},
                    "registered_name": "polyak_model>PowerAverage",
                }
            },
            "compensated": True,
            "excluded": [],
            "weights": [
                ["sequential/dense/kernel", [2, 3], "bfloat16"],
                ["sequential/dense/bias", [3], "bfloat16"],
            ],
        }
    assert (config["module"], config["class_name"]) == ("polyak_model.model", "PolyakModel")
    assert config["registered_name"] == "polyak_model>PolyakModel"
    assert config["config"]["format"] == 2
    assert config["config"][layout.CONFIG_MODEL]["class_name"] == "Sequential"
    assert config["config"][layout.CONFIG_RULE] == description["averages"]["average"]


def test_the_names_of_the_layout_are_those_in_a_file(tmp_path):
    make_wrapper().save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5") as file:
        assert layout.variable_path("", layout.DESCRIPTION) in file
        assert layout.average_group("average") in file
        assert layout.RAW in file
        names = [layout.STEP, layout.FINGERPRINT, layout.origin_name("average")]
        names += [layout.master_name("average", 1), layout.residual_name("average", 0)]
        for name in [*names, layout.seed_name("raw", 0)]:
            assert layout.variable_path(layout.STATE, name) in file


def test_a_decoded_description_equals_the_encoded_one():
    described = layout.describe(RULES, "a run", False, make_weights(2))
    assert layout.decode(layout.encode(described)) == described
    assert described["averages"]["late"]["config"]["start_step"] == 5
    assert [entry[1:] for entry in described["weights"]] == [[[3, 2], "float32"], [[2], "float32"]]


def test_two_trainings_never_have_the_same_run_even_with_the_same_seed():
    runs = set()
    for _ in range(3):
        keras.utils.set_random_seed(0)
        runs.add(layout.new_run())
    assert len(runs) == 3


def test_a_newer_format_is_refused_with_the_version_that_wrote_it():
    newer = layout.encode({"format": 4, "version": "9.1"})
    with pytest.raises(ValueError, match=r"format 4, written by polyak_model 9.1; .* at most 3"):
        layout.decode(newer)


WEIGHTS = [["k", [3, 2], "float32"]]
GOOD_1 = {"format": 1, "version": "1", "run": "a", "rule": {}, "weights": WEIGHTS}
GOOD = {
    "format": 2,
    "version": "1",
    "run": "a",
    "averages": {"short": {}},
    "compensated": True,
    "weights": WEIGHTS,
    "excluded": [0],
}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "[1]",
        "{}",
        "[" * 100_000,
        '{"format": "x", "version": "1"}',
        '{"format": Infinity, "version": "1"}',
        *(json.dumps({k: v for k, v in GOOD.items() if k != key}) for key in GOOD),
        *(json.dumps({k: v for k, v in GOOD_1.items() if k != key}) for key in GOOD_1),
        *(
            json.dumps(GOOD | {key: 7})
            for key in ("run", "averages", "compensated", "weights", "excluded")
        ),
        *(json.dumps(GOOD | {"excluded": [position]}) for position in ("0", -1, 1)),
        *(json.dumps(GOOD | {"averages": rules}) for rules in ({"short": 7}, {"a/b": {}})),
        *(
            json.dumps(GOOD | {"weights": [entry]})
            for entry in (7, [], ["k", 3, "f"], ["k", ["3"], "f"], [1, [3], "f"], ["k", [-1], "f"])
        ),
    ],
)
def test_a_damaged_description_is_refused(text):
    with pytest.raises(ValueError, match="The description of the average in the file is damaged"):
        layout.decode(np.frombuffer(text.encode(), "uint8"))


def test_an_intact_description_is_not_refused():
    assert layout.decode(layout.encode(GOOD)) == GOOD


def test_another_architecture_is_refused_by_the_first_weight_that_differs():
    described = json.loads(json.dumps(layout.describe(RULES, "", False, make_weights(2))))
    layout.check_weights(described, make_weights(2))
    with pytest.raises(ValueError, match=r"dense/kernel' has shape \(3, 2\), .* \(3, 4\)"):
        layout.check_weights(described, make_weights(4))
    with pytest.raises(ValueError, match=r"2 weights with 8 parameters, .* has 4 with 11"):
        layout.check_weights(described, make_weights(2, 1))
