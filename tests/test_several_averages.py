"""Several averages of one training are to each other what they would be alone."""

import closed_forms
import keras
import numpy as np
import pytest
from models import CROSSENTROPY, assert_close, assert_identical, compile_classifier, make_classifier

from polyak_model import AverageCheckpoint, ExponentialAverage, PolyakModel, PowerAverage

NAMED = {
    "short": ExponentialAverage(0.5),
    "rare": PowerAverage(gamma=2, start_step=2, update_every=3),
    "late": ExponentialAverage(0.9, start_step=6),
}


def wrap(average, optimizer="sgd", mode=None, **kwargs):
    """Wraps a classifier. By default it is compiled with what takes little time to trace."""
    keras.utils.set_random_seed(0)
    inner = make_classifier()
    inner.compile(optimizer, CROSSENTROPY, **(mode or {}))
    return PolyakModel(inner, average, **kwargs)


def fit(average, batches, mode=None, **kwargs):
    """Trains a classifier for sixteen steps and returns its wrapper."""
    model = wrap(average, mode=mode, **kwargs)
    model.fit(*batches, batch_size=4, verbose=0)
    return model


def walk(steps=8):
    """Wraps a classifier and averages it along a random walk, which takes less time than `fit`."""
    model = wrap(NAMED)
    generator = np.random.default_rng(0)
    for _ in range(steps):
        weights = model.raw_model.get_weights()
        model.raw_model.set_weights([w + generator.uniform(size=w.shape) for w in weights])
        model.update_average()
    return model


@pytest.fixture(scope="module")
def trained():
    """A wrapper with three averages after two epochs, its data and the logs."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 6)).astype("float32")
    y = generator.integers(0, 3, size=64)
    keras.utils.set_random_seed(0)
    routes = ("average", "late", "raw", "ensemble")
    model = PolyakModel(make_classifier(), NAMED, report=routes)
    model.compile("adam", CROSSENTROPY, metrics=["accuracy"])
    history = model.fit(x, y, epochs=2, validation_split=0.25, verbose=0)
    return model, x, y, history.history


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"non_trainable": "copy"}, "eager"),
        ({}, "graph"),
        ({"compensated": True}, "graph"),
        ({"compensated": True}, "xla"),
    ],
    ids=str,
    indirect=["mode"],
)
def test_each_average_is_bit_for_bit_what_it_would_be_alone(mode, options, batches):
    together = fit(NAMED, batches, mode, **options)
    for name, rule in NAMED.items():
        alone = fit(rule, batches, mode, **options)
        assert_identical(together.raw_model.get_weights(), alone.raw_model.get_weights())
        expected = alone.average_model.get_weights()
        assert_identical(together.average_models[name].get_weights(), expected)


# With the first, only activations have 16 bits.
@pytest.mark.parametrize(("policy", "eagerly"), [("mixed_bfloat16", True), ("bfloat16", False)])
def test_each_average_of_16_bits_is_what_it_would_be_alone(policy, eagerly):
    keras.config.set_dtype_policy(policy)

    def average(rule):
        keras.utils.set_random_seed(0)
        inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        inner.compile("sgd", "mse", run_eagerly=eagerly)
        model = PolyakModel(inner, rule)
        model.fit(np.ones((8, 6)), np.ones((8, 3)), batch_size=1, verbose=0)
        return model

    together = average(NAMED)
    for name, rule in NAMED.items():
        expected = average(rule).average_model.get_weights()
        assert_identical(together.average_models[name].get_weights(), expected)


def test_each_average_equals_its_closed_form_in_a_loop_of_ones_own():
    inner = make_classifier()
    rules = {name.replace("-", "_"): rule for name, rule in closed_forms.RULES.items()}
    model = PolyakModel(inner, rules)
    generator = np.random.default_rng(0)
    start, iterates = inner.get_weights(), []
    for _ in range(20):
        iterates.append([w + generator.normal(size=w.shape) for w in inner.get_weights()])
        inner.set_weights(iterates[-1])
        iterates[-1] = inner.get_weights()
        model.update_average()
    for name, rule in rules.items():
        expected = closed_forms.average(rule, start, iterates)
        assert_close(expected, model.average_models[name].get_weights(), ulps=4)


def test_the_first_average_is_the_default_and_is_also_called_average(trained):
    model, x, y, _ = trained
    assert model.inference == "short"
    assert model.average_model is model.average_models["short"]
    assert model.rule is model.rules["short"]
    expected = model.predict(x, using="short", verbose=0)
    assert_identical(
        [expected, expected],
        [model.predict(x, verbose=0), model.predict(x, using="average", verbose=0)],
    )
    scores = [model.evaluate(x, y, verbose=0, using=route) for route in ("average", "short")]
    assert scores[0] == scores[1]


def test_each_average_is_a_route_that_outputs_what_its_model_outputs(trained):
    model, x, y, _ = trained
    for name, average in model.average_models.items():
        expected = average.predict(x, verbose=0)
        np.testing.assert_array_equal(model.predict(x, using=name, verbose=0), expected)
        # Batches of another size may be rounded otherwise.
        expected = average.predict_on_batch(x)
        np.testing.assert_array_equal(model.predict_on_batch(x, using=name), expected)
        own = model.evaluate(x, y, verbose=0, using=name, return_dict=True)
        assert own["accuracy"] == average.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]


def test_the_ensemble_joins_the_raw_model_and_the_first_average(trained):
    model, x, _, _ = trained
    members = [model.predict(x, using=route, verbose=0) for route in ("raw", "short")]
    joined = model.predict(x, using="ensemble", verbose=0)
    np.testing.assert_allclose(joined, np.mean(members, axis=0), rtol=1e-5, atol=1e-6)


def test_the_first_reported_route_has_plain_names_and_the_others_their_own(trained):
    _, _, _, logs = trained
    prefixes = ("", "late_", "raw_", "ensemble_")
    names = {f"val_{prefix}{score}" for prefix in prefixes for score in ("loss", "accuracy")}
    assert {name for name in logs if name.startswith("val_")} == names


class Counting(keras.layers.Layer):
    """Counts how often it is called eagerly outside training."""

    calls = 0

    def call(self, inputs, training=False):
        if not training:
            Counting.calls += 1
        return inputs


def test_a_report_runs_each_model_once_per_batch():
    inner = keras.Sequential([keras.Input((6,)), Counting(), keras.layers.Dense(1)])
    inner.compile("sgd", "mse", run_eagerly=True)
    model = PolyakModel(inner, NAMED, report=("short", "late", "raw", "ensemble"))
    x, y = np.ones((8, 6)), np.ones((8, 1))
    model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    Counting.calls = 0
    model.evaluate(x, y, batch_size=4, verbose=0)
    assert Counting.calls == 3 * 2


class SetRule(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.set_rule("late", 0.25)


def test_the_rule_of_one_average_is_set_in_mid_training_and_the_others_keep_their_past(batches):
    changed = fit(NAMED, batches)
    kept = fit(NAMED, batches)
    for model, callbacks in ((changed, [SetRule()]), (kept, [])):
        second = {
            "shuffle": False,
            "epochs": 2,
            "initial_epoch": 1,
            "verbose": 0,
            "callbacks": callbacks,
        }
        model.fit(*batches, batch_size=4, **second)
    for name in ("short", "rare"):
        expected = kept.average_models[name].get_weights()
        assert_identical(changed.average_models[name].get_weights(), expected)
    assert changed.rules["late"] == ExponentialAverage(0.25)
    assert changed.average_step == kept.average_step == 32
    differs = changed.average_models["late"].get_weights()[0]
    assert np.any(differs != kept.average_models["late"].get_weights()[0])


def test_rules_by_name_are_read_only(trained):
    model = trained[0]
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.rules["short"] = ExponentialAverage(0.1)
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.average_models["short"] = model.raw_model


def test_any_average_is_applied_to_the_raw_model():
    model = walk()
    for name in (None, "rare"):
        model.apply_average(name)
        expected = model.average_models[name or "short"].get_weights()
        assert_identical(model.raw_model.get_weights(), expected)
        assert np.any(expected[0] != model.average_models["late"].get_weights()[0])


def test_statistics_are_refreshed_in_the_average_that_is_named(batches):
    model = walk()
    before = {name: each.get_weights() for name, each in model.average_models.items()}
    model.refresh_statistics(batches[0], verbose=0, name="rare")
    after = {name: each.get_weights() for name, each in model.average_models.items()}
    assert_identical(before["short"], after["short"])
    assert any(np.any(a != b) for a, b in zip(before["rare"], after["rare"], strict=True))


def test_reset_makes_all_averages_copies_of_the_raw_weights():
    model = walk()
    model.reset_average()
    assert model.average_step == 0
    for average in model.average_models.values():
        assert_identical(average.get_weights(), model.raw_model.get_weights())


def test_a_training_with_several_averages_goes_on_from_its_file_bit_for_bit(tmp_path, batches):
    model = fit(NAMED, batches, optimizer="adam", compensated=True)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    filled = wrap(NAMED, optimizer="adam", compensated=True)
    filled.load_weights(tmp_path / "model.weights.h5")
    for each in (model, loaded, filled):
        assert dict(each.rules) == NAMED
        assert each.average_step == 16
        each.fit(*batches, batch_size=4, shuffle=False, verbose=0)
    for each in (loaded, filled):
        assert_identical(each.get_weights(), model.get_weights())


def test_averages_are_added_to_and_left_out_of_a_training_that_goes_on(tmp_path, batches):
    model = fit(NAMED, batches)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = ExponentialAverage(0.5)
    other = wrap({"new": fresh, "rare": NAMED["rare"]})
    other.load_weights(tmp_path / "model.weights.h5")
    loaded = [average.get_weights() for average in other.average_models.values()]
    assert_identical(loaded[0], model.raw_model.get_weights())
    assert_identical(loaded[1], model.average_models["rare"].get_weights())
    alone = wrap({"rare": fresh})
    alone.load_weights(tmp_path / "model.weights.h5")
    alone.reset_average()
    for each in (model, other, alone):
        each.fit(*batches, batch_size=4, shuffle=False, verbose=0)
    assert_identical(
        other.average_models["rare"].get_weights(), model.average_models["rare"].get_weights()
    )
    assert (other.average_step, alone.average_step) == (32, 16)
    # Its rule counts from the step at which it was added.
    assert_identical(other.average_models["new"].get_weights(), alone.average_model.get_weights())
    other.save(tmp_path / "other.keras")
    again = keras.models.load_model(tmp_path / "other.keras")
    assert int(again.shadow.averages["new"].origin.numpy()) == 16


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (0.9, NAMED, "the average 'average', the model has the averages 'short', 'rare', 'late'"),
        (NAMED, 0.9, "the averages 'short', 'rare', 'late', the model has the average 'average'"),
    ],
)
def test_a_file_without_an_average_in_common_is_refused(saved, loaded, message, tmp_path):
    PolyakModel(make_classifier(), saved).save_weights(tmp_path / "model.weights.h5")
    model = PolyakModel(make_classifier(), loaded)
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        model.load_weights(tmp_path / "model.weights.h5")
    assert_identical(model.get_weights(), before)


def test_each_average_is_checkpointed_by_its_own_score(tmp_path, batches):
    paths = {name: tmp_path / f"{name}.keras" for name in ("average", "late", "raw")}
    monitors = {"average": "val_loss", "late": "val_late_loss", "raw": "val_raw_loss"}
    callbacks = [
        AverageCheckpoint(path, name, monitors[name], "min", save_best_only=True)
        for name, path in paths.items()
    ]
    inner = compile_classifier(make_classifier(), "adam")
    model = PolyakModel(inner, NAMED, report=("short", "late", "raw"))
    logs = model.fit(*batches, epochs=3, validation_data=batches, callbacks=callbacks, verbose=0)
    for callback, name in zip(callbacks, paths, strict=True):
        assert callback.best == min(logs.history[monitors[name]])
        score = keras.models.load_model(paths[name]).evaluate(*batches, verbose=0)
        np.testing.assert_allclose(np.ravel(score)[0], callback.best, rtol=1e-5)


def test_a_checkpoint_of_an_unknown_average_is_refused_before_training(tmp_path, batches):
    model = wrap(NAMED)
    callback = AverageCheckpoint(tmp_path / "a.keras", contents="lnog")
    with pytest.raises(
        ValueError, match="`contents` must be one of 'short', 'rare', 'late', 'raw'"
    ):
        model.fit(*batches, callbacks=[callback], verbose=0)
    assert model.average_step == 0


@pytest.mark.parametrize(
    ("average", "message"),
    [
        ({}, "must name at least one average"),
        ({"a b": 0.9}, "a dict from identifiers to rules.*Received: the name 'a b'"),
        ({3: 0.9}, "a dict from identifiers to rules.*Received: the name 3"),
        *(({name: 0.9}, f"cannot be called '{name}'") for name in ("average", "raw", "ensemble")),
        ({"fine": 0.9, "bad": 1.5}, r"In average\['bad'\]: `decay` must be .* decay=1.5"),
        ({"kind": PowerAverage}, r"In average\['kind'\]: .* Pass an instance: PowerAverage\(\)"),
    ],
)
def test_bad_names_and_rules_are_refused_by_name(average, message):
    with pytest.raises(ValueError, match=message):
        PolyakModel(make_classifier(), average)


def test_an_unknown_route_is_refused_with_those_there_are(trained):
    model, x, y, _ = trained
    known = "must be one of 'short', 'rare', 'late', 'raw', 'ensemble'. Received"
    with pytest.raises(ValueError, match=f"`using` {known}"):
        model.predict(x, using="lnog")
    with pytest.raises(ValueError, match=f"`using` {known}"):
        model.evaluate(x, y, using="lnog")
    with pytest.raises(ValueError, match=f"`report` {known}"):
        PolyakModel(make_classifier(), NAMED, report=("lnog",))
    with pytest.raises(ValueError, match=f"`inference` {known}"):
        PolyakModel(make_classifier(), NAMED, inference="lnog")
    for call in (
        lambda: model.set_rule("lnog", 0.9),
        lambda: model.apply_average("lnog"),
        lambda: model.refresh_statistics(x, name="lnog"),
    ):
        with pytest.raises(ValueError, match="`name` must be one of 'short', 'rare', 'late'"):
            call()


def test_scores_of_equal_names_are_refused():
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    inner.compile("sgd", "mse", metrics=["accuracy", "binary_accuracy"])
    model = PolyakModel(inner, {"long": 0.9, "binary": 0.5}, report=("long", "binary"))
    with pytest.raises(ValueError, match="Two scores are called 'binary_accuracy'"):
        model.evaluate(np.ones((4, 6)), np.ones((4, 1)), verbose=0)


def test_averages_of_a_part_of_a_larger_model_follow_its_optimizer(batches):
    part = PolyakModel(make_classifier(), {"short": 0.5, "long": 0.9})
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3)(part(inputs)))
    model.compile("sgd", CROSSENTROPY)
    model.fit(*batches, batch_size=4, verbose=0)
    assert part.average_step == 16
    single = PolyakModel(make_classifier(), 0.9)
    assert len(part.weights) > len(single.weights)
    raw = part.raw_model.get_weights()[0]
    distances = [abs(m.get_weights()[0] - raw).sum() for m in part.average_models.values()]
    assert 0 < distances[0] < distances[1]
