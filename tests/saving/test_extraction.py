import json
import zipfile

import keras
import numpy as np
import pytest
from wrappers import INPUTS, KINDS, TARGETS, make_wrapper, save_all

from polyak_model.errors import InputError
from polyak_model.saving.extraction import extract
from polyak_model.weight_files.reader import open_weights

CONTENTS = ("average", "raw")
ROUTES = [(kind, contents) for kind in KINDS for contents in CONTENTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with wrappers and what was extracted from them, and the wrappers."""
    folder = tmp_path_factory.mktemp("wrappers")
    wrappers = save_all(folder)
    for kind, contents in ROUTES:
        extract_file(folder / f"{kind}.keras", contents, folder / f"{kind}-{contents}.keras")
        for source in (".keras", ".weights.h5"):
            output = folder / f"{kind}-{contents}-from{source}.weights.h5"
            extract_file(folder / f"{kind}{source}", contents, output)
    return folder, wrappers


def extract_file(source, contents, output):
    with open_weights(source) as weights:
        extract(weights, contents, output)


def choose(model, contents):
    return {"average": model.average_model, "raw": model.raw_model}[contents]


def read_hdf5(path):
    """Returns the arrays and the attributes of everything in a file."""
    found = {}
    with open_weights(path) as weights:
        for name, variable in weights.variables.items():
            found[name] = (variable.dtype, variable.read().tolist())
        return found, weights.attributes


def read_config(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def without(config, *keys):
    """Leaves out keys at any depth."""
    if isinstance(config, dict):
        return {k: without(v, *keys) for k, v in config.items() if k not in keys}
    return [without(item, *keys) for item in config] if isinstance(config, list) else config


@pytest.mark.parametrize(("kind", "contents"), ROUTES)
def test_the_extracted_model_predicts_like_the_route_of_the_wrapper(saved, kind, contents):
    folder, wrappers = saved
    loaded = keras.models.load_model(folder / f"{kind}-{contents}.keras")
    assert type(loaded) is type(wrappers[kind].raw_model)
    np.testing.assert_array_equal(
        loaded.predict(INPUTS, verbose=0), wrappers[kind].predict(INPUTS, verbose=0, using=contents)
    )


@pytest.mark.parametrize("contents", CONTENTS)
def test_the_extracted_model_scores_like_the_route_of_the_wrapper(saved, contents):
    folder, wrappers = saved
    loaded = keras.models.load_model(folder / f"sequential-{contents}.keras")
    expected = wrappers["sequential"].evaluate(INPUTS, TARGETS, verbose=0, using=contents)
    assert loaded.evaluate(INPUTS, TARGETS, verbose=0) == expected


@pytest.mark.parametrize("source", [".keras", ".weights.h5"])
@pytest.mark.parametrize(("kind", "contents"), ROUTES)
def test_the_extracted_weights_are_those_that_the_model_itself_saves(saved, kind, contents, source):
    folder, wrappers = saved
    choose(wrappers[kind], contents).save_weights(folder / "expected.weights.h5")
    assert read_hdf5(folder / f"{kind}-{contents}-from{source}.weights.h5") == read_hdf5(
        folder / "expected.weights.h5"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_extracted_raw_model_equals_the_saved_raw_model(saved, kind):
    folder, wrappers = saved
    wrappers[kind].raw_model.save(folder / "expected.keras")
    written = folder / f"{kind}-raw.keras"
    assert read_hdf5(written) == read_hdf5(folder / "expected.keras")
    configs = [read_config(path) for path in (written, folder / "expected.keras")]
    first, second = (without(config, "shared_object_id") for config in configs)
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_the_extracted_average_model_equals_the_saved_average_model(saved, kind):
    folder, wrappers = saved
    wrappers[kind].average_model.save(folder / "expected.keras")
    written = folder / f"{kind}-average.keras"
    (arrays, groups), (expected, expected_groups) = map(
        read_hdf5, (written, folder / "expected.keras")
    )
    assert arrays == expected
    assert groups == {k: {} if "optimizer" in k else v for k, v in expected_groups.items()}
    configs = [read_config(path) for path in (written, folder / "expected.keras")]
    first, second = (without(config, "shared_object_id", "optimizer") for config in configs)
    assert first == second
    assert [config["compile_config"]["optimizer"]["class_name"] for config in configs] == [
        "SGD"
    ] * 2


def test_the_extracted_raw_model_keeps_its_optimizer(saved):
    folder, wrappers = saved
    loaded = keras.models.load_model(folder / "sequential-raw.keras")
    optimizer = wrappers["sequential"].optimizer
    assert type(loaded.optimizer) is keras.optimizers.Adam
    for variable, original in zip(loaded.optimizer.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), original.numpy())


@pytest.mark.parametrize(("kind", "contents"), ROUTES)
def test_nothing_in_an_extracted_file_needs_this_package(saved, kind, contents):
    path = saved[0] / f"{kind}-{contents}.keras"
    assert b"polyak_model" not in path.read_bytes()
    assert [member.compress_type for member in zipfile.ZipFile(path).infolist()] == [0, 0, 0]


@pytest.mark.parametrize("contents", CONTENTS)
def test_vocabularies_are_extracted(tmp_path, contents):
    lookup = keras.layers.StringLookup(vocabulary=["one", "two"])
    model = keras.Sequential(
        [keras.Input((1,), dtype="string"), lookup, keras.layers.Embedding(3, 2)]
    )
    from polyak_model import PolyakModel

    PolyakModel(model).save(tmp_path / "words.keras")
    extract_file(tmp_path / "words.keras", contents, tmp_path / "out.keras")
    loaded = keras.models.load_model(tmp_path / "out.keras")
    assert loaded.layers[0].get_vocabulary() == ["[UNK]", "one", "two"]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_models_of_lower_precision_are_extracted(tmp_path, policy):
    default = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = make_wrapper("functional")
        model.save(tmp_path / "wrapper.keras")
        for contents in CONTENTS:
            extract_file(tmp_path / "wrapper.keras", contents, tmp_path / f"{contents}.keras")
            loaded = keras.models.load_model(tmp_path / f"{contents}.keras")
            for variable, original in zip(
                loaded.weights, choose(model, contents).weights, strict=True
            ):
                assert variable.dtype == original.dtype
                np.testing.assert_array_equal(variable.numpy(), original.numpy())
    finally:
        keras.config.set_dtype_policy(default)


def test_models_extracted_from_an_uncompiled_wrapper_are_not_compiled(tmp_path):
    from polyak_model import PolyakModel

    PolyakModel(KINDS["sequential"]()).save(tmp_path / "wrapper.keras")
    for contents in CONTENTS:
        extract_file(tmp_path / "wrapper.keras", contents, tmp_path / "out.keras")
        assert not keras.models.load_model(tmp_path / "out.keras").compiled


@pytest.fixture
def refused(tmp_path):
    """Returns why nothing is extracted; what lay at the output is unchanged."""

    def refused(source, output="out.keras"):
        (tmp_path / output).write_text("before")
        names = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(InputError) as caught:
            extract_file(source, "average", tmp_path / output)
        assert (tmp_path / output).read_text() == "before"
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert "\n" not in str(caught.value)
        assert repr(str(source)) in str(caught.value)
        return str(caught.value)

    return refused


def test_a_plain_model_has_no_average_to_extract(refused, tmp_path):
    KINDS["sequential"]().save(tmp_path / "plain.keras")
    assert "it contains no average. Name a file that" in refused(tmp_path / "plain.keras")


def test_a_wrapper_inside_a_larger_model_is_named(refused, tmp_path):
    model = keras.Sequential([keras.Input((6,)), make_wrapper("functional")])
    model.save_weights(tmp_path / "larger.weights.h5")
    line = refused(tmp_path / "larger.weights.h5", "out.weights.h5")
    assert "a model with a PolyakModel inside, at 'layers/polyak_model'" in line


@pytest.mark.parametrize("config", [{}, {"config": 1}, {"config": {"model": {"class_name": 1}}}])
def test_a_config_without_a_model_is_refused(saved, refused, tmp_path, config):
    rewrite(saved[0] / "sequential.keras", tmp_path / "odd.keras", "config.json", config)
    assert "its config.json does not describe a PolyakModel" in refused(tmp_path / "odd.keras")


def test_a_damaged_vocabulary_is_refused(saved, refused, tmp_path):
    asset = "assets/averages/average/layers/string_lookup/vocabulary.txt"
    source = tmp_path / "odd.keras"
    rewrite(saved[0] / "sequential.keras", source, asset, '"vocabulary"')
    source.write_bytes(source.read_bytes().replace(b'"vocabulary"', b'"vocabularx"'))
    assert f"its member {asset!r} is damaged" in refused(source)


def test_a_config_of_any_depth_is_extracted_or_refused(saved, refused, tmp_path):
    source = tmp_path / "deep.keras"
    refusals = 0
    # From Python 3.13 on, JSON may be nested several times as deep as before.
    for depth in (*range(100, 3000, 97), 100_000):
        deep = "[" * depth + "]" * depth
        text = '{"config": {"model": {"class_name": "A", "config": ' + deep + "}}}"
        rewrite(saved[0] / "sequential.keras", source, "config.json", text)
        try:
            extract_file(source, "raw", tmp_path / "out.keras")
        except InputError:
            refusals += 1
            assert "config.json" in refused(source)
    assert 0 < refusals < 31


def rewrite(source, target, name, content):
    """Copies an archive with another content of one member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            if member != name:
                new.writestr(member, old.read(member))
        new.writestr(name, content if isinstance(content, str) else json.dumps(content))
