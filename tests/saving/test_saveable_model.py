"""What a PolyakModel saves, it loads; what cannot be loaded leaves it as it was."""

import pathlib
import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from keras import layers
from models import assert_identical, compile_classifier, make_classifier

from polyak_model import PolyakModel, PowerAverage
from polyak_model.saving import layout
from polyak_model.saving.saveable_model import size_in_file, state_variables

FORMATS = pathlib.Path(__file__).parents[1] / "formats"


def make_model():
    """Wraps a net with BatchNormalization and dropout, and averages with compensation."""
    inner = compile_classifier(make_classifier(), "adam")
    return PolyakModel(inner, PowerAverage(2), compensated=True)


def state(model):
    """Everything that a file shall hold, the seeds of dropout included."""
    metrics = {id(variable) for variable in model.metrics_variables}
    variables = [v for v in state_variables(model) if id(v) not in metrics]
    return [model.average_step, *(variable.numpy() for variable in variables)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the files of a model after two steps, and what cannot be loaded."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(64, 6)).astype("float32"), generator.integers(0, 3, size=64)
    model = make_model()
    model.fit(x, y, batch_size=32, verbose=0)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    model.raw_model.save_weights(folder / "bare.weights.h5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "FORMAT", 99)
        model.save(folder / "newer.keras")
        model.save_weights(folder / "newer.weights.h5")
    for path in (folder / "model.keras", folder / "model.weights.h5"):
        whole = path.read_bytes()
        path.with_name(f"truncated-{path.name}").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere.weights.h5", OSError, "nowhere.weights.h5"),
        ("truncated-model.weights.h5", OSError, "Cannot use .*truncated-model.weights.h5': it is"),
        ("truncated-model.keras", OSError, "truncated-model.keras': it is a damaged .keras file"),
        ("bare.weights.h5", ValueError, "bare.weights.h5' contains no average: .* plain model"),
        ("newer.weights.h5", ValueError, "Cannot load .*newer.weights.h5'.* format 99, .* Install"),
        ("newer.keras", ValueError, "Cannot load .*newer.keras'.* format 99, .* Install"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_and_leaves_the_model_untouched(
    trained, name, kind, message
):
    model = make_model()
    before = state(model)
    with pytest.raises(kind, match=message):
        model.load_weights(trained / name)
    assert_identical(state(model), before)


@pytest.mark.tensorflow
def test_a_model_of_a_newer_format_is_refused_by_load_model(trained):
    with pytest.raises(ValueError, match="format 99, .* Install that version"):
        keras.models.load_model(trained / "newer.keras")


@pytest.mark.parametrize("more", [0, 1], ids=["wider", "deeper"])
def test_another_architecture_is_refused_and_leaves_the_model_untouched(trained, more):
    hidden = make_classifier().layers[:-1] if more else [layers.Dense(7), layers.Dense(7)]
    ends = [layers.Dense(3, name=f"end_{index}") for index in range(1 + more)]
    model = PolyakModel(keras.Sequential([keras.Input((6,)), *hidden, *ends]))
    before = state(model)
    with pytest.raises(
        ValueError, match="model.weights.h5'. The file contains another architecture"
    ):
        model.load_weights(trained / "model.weights.h5")
    assert_identical(state(model), before)


class Unloadable(layers.Dense):
    def load_own_variables(self, store):
        raise OSError("a read error")


def test_a_failure_in_the_middle_of_loading_is_undone(trained):
    hidden = make_classifier().layers[:-1]
    last = Unloadable(3, name="last")
    model = PolyakModel(keras.Sequential([keras.Input((6,)), *hidden, last]), compensated=True)
    before = state(model)
    with pytest.raises(ValueError, match="a read error|could not be loaded"):
        model.load_weights(trained / "model.weights.h5")
    assert_identical(state(model), before)


@pytest.mark.tensorflow
def test_weights_are_loaded_only_into_a_model_that_has_some(trained):
    model = PolyakModel(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="`load_weights.*not built. Call model.build"):
        model.load_weights(trained / "model.weights.h5")


@pytest.mark.tensorflow
def test_weights_load_into_a_model_that_is_not_compiled(trained):
    model = PolyakModel(make_classifier(), compensated=True)
    model.load_weights(trained / "model.weights.h5")
    assert model.average_step == 2


@pytest.mark.tensorflow
def test_an_optimizer_without_state_loads_beside_that_of_a_compiled_part(tmp_path):
    models = []
    for _ in range(2):
        part = compile_classifier(make_classifier(), "adam")
        part.optimizer.build(part.trainable_variables)
        inner = keras.Sequential([keras.Input((6,)), part])
        inner.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        models.append(PolyakModel(inner))
    models[0].save_weights(tmp_path / "model.weights.h5")
    models[1].load_weights(tmp_path / "model.weights.h5")
    assert not models[1].optimizer.built
    assert_identical(models[1].get_weights(), models[0].get_weights())


@pytest.mark.tensorflow
def test_a_file_is_not_overwritten_when_the_user_declines(trained, tmp_path, monkeypatch):
    model = PolyakModel(make_classifier())
    for save, name in ((model.save, "a.keras"), (model.save_weights, "a.weights.h5")):
        path = tmp_path / name
        save(path, overwrite=False)
        saved = path.read_bytes()
        monkeypatch.setattr("builtins.input", lambda question: "n")
        save(path, overwrite=False)
        assert path.read_bytes() == saved


@pytest.mark.tensorflow
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_a_file_is_no_larger_than_the_room_that_is_made_sure_of(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    model = make_small()
    model.fit(np.ones((8, 2)), np.ones((8, 3)), verbose=0)
    for save, name in ((model.save, "a.keras"), (model.save_weights, "a.weights.h5")):
        save(tmp_path / name)
        assert (tmp_path / name).stat().st_size <= size_in_file(model)


@pytest.mark.tensorflow
def test_a_disk_that_fills_up_leaves_the_file_before_and_is_told(trained):
    resource = pytest.importorskip("resource")  # Windows has none.
    paths = [trained / "model.keras", trained / "model.weights.h5"]
    before = [path.read_bytes() for path in paths]
    model = keras.models.load_model(paths[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save, path in zip((model.save, model.save_weights), paths, strict=True):
        told = f"Cannot write '{path}': File too large. What was there before is unchanged"
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        try:
            with pytest.raises(OSError, match=re.escape(told)):
                save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in paths] == before
    assert not list(trained.glob(".polyak_model-partial-*"))


@pytest.mark.parametrize("number", range(1, layout.FORMAT_IF_SHARED + 1))
def test_files_of_every_format_so_far_load(number):
    """Each was written by `write_files` below when its format was new."""
    expected = np.load(FORMATS / f"format-{number}.npz")
    loaded = keras.models.load_model(FORMATS / f"format-{number}.keras")
    assert loaded.shadow.first.rule.get_config() == PowerAverage(2).get_config()
    fresh = make_small(share_frozen=number == layout.FORMAT_IF_SHARED)
    fresh.load_weights(FORMATS / f"format-{number}.weights.h5")
    for model in (loaded, fresh):
        assert len(model.shadow.first.pairing.shared) == 2 * (number == layout.FORMAT_IF_SHARED)
        assert model.average_step == expected["step"]
        assert int(model.optimizer.iterations) == expected["step"]
        for route in ("average", "raw"):
            answer = model.predict(expected["x"], using=route, verbose=0)
            np.testing.assert_allclose(answer, expected[route], rtol=1e-5)


@pytest.mark.parametrize("written", ["tensorflow", "jax", "torch"])
def test_weights_written_on_any_backend_load_to_the_bit_and_go_on_to_rounding(written):
    """Each was written on its backend after 6 steps; the arrays end with the averages after 8."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    net = [keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1)]
    model = PolyakModel(keras.Sequential(net), {"a": 0.9, "b": PowerAverage()})
    model.compile("adam", "mse")
    model.load_weights(FORMATS / f"from-{written}.weights.h5")
    expected = list(np.load(FORMATS / f"from-{written}.npz").values())
    averages = [weight for each in model.average_models.values() for weight in each.weights]
    loaded = [*model.raw_model.weights, *averages]
    assert_identical([keras.ops.convert_to_numpy(weight) for weight in loaded], expected[:12])
    model.fit(x, x[:, :1], shuffle=False, verbose=0)
    assert model.average_step == 8
    for average, after in zip(averages, expected[12:], strict=True):
        received = keras.ops.convert_to_numpy(average)
        np.testing.assert_allclose(received, after, rtol=0, atol=1e-7)


def test_master_copies_residuals_and_seeds_of_format_1_load():
    """The files were written by version 0.1.0 under the oldest Keras."""
    net = [keras.Input((2,)), layers.Dense(3, dtype="bfloat16"), layers.Dropout(0.5)]
    model = PolyakModel(keras.Sequential(net), compensated=True)
    model.load_weights(FORMATS / "format-1-compensated.weights.h5")
    state = {}
    model.shadow.save_own_variables(state)
    expected = np.load(FORMATS / "format-1-compensated.npz")
    assert len(expected.files) == 7
    for name in expected.files:
        received = keras.ops.convert_to_numpy(state[name])
        np.testing.assert_array_equal(received, expected[name], err_msg=name)


@pytest.mark.tensorflow
def test_a_sequential_model_that_is_rewritten_as_a_functional_one_loads(tmp_path):
    sequential = make_small()
    sequential.fit(np.ones((8, 2)), np.ones((8, 3)), verbose=0)
    sequential.save_weights(tmp_path / "a.weights.h5")
    inputs = keras.Input((2,))
    outputs = layers.BatchNormalization()(layers.Dense(3)(inputs))
    functional = PolyakModel(keras.Model(inputs, outputs), PowerAverage(2))
    functional.load_weights(tmp_path / "a.weights.h5")
    assert_identical(functional.get_weights(), sequential.get_weights())
    assert functional.average_step == 1


class Former(keras.Model):
    """A subclassed net that is renamed later."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


class Renamed(Former):
    """The same net under its new name."""


def train_subclass(kind):
    inner = kind()
    inner.compile("sgd", "mse")
    model = PolyakModel(inner, 0.5)
    model.fit(np.random.default_rng(0).normal(size=(8, 2)), np.ones((8, 3)), verbose=0)
    return model


@pytest.mark.tensorflow
@pytest.mark.parametrize("skip_mismatch", [False, True])
def test_a_model_whose_class_was_renamed_loads_whole(skip_mismatch, tmp_path):
    model = train_subclass(Former)
    model.save_weights(tmp_path / "a.weights.h5")
    loaded = train_subclass(Renamed)
    loaded.load_weights(tmp_path / "a.weights.h5", skip_mismatch=skip_mismatch)
    assert_identical(loaded.get_weights(), model.get_weights())


@pytest.mark.tensorflow
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_what_is_skipped_in_the_raw_model_is_skipped_in_its_averages(policy, tmp_path):
    keras.config.set_dtype_policy(policy)

    def train(units):
        net = [keras.Input((2,)), layers.Dense(4), layers.Dense(units)]
        inner = keras.Sequential(net)
        inner.compile("sgd", "mse")
        model = PolyakModel(inner, {"short": 0.5, "long": 0.9})
        model.fit(np.ones((8, 2)), np.ones((8, units)), verbose=0)
        return model

    model, other = train(3), train(5)
    model.save_weights(tmp_path / "a.weights.h5")
    before = other.get_weights()
    with pytest.warns(UserWarning, match="could not be loaded"):
        other.load_weights(tmp_path / "a.weights.h5", skip_mismatch=True)
    kinds = {"raw": (model.raw_model, other.raw_model)}
    kinds |= {n: (model.average_models[n], other.average_models[n]) for n in model.rules}
    for trained, loaded in kinds.values():
        assert_identical(loaded.layers[0].get_weights(), trained.layers[0].get_weights())
    kept = [w for w in other.get_weights() if np.shape(w)[-1:] == (5,)]
    assert_identical(kept, [w for w in before if np.shape(w)[-1:] == (5,)])


PRECISIONS = ["float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16"]
if BACKEND == "jax":
    PRECISIONS.remove("float64")  # It has 32 bits unless told otherwise.


@pytest.mark.tensorflow
@pytest.mark.parametrize("saved", PRECISIONS)
@pytest.mark.parametrize("loaded", PRECISIONS)
def test_weights_saved_under_one_precision_load_under_another(saved, loaded, tmp_path):
    models = []
    for policy in (saved, loaded):
        net = [keras.Input((2,)), layers.Dense(3, dtype=policy)]
        models.append(PolyakModel(keras.Sequential(net), 0.5, compensated=True))
        generator = np.random.default_rng(0)
        for _ in range(3):
            models[-1].raw_model.set_weights(
                [generator.normal(size=w.shape) for w in models[-1].raw_model.weights]
            )
            models[-1].update_average()
    first, second = models
    second.reset_average()
    first.save_weights(tmp_path / "a.weights.h5")
    second.load_weights(tmp_path / "a.weights.h5")
    assert second.average_step == 3
    for old, new in zip(
        first.shadow.first.pairing.averaged, second.shadow.first.pairing.averaged, strict=True
    ):
        dtype = new.average.dtype
        np.testing.assert_array_equal(old.raw.numpy().astype(dtype), new.raw.numpy())
        # The master copy of 16 bits is kept where there is room for it.
        kept = old.target.numpy().astype(new.target.dtype)
        lost = old.average.numpy().astype(dtype).astype(new.target.dtype)
        has_room = old.master is not None or new.master is None
        np.testing.assert_array_equal(new.target.numpy(), kept if has_room else lost)


@pytest.mark.parametrize("compensated", [False, True])
def test_a_file_with_another_compensation_is_refused(compensated, tmp_path):
    model = PolyakModel(make_classifier(), compensated=compensated)
    model.save_weights(tmp_path / "a.weights.h5")
    other = PolyakModel(make_classifier(), compensated=not compensated)
    before = state(other)
    with pytest.raises(ValueError, match=f"written by a model with compensated={compensated}"):
        other.load_weights(tmp_path / "a.weights.h5")
    assert_identical(state(other), before)


def make_small(share_frozen=False):
    frozen = [layers.Dense(4, trainable=False)] if share_frozen else []
    net = [keras.Input((2,)), *frozen, layers.Dense(3), layers.BatchNormalization()]
    inner = keras.Sequential(net)
    inner.compile("adam", loss="mse")
    return PolyakModel(inner, PowerAverage(2), share_frozen=share_frozen)


def write_files(share_frozen=False):
    """Writes the files of the present format.

    Call it once, when the format is new, under the oldest Keras, which cannot load what newer ones
    save.
    """
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    model = make_small(share_frozen)
    model.fit(x, x[:, :1] * np.ones(3), epochs=5, verbose=0)
    number = layout.FORMAT_IF_SHARED if share_frozen else layout.FORMAT
    path = FORMATS / f"format-{number}"
    answers = {route: model.predict(x, using=route, verbose=0) for route in ("average", "raw")}
    np.savez(path.with_suffix(".npz"), x=x, step=model.average_step, **answers)
    model.save(path.with_suffix(".keras"))
    model.save_weights(path.with_suffix(".weights.h5"))
