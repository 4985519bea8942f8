"""Weights that are frozen at wrapping are variables of the raw model and of its averages."""

import copy
import json
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from frozen_models import (
    BODY,
    SHARED,
    X,
    Y,
    all_values,
    enable_lora,
    fit,
    freeze_kernel,
    keep,
    make_frozen,
    names_of,
    quantize,
    quantize_with_lora,
    values_of,
)
from keras import layers
from models import assert_identical

from polyak_model import PolyakModel, UniformAverage, clone_model
from polyak_model.saving import layout

SEVERAL = {"short": 0.5, "rare": UniformAverage(update_every=3)}
CHANGES = {change.__name__: change for change in SHARED}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def wrap(change=keep, average=0.5, compiled=True, mode=None, **options):
    return PolyakModel(make_frozen(change, compiled, mode), average, share_frozen=True, **options)


def shared_of(model):
    """Returns the raw weights that all averages of a wrapper have in common with it."""
    raw = {id(variable): variable for variable in model.raw_model.variables}
    sets = [
        {id(v) for v in average.variables} & raw.keys() for average in model.average_models.values()
    ]
    assert all(each == sets[0] for each in sets)
    return [raw[key] for key in sets[0]]


@changes
def test_exactly_what_is_frozen_and_never_assigned_is_shared(change):
    paths = [variable.path for variable in make_frozen(change).variables]
    keras.utils.clear_session(free_memory=False)
    model = wrap(change, SEVERAL)
    assert names_of(shared_of(model)) == SHARED[change]
    assert [variable.path for variable in model.raw_model.variables] == paths
    # Not shared: the count of batches, statistics in training, seeds, and what is trained.
    raw = model.raw_model
    assert names_of(raw.variables) - SHARED[change] >= {"counter/count", "norm/moving_mean"}
    assert len({id(variable) for variable in model.variables}) == len(model.variables)


@pytest.mark.slow
def test_training_is_that_of_the_bare_model(mode):
    bare = make_frozen(enable_lora, mode=mode)
    model = wrap(enable_lora, SEVERAL, mode=mode, compensated=True)
    before = [variable.trainable for variable in bare.variables]
    logs = [fit(each).history for each in (bare, model)]
    if "jit_compile" in mode or keras.backend.backend() == "jax":
        for name, values in logs[0].items():
            np.testing.assert_allclose(logs[1][name], values, rtol=1e-5)
        pairs = zip(values_of(bare.weights), values_of(model.raw_model.weights), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    else:
        assert logs[0] == logs[1]
        assert_identical(values_of(bare.weights), values_of(model.raw_model.weights))
    assert [variable.trainable for variable in model.raw_model.variables] == before
    assert model.average_step == 4
    assert not any(v.trainable for each in model.average_models.values() for v in each.variables)


@pytest.mark.parametrize("change", [freeze_kernel, enable_lora, quantize_with_lora])
def test_iterates_and_averages_are_those_without_sharing(change):
    models = [
        PolyakModel(make_frozen(change), SEVERAL, share_frozen=share) for share in (False, True)
    ]
    logs = [fit(model, epochs=2).history for model in models]
    assert logs[0] == logs[1]
    assert_identical(*map(all_values, models))
    answers = [model.predict(X, using="ensemble", verbose=0) for model in models]
    np.testing.assert_allclose(*answers, rtol=1e-6)


def test_nothing_that_averages_do_changes_what_is_shared():
    model = wrap(enable_lora, SEVERAL, report=("short", "raw", "ensemble", "rare"))
    weights = shared_of(model)
    before = values_of(weights)
    fit(model, validation_data=(X, Y))
    model.evaluate(X, Y, verbose=0)
    model.predict(X, using="rare", verbose=0)
    model.refresh_statistics(X, verbose=0)
    model.apply_average("rare")
    model.reset_average()
    model.update_average()
    fit(model)
    assert_identical(values_of(weights), before)
    assert {id(weight) for weight in shared_of(model)} == {id(weight) for weight in weights}


def test_what_is_assigned_to_a_shared_weight_acts_on_every_average():
    model = wrap()
    fit(model)
    before = model.predict(X, verbose=0)
    kernel = model.raw_model.get_layer("body").get_layer("hidden").kernel
    kernel.assign(keras.ops.zeros(kernel.shape))
    assert not np.array_equal(model.predict(X, verbose=0), before)


def loop(model):
    model.update_average()


def call(model):
    model(X, training=True)


def compile_again(model):
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)


@pytest.mark.parametrize("step", [fit, loop, call, compile_again])
@pytest.mark.parametrize("trained", [False, True])
def test_unfreezing_is_refused_by_name_at_the_next_step(step, trained):
    model = wrap(enable_lora)
    if trained:
        fit(model)
    layer = model.raw_model.get_layer("middle")
    layer.trainable = False
    layer.trainable = True  # It unfreezes the kernel under LoRA.
    before = all_values(model)
    message = r"1 of them unfrozen, the first '.*middle/kernel'.*after unfreezing.*share_frozen=Fa"
    with pytest.raises(ValueError, match=message):
        step(model)
    assert_identical(all_values(model), before)
    layer.weights[0].trainable = False
    step(model)


def test_a_model_is_wrapped_again_after_unfreezing():
    model = wrap(freeze_kernel)
    fit(model)
    raw = model.raw_model
    raw.get_layer("middle").kernel.trainable = True
    raw.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    again = PolyakModel(raw, 0.5, share_frozen=True)
    fit(again)
    assert names_of(shared_of(again)) == BODY


def test_weights_that_are_frozen_later_are_averaged():
    model = wrap()
    model.raw_model.get_layer("middle").trainable = False
    compile_again(model)
    fit(model)
    assert names_of(shared_of(model)) == BODY


def test_the_states_of_a_stateful_layer_are_not_shared():
    inner = keras.Sequential(
        [
            keras.Input((3, 2), batch_size=4),
            layers.GRU(2, stateful=True, trainable=False, reset_after=False),
            layers.Dense(1),
        ]
    )
    model = PolyakModel(inner, share_frozen=True)
    assert len(shared_of(model)) == 3
    states = values_of(inner.layers[0].states)
    model.predict(np.ones((4, 3, 2)), verbose=0)
    assert_identical(values_of(inner.layers[0].states), states)


def test_a_frozen_layer_without_statistics_in_training_is_not_refreshed():
    model = wrap()
    fit(model)
    average = model.average_model
    before = values_of(average.get_layer("body").get_layer("frozen_norm").weights)
    fresh = values_of(average.get_layer("norm").weights)
    model.raw_model.get_layer("body").trainable = True
    model.refresh_statistics(X, verbose=0)
    assert_identical(values_of(average.get_layer("body").get_layer("frozen_norm").weights), before)
    assert not np.array_equal(values_of(average.get_layer("norm").weights)[2], fresh[2])


def test_exclusion_acts_on_what_is_not_shared():
    model = wrap(exclude=r".*/kernel")
    fit(model)
    raw, average = model.raw_model, model.average_model
    for name in ("middle", "head"):
        one, other = (values_of(each.get_layer(name).weights) for each in (raw, average))
        assert np.array_equal(one[0], other[0])
        assert not np.array_equal(one[1], other[1])
    excluded = [raw.weights[position].path for position in model.shadow.excluded()]
    assert names_of(shared_of(model)).isdisjoint(path.partition("/")[2] for path in excluded)
    with pytest.raises(ValueError, match="`exclude` must match some weights and leave others"):
        wrap(exclude=r".*(middle|norm|head).*")


def test_averages_on_another_device_share_what_stays_on_that_of_the_raw_model():
    if keras.backend.backend() == "jax":
        with pytest.raises(ValueError, match="`device` must be None on JAX"):
            wrap(enable_lora, device="CPU:0")
        return
    model = wrap(enable_lora, device="CPU:0")
    fit(model)
    assert names_of(shared_of(model)) == SHARED[enable_lora]


def test_a_part_of_a_larger_model_shares():
    part = wrap(enable_lora, compiled=False)
    inputs = keras.Input((6,))
    larger = keras.Model(inputs, part(inputs))
    larger.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    fit(larger)
    assert part.average_step == 4
    assert names_of(shared_of(part)) == SHARED[enable_lora]


def test_a_model_that_is_built_by_its_first_batch_shares():
    frozen = layers.Dense(4, trainable=False)
    inner = keras.Sequential([frozen, layers.Dense(3, activation="softmax")])
    inner.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    model = PolyakModel(inner, 0.5, share_frozen=True)
    fit(model)
    assert {id(v) for v in shared_of(model)} == {id(v) for v in frozen.weights}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: roundtrip(model)])
def test_copies_share_among_themselves_and_not_with_the_original(duplicate):
    model = wrap(enable_lora, SEVERAL)
    fit(model)
    other = duplicate(model)
    assert names_of(shared_of(other)) == SHARED[enable_lora]
    assert_identical(all_values(other), all_values(model))
    assert {id(v) for v in model.variables}.isdisjoint(id(v) for v in other.variables)
    alone = clone_model(model.average_model)
    assert {id(v) for v in model.variables}.isdisjoint(id(v) for v in alone.variables)


def roundtrip(model):
    return pickle.loads(pickle.dumps(model))


def test_the_summary_and_the_count_of_weights_count_what_is_shared_once():
    model, bare = wrap(enable_lora), make_frozen(enable_lora)
    own = sum(np.size(v) for v in values_of(bare.weights)) - sum(
        np.size(v) for v in values_of(shared_of(model))
    )
    assert model.count_params() == bare.count_params() + own
    lines = []
    model.summary(print_fn=lines.append)
    assert f"{own:,} params" in lines[-1]
    assert f"beside {len(SHARED[enable_lora])} shared weights" in lines[-1]


def test_a_model_with_nothing_frozen_is_wrapped_with_a_warning():
    def thaw(model):
        model.get_layer("body").trainable = True

    with pytest.warns(UserWarning, match="Nothing is shared by share_frozen=True") as caught:
        model = wrap(thaw)
    assert len(caught) == 1
    assert not shared_of(model)
    fit(model)


def test_a_model_with_everything_frozen_is_refused():
    def freeze(model):
        model.trainable = False

    with pytest.raises(ValueError, match="leaves nothing to average: all 16 weights"):
        wrap(freeze)


def test_a_clone_function_is_refused():
    with pytest.raises(ValueError, match="needs a copy that refers to the frozen variables"):
        wrap(clone_function=make_frozen)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_anything_but_a_bool_is_refused(value):
    with pytest.raises(ValueError, match="`share_frozen` must be True or False. Received"):
        PolyakModel(make_frozen(), share_frozen=value)


def test_the_argument_cannot_be_changed_after_wrapping():
    with pytest.raises(AttributeError, match=r"PolyakModel\(model.raw_model, share_frozen=...\)"):
        wrap().share_frozen = False


def test_the_description_names_what_is_shared():
    model = wrap(quantize)
    described = layout.decode(layout.encode(model.shadow.describe()))
    assert described["format"] == layout.FORMAT_IF_SHARED > layout.FORMAT
    paths = [described["weights"][position][0] for position in described["shared"]]
    assert {"/".join(path.split("/")[-2:]) for path in paths} == SHARED[quantize]


@pytest.mark.tensorflow
def test_replicas_share(strategy):
    with strategy.scope():
        bare, model = make_frozen(enable_lora, mode={}), wrap(enable_lora, mode={})
    for each in (bare, model):
        fit(each)
    assert_identical(values_of(bare.weights), values_of(model.raw_model.weights))
    assert names_of(shared_of(model)) == SHARED[enable_lora]


MEASURE = """
import gc, json, os
import keras
import numpy as np
from polyak_model import PolyakModel

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def trained(model):
    x, y = np.ones((8, 64), "float32"), np.ones((8, 3), "float32")
    model.fit(x, y, verbose=0)
    model.predict(x, verbose=0)
    return resident(), sum(v.numpy().nbytes for v in model.variables)

# Drawing random weights would leave freed memory that the averages are put in.
layers = [keras.layers.Dense(units, kernel_initializer="zeros") for units in (6000, 8000, 3)]
inner = keras.Sequential([keras.Input((64,)), *layers])
for layer in layers[:2]:
    layer.trainable = False
inner.compile("adam", "mse")
bare = trained(inner)
received = trained(PolyakModel(inner, 0.9, share_frozen={share}))
print(json.dumps([after - before for before, after in zip(bare, received)]))
"""


@pytest.mark.tensorflow
@pytest.mark.memory
@pytest.mark.processes
@pytest.mark.parametrize("share", [True, False])
def test_a_frozen_part_of_192_mb_adds_less_than_60_mb(share):
    command = [sys.executable, "-c", MEASURE.replace("{share}", str(share))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resident, variables = json.loads(output)
    if share:
        assert resident < 60 * 10**6
        assert variables < 10**6
    else:  # So the measurement would tell.
        assert min(resident, variables) > 150 * 10**6
