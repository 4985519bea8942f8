import importlib.util
import os
import pathlib
import pickle
import subprocess
import sys
import types
import warnings
import zipfile

import keras
import numpy as np
import pytest
import serving_worker
import tensorflow as tf
from keras import layers
from models import CROSSENTROPY, LazyClassifier, assert_identical

from polyak_model import PolyakModel, UniformAverage
from polyak_model.inference import export as shipping

pytestmark = pytest.mark.processes

ROUTES = ("average", "raw", "ensemble")
# Other runtimes sum in another order: eight float32 roundings of probabilities, at most 1 each.
OTHER_RUNTIME = 8 * np.finfo("float32").eps
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("tf2onnx", "onnxruntime"))
HAS_LITERT = importlib.util.find_spec("keras.src.export.litert") is not None


def train(model, x, y, loss=CROSSENTROPY, metrics=None):
    # Without XLA, since that is how a SavedModel is served: then answers agree bit for bit.
    model.compile("adam", loss, metrics=metrics, jit_compile=False)
    model.fit(x, y, batch_size=8, verbose=0)
    return model


def make_data():
    generator = np.random.default_rng(0)
    return generator.random((24, 6), "float32"), generator.integers(0, 3, 24)


def make_classifier():
    model = PolyakModel(serving_worker.make_net(), UniformAverage())
    return train(model, *make_data(), metrics=["accuracy"])


def make_of_words_and_numbers():
    """Dicts in and out, a table in the graph, a device, and answers joined by a callable."""
    words = layers.TextVectorization(output_sequence_length=4, vocabulary=["red", "green", "blue"])
    inputs = {
        "words": keras.Input((1,), dtype="string", name="words"),
        "numbers": keras.Input((6,), name="numbers"),
    }
    meaning = layers.GlobalAveragePooling1D()(layers.Embedding(5, 4)(words(inputs["words"])))
    hidden = layers.Concatenate()([meaning, inputs["numbers"]])
    outputs = {"p": layers.Dense(2, name="p")(hidden), "q": layers.Dense(1, name="q")(hidden)}

    def mostly_average(answers):
        return keras.tree.map_structure(lambda raw, average: raw / 4 + 3 * average / 4, *answers)

    model = PolyakModel(
        keras.Model(inputs, outputs), combine=mostly_average, device="CPU:0", inference="ensemble"
    )
    x, _ = make_data()
    sentences = np.array([["red green"], ["blue blue"], ["green sky"]] * 8)
    x = {"words": tf.constant(sentences), "numbers": x}
    y = {"p": x["numbers"][:, :2], "q": x["numbers"][:, 2:3]}
    return train(model, x, y, "mse"), x


def make_subclassed():
    """A model that declares no inputs, in half precision, whose answers are joined as logits."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = PolyakModel(LazyClassifier(), combine="softmax")
    train(model, *make_data())
    keras.config.set_dtype_policy("float32")
    return model


def make_larger(data):
    """A larger model with an average in it; nobody has asked for that since the last step."""
    part = PolyakModel(serving_worker.make_net(), UniformAverage())
    x = keras.Input((6,))
    larger = keras.Model(x, layers.Dense(3, activation="softmax")(part(layers.Dense(6)(x))))
    return train(larger, *data), part


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """What was shipped, what was expected of it, and what another process found."""
    folder = tmp_path_factory.mktemp("shipped")
    keras.utils.set_random_seed(0)
    x, y = make_data()
    served, expected = {}, {}

    def ship(name, model, x, using=None):
        model.export(folder / name, using=using, verbose=False)
        served[name] = keras.tree.map_structure(np.asarray, x)
        expected[name] = model.predict(x, using=using, verbose=0)

    classifier, lazy = make_classifier(), make_subclassed()
    mixed, mixed_x = make_of_words_and_numbers()
    for route in ROUTES:
        ship(f"classifier-{route}", classifier, x, route)
    ship("mixed", mixed, mixed_x)
    ship("mixed-average", mixed, mixed_x, "average")
    ship("lazy", lazy, x)
    ship("lazy-ensemble", lazy, x, "ensemble")

    larger, part = make_larger((x, y))
    archive = keras.export.ExportArchive()
    archive.add_endpoint("serve", larger.__call__, [keras.InputSpec("float32", (None, 6))])
    archive.write_out(folder / "lean", verbose=False)
    larger.export(folder / "larger", verbose=False)
    served |= {"larger": x, "lean": x}
    expected |= dict.fromkeys(["larger", "lean"], larger.predict(x, verbose=0))

    average = classifier.average_model
    average.save(folder / "average.keras")
    average.save_weights(folder / "average.weights.h5")
    average.export(folder / "plain", verbose=False)
    served["plain"], expected["plain"] = x, expected["classifier-average"]
    others = ("average", "ensemble")
    for format, suffix, available in (("litert", "tflite", HAS_LITERT), ("onnx", "onnx", HAS_ONNX)):
        for route in others if available else ():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # They concern the converters alone.
                classifier.export(folder / f"{route}.{suffix}", format, False, using=route)

    (folder / "shipped.pickle").write_bytes(pickle.dumps({"data": (x, y), "served": served}))
    worker = subprocess.run(
        [sys.executable, serving_worker.__file__, str(folder)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert worker.returncode == 0, worker.stderr
    return types.SimpleNamespace(
        folder=folder,
        expected=expected,
        results=pickle.loads((folder / "results.pickle").read_bytes()),
        classifier=classifier,
        evaluated=classifier.evaluate(x, y, verbose=0),
        larger=larger,
        part=part,
        mixed=mixed,
        lazy=lazy,
    )


SERVED = [
    *(f"classifier-{route}" for route in ROUTES),
    *("mixed", "mixed-average", "lazy", "lazy-ensemble", "larger", "lean", "plain"),
]


def test_a_saved_model_is_served_elsewhere_as_predicted_here_bit_for_bit(shipped):
    assert sorted(shipped.expected) == sorted(SERVED)
    for name in SERVED:
        expected, received = shipped.expected[name], shipped.results["served"][name]["answer"]
        keras.tree.assert_same_structure(expected, received)
        assert_identical(keras.tree.flatten(expected), keras.tree.flatten(received))
    answers = [shipped.expected[f"classifier-{route}"] for route in ROUTES]
    assert len({answer.tobytes() for answer in answers}) == 3


def shapes(variables):
    return sorted(list(variable.shape) for variable in variables)


def weight_shapes(*models):
    return shapes(weight for model in models for weight in model.weights)


def test_a_served_graph_assigns_nothing(shipped):
    for served in shipped.results["served"].values():
        assert served["assigns"] == []


def test_a_saved_model_holds_the_weights_of_its_route_and_nothing_of_training(shipped):
    classifier, mixed, lazy = shipped.classifier, shipped.mixed, shipped.lazy
    for name, models in {
        "classifier-average": [classifier.average_model],
        "classifier-raw": [classifier.raw_model],
        "classifier-ensemble": [classifier.raw_model, classifier.average_model],
        "plain": [classifier.average_model],
        "mixed": [mixed.raw_model, mixed.average_model],
        "mixed-average": [mixed.average_model],
        "lazy": [lazy.average_model],
        "lazy-ensemble": [lazy.raw_model, lazy.average_model],
    }.items():
        served = shipped.results["served"][name]
        assert served["used"] == weight_shapes(*models), name
        # The rest is what Keras keeps for dropout, the states of its random numbers.
        assert served["weights"] == shapes(v for model in models for v in model.variables), name
        assert served["others"] == []


def test_an_archive_without_tracking_ships_the_average_alone_of_a_larger_model(shipped):
    used = weight_shapes(shipped.part.average_model, *shipped.larger.layers[1::2])
    assert [layer.count_params() for layer in shipped.larger.layers[1::2]] == [42, 12]
    for name in ("larger", "lean"):
        assert shipped.results["served"][name]["used"] == used
    assert shipped.results["served"]["lean"]["weights"] == []


def test_a_saved_average_predicts_and_is_evaluated_elsewhere_as_here(shipped):
    results = shipped.results
    for name in ("loaded", "weighted"):
        np.testing.assert_array_equal(results[name], shipped.expected["classifier-average"])
    assert results["evaluated"] == shipped.evaluated
    with zipfile.ZipFile(shipped.folder / "average.keras") as archive:
        assert b"polyak" not in archive.read("config.json")


@pytest.mark.skipif(not HAS_LITERT, reason="this Keras does not export to LiteRT")
def test_a_lite_model_answers_as_predicted_here(shipped):
    for route, received in zip(("average", "ensemble"), shipped.results["lite"], strict=True):
        expected = shipped.expected[f"classifier-{route}"]
        np.testing.assert_allclose(received, expected, rtol=0, atol=OTHER_RUNTIME)


@pytest.mark.skipif(not HAS_ONNX, reason="needs the packages tf2onnx and onnxruntime")
def test_an_onnx_model_answers_as_predicted_here_and_holds_no_other_route(shipped):
    for route, received in zip(("average", "ensemble"), shipped.results["onnx"], strict=True):
        expected = shipped.expected[f"classifier-{route}"]
        np.testing.assert_allclose(received["answer"], expected, rtol=0, atol=OTHER_RUNTIME)
    average, ensemble = (received["values"] for received in shipped.results["onnx"])
    assert average <= shipped.classifier.average_model.count_params() < ensemble


# Archives of the user's own


def make_net_of_words():
    table = layers.StringLookup(vocabulary=["red", "green"])
    inputs = keras.Input((1,), dtype="string")
    return keras.Model(
        inputs, layers.Dense(2)(layers.Flatten()(layers.Embedding(3, 4)(table(inputs))))
    )


NETS = {
    "numbers": (serving_worker.make_net, lambda: tf.constant(make_data()[0])),
    "words": (make_net_of_words, lambda: tf.constant([["red"], ["blue"], ["green"]] * 8)),
}


@pytest.fixture(params=NETS)
def archived(request):
    """A compiled wrapper, its inputs, and an archive that tracks it."""
    make, make_inputs = NETS[request.param]
    model = PolyakModel(make(), UniformAverage())
    model.compile("sgd", "mse", jit_compile=False)
    return model, make_inputs(), keras.export.ExportArchive()


@pytest.mark.parametrize("trained_between", [False, True])
def test_a_function_that_was_called_before_is_exported(archived, trained_between, tmp_path):
    model, x, archive = archived
    y = np.zeros((len(x), model.raw_model.output_shape[1]))
    model.fit(x, y, verbose=0)

    @tf.function(input_signature=[tf.TensorSpec((None, x.shape[1]), x.dtype)])
    def function(x):
        return model(x, training=False)

    function(x)
    if trained_between:
        model.fit(x, y, verbose=0)
    archive.track(model)
    archive.add_endpoint("serve", function)
    archive.write_out(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_array_equal(served.serve(x), model.predict(x, verbose=0))


def test_a_wrapper_is_tracked_and_added_in_one_line(archived, tmp_path):
    model, x, archive = archived
    signature = [tf.TensorSpec((None, x.shape[1]), x.dtype)]
    archive.track_and_add_endpoint("serve", model, input_signature=signature)
    archive.write_out(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_array_equal(served.serve(x), model.predict(x, verbose=0))


# Exporting is no event in the life of a model


def test_training_goes_on_after_an_export_as_if_there_had_been_none(tmp_path):
    data = make_data()
    states = []
    for exports in (False, True):
        keras.utils.set_random_seed(0)
        model = make_classifier()
        if exports:
            before = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
            for route in ROUTES:
                model.export(tmp_path / route, using=route, verbose=False)
            after = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
            assert_identical(before, after)
        history = model.fit(*data, verbose=0, validation_data=data).history
        states.append([*model.get_weights(), *history.values(), [model.average_step]])
    assert_identical(*states)


def test_exporting_a_larger_model_catches_up_with_its_last_step_and_counts_it_once(shipped):
    # What was served agrees with what was predicted afterwards.
    assert shipped.part.average_step == 3


# Arguments


def test_a_model_that_is_not_built_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`export\(\)` needs weights.*not built"):
        PolyakModel(LazyClassifier()).export(tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_route_or_format_is_refused(shipped, tmp_path):
    with pytest.raises(ValueError, match="`using` must be one of"):
        shipped.classifier.export(tmp_path / "served", using="mean")
    with pytest.raises(ValueError, match="format=zip"):
        shipped.classifier.export(tmp_path / "served", format="zip")
    assert list(tmp_path.iterdir()) == []


class Silent(keras.Model):
    """A model whose parts alone were called, as those of a GAN."""

    def __init__(self):
        super().__init__()
        self.part = layers.Dense(2)
        self.part.build((None, 3))

    def call(self, inputs):
        return self.part(inputs)


def test_a_model_that_tells_nothing_of_its_inputs_needs_a_signature(tmp_path):
    model = PolyakModel(Silent(), clone_function=Silent)
    with pytest.raises(ValueError, match="never called.*pass `input_signature`"):
        model.export(tmp_path / "served")
    spec = keras.InputSpec("float32", (None, 3))
    model.export(tmp_path / "served", input_signature=[spec], using="ensemble", verbose=False)
    assert (tmp_path / "served" / "saved_model.pb").exists()


def test_the_default_route_follows_inference(shipped):
    names = [name for name in SERVED if name in ("mixed", "lazy")]
    held = {name: len(shipped.results["served"][name]["used"]) for name in names}
    assert held == {"mixed": 10, "lazy": 8}


def test_the_message_names_the_place(shipped, tmp_path, capsys):
    shipped.classifier.export(tmp_path / "a" / "served")
    output = capsys.readouterr().out
    assert f"Saved artifact at '{tmp_path / 'a' / 'served'}'" in output
    assert "serve" in output


# Whole or not at all


class Exporter:
    """Exports two parts, and fails between them if it shall."""

    def __init__(self, error=None):
        self.error = error

    def export(self, path, format):
        folder = pathlib.Path(path)
        folder.mkdir()
        (folder / "saved_model.pb").write_text("new")
        if self.error:
            raise self.error
        (folder / "variables").mkdir()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failing_export_leaves_what_was_there(tmp_path, error):
    place = tmp_path / "served"
    shipping.export(Exporter(), place, "tf_saved_model")
    (place / "saved_model.pb").write_text("old")
    (tmp_path / "served.onnx").write_text("old")
    for name, format in (("served", "tf_saved_model"), ("served.onnx", "onnx")):
        with pytest.raises(error):
            shipping.export(Exporter(error("no space")), tmp_path / name, format)
    assert (place / "saved_model.pb").read_text() == "old"
    assert (tmp_path / "served.onnx").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["served", "served.onnx"]


def test_a_folder_that_holds_something_else_is_refused_before_the_export(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="for instance 'thesis.txt'.*folder of its own"):
        shipping.export(Exporter(AssertionError()), tmp_path, "tf_saved_model")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_keras_writes_to_remote_places_by_itself(shipped):
    shipped.classifier.export("ram://models/served", verbose=False)
    assert tf.io.gfile.exists("ram://models/served/saved_model.pb")
