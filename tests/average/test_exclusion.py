"""Weights that are excluded mirror the raw ones at every step; the others are averaged."""

import keras
import numpy as np
import pytest
from frameworks import in_modes
from models import CROSSENTROPY, assert_identical, compile_classifier, make_classifier

from polyak_model import PolyakModel, UniformAverage
from polyak_model.saving import layout

RARE = UniformAverage(update_every=3)


def is_bias(variable):
    return variable.name == "bias"


EXCLUDES = {
    "pattern": r".*/dense_1/.*",
    "list": [r".*/gamma", r".*/moving_.*"],
    "callable": is_bias,
}


class Mirrors(keras.callbacks.Callback):
    """Compares excluded weights after every step."""

    def on_train_batch_end(self, batch, logs=None):
        pairs = zip(self.model.raw_model.weights, self.model.average_model.weights, strict=True)
        excluded = self.model.shadow.excluded()
        equal = [np.array_equal(*map(keras.ops.convert_to_numpy, pair)) for pair in pairs]
        assert all(equal[position] for position in excluded)
        self.averaged = [same for i, same in enumerate(equal) if i not in excluded]


CASES = {
    "pattern": ("pattern", {}),
    "list-compensated": ("list", {"compensated": True}),
    "callable": ("callable", {}),
}


# Which weights are excluded is found out at wrapping, whatever the mode.
@in_modes("case", CASES, elsewhere=["pattern", "list-compensated"])
def test_excluded_weights_mirror_the_raw_ones_at_every_step(case, mode, batches):
    exclude, options = case
    inner = make_classifier()
    inner.compile(keras.optimizers.SGD(0.1), CROSSENTROPY, **mode)
    average = {"one": RARE, "two": 0.9}
    model = PolyakModel(inner, average, exclude=EXCLUDES[exclude], **options)
    mirrors = Mirrors()
    model.fit(*batches, batch_size=4, verbose=0, callbacks=[mirrors])
    assert not any(mirrors.averaged)
    assert 0 < len(model.shadow.excluded()) < len(model.weights)


def test_the_others_are_averaged_as_without_exclusion(batches):
    models = []
    for exclude in (None, r".*/gamma"):
        inner = compile_classifier(make_classifier(), "adam")
        models.append(PolyakModel(inner, 0.9, exclude=exclude))
        models[-1].fit(*batches, batch_size=4, shuffle=False, verbose=0)
    full, partial = (model.average_model.weights for model in models)
    for position, (a, b) in enumerate(zip(full, partial, strict=True)):
        same = np.array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
        assert same == (position not in models[1].shadow.excluded())


@pytest.mark.parametrize("exclude", EXCLUDES.values(), ids=EXCLUDES)
def test_exclusion_is_saved_and_loaded(exclude, tmp_path, batches):
    # Four eager steps take less time than tracing one.
    inner = compile_classifier(make_classifier(), "adam", run_eagerly=True)
    model = PolyakModel(inner, 0.9, exclude=exclude)
    model.fit(*batches, batch_size=16, verbose=0)
    model.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    assert loaded.shadow.excluded() == model.shadow.excluded()
    for each in (model, loaded):
        each.fit(*batches, batch_size=16, shuffle=False, verbose=0)
    assert_identical(loaded.get_weights(), model.get_weights())


def test_files_name_the_excluded_weights(tmp_path):
    model = PolyakModel(make_classifier(), exclude=r".*/dense_1/.*")
    described = layout.decode(layout.encode(model.shadow.describe()))
    names = [described["weights"][position][0] for position in described["excluded"]]
    assert [name.rpartition("dense_1/")[2] for name in names] == ["kernel", "bias"]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("dense", "which matches 0 of .* A pattern must match a whole path"),
        (".*", "leave others to be averaged. Received: exclude=.* matches"),
        (lambda variable: False, "which matches 0 of"),
        ("(", r"must be a regular expression. Received: '\('"),
        (3.5, "must be a regular expression for paths of variables.* exclude=3.5"),
        ([None], r"must be a regular expression for paths of variables.* exclude=\[None\]"),
    ],
)
def test_an_exclusion_that_excludes_nothing_or_everything_is_refused(exclude, message):
    with pytest.raises(ValueError, match=message):
        PolyakModel(make_classifier(), exclude=exclude)


def test_exclusion_acts_on_a_model_that_is_built_by_its_first_batch():
    inner = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(1)])
    inner.compile("sgd", "mse")
    model = PolyakModel(inner, 0.9, exclude=r".*/bias")
    model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    assert model.shadow.excluded() == [1, 3]
