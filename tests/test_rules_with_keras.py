import importlib

import closed_forms
import keras
import pytest
import tensorflow as tf

from polyak_model import rules

RULES = pytest.mark.parametrize("rule", closed_forms.RULES.values(), ids=closed_forms.RULES)


@RULES
def test_the_weight_of_a_tensor_step_is_that_of_an_int(rule, mode):
    def weight(step):
        return rule.weight(step, rule.update_every)

    def run(step):
        return float(weight(tf.constant(step, "int64")))

    if not mode.get("run_eagerly"):
        traced = tf.function(weight, jit_compile=mode.get("jit_compile", False))

        def run(step):
            return float(traced(tf.constant(step, "int64")))

    for step in (1, 2, 5, 30, 1_000_000):
        assert run(step) == pytest.approx(weight(step), rel=1e-13)


@RULES
def test_a_rule_survives_serialization(rule):
    config = keras.saving.serialize_keras_object(rule)
    loaded = keras.saving.deserialize_keras_object(config)
    assert loaded == rule
    assert hash(loaded) == hash(rule)
    assert loaded.weight(17, 2) == rule.weight(17, 2)


@pytest.mark.parametrize(
    "name", ["ExponentialAverage", "PolynomialAverage", "PowerAverage", "UniformAverage"]
)
def test_rules_are_registered_with_keras_under_stable_names(name):
    importlib.import_module("polyak_model.model")
    rule = getattr(rules, name)()
    config = keras.saving.serialize_keras_object(rule)
    assert config["registered_name"] == f"polyak_model>{name}"
    assert config["module"] == "polyak_model.rules"
    assert keras.saving.get_registered_object(f"polyak_model>{name}") is type(rule)
