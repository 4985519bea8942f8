"""Models of KerasHub, small and with random weights."""

import keras
import keras_hub
import numpy as np
import pytest
from kinds import RULE, Kind, Trained, assert_same_state, check_average, check_predictions
from object_graphs import assert_shares_nothing

from polyak_model import PolyakModel, clone_model

pytestmark = pytest.mark.zoo

TOKENS = np.random.default_rng(0).integers(1, 20, size=(8, 6)).astype("int32")
SIZES = {
    "vocabulary_size": 20,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 8,
    "max_sequence_length": 6,
}
PROMPT = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_text_classifier():
    backbone = keras_hub.models.BertBackbone(**SIZES)
    return keras_hub.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)


def make_language_model():
    backbone = keras_hub.models.GPT2Backbone(**SIZES)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


CLASSIFIER = Kind(
    make_text_classifier,
    {**PROMPT, "segment_ids": np.zeros_like(TOKENS)},
    np.arange(8) % 3,
    batch_size=4,
    shuffle=False,
)
LANGUAGE_MODEL = Kind(
    make_language_model, PROMPT, np.roll(TOKENS, -1, axis=1), batch_size=4, shuffle=False
)


@pytest.mark.parametrize("kind", [CLASSIFIER, LANGUAGE_MODEL])
def test_a_model_of_keras_hub_trains_as_without_a_wrapper_and_is_averaged(kind, tmp_path):
    wrapped = Trained(kind, wrap=True)
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    bare = kind.make()
    bare.fit(kind.x, kind.y, batch_size=4, shuffle=False, verbose=0)
    for one, other in zip(bare.get_weights(), wrapped.raw.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    check_average(wrapped.model, wrapped.iterates)
    check_predictions(wrapped.model, kind)
    wrapped.model.save_weights(tmp_path / "model.weights.h5")
    fresh = PolyakModel(kind.make(), RULE)
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_same_state(wrapped.model, fresh)


def test_the_average_is_scored_by_the_loss_that_keras_hub_chose():
    model = PolyakModel(make_text_classifier())
    logs = model.evaluate(CLASSIFIER.x, CLASSIFIER.y, verbose=0, return_dict=True)
    assert logs == model.evaluate(
        CLASSIFIER.x, CLASSIFIER.y, verbose=0, return_dict=True, using="raw"
    )
    model.compile("sgd", keras.losses.CategoricalHinge(), metrics=[])
    assert isinstance(model.average_model.loss, keras.losses.CategoricalHinge)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green"]
TEXTS = np.array(["red blue", "green grey", "red", "blue"])


def make_reader_of_texts():
    keras.utils.set_random_seed(0)
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=WORDS)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=6)
    backbone = keras_hub.models.BertBackbone(**SIZES, dropout=0.0)
    return keras_hub.models.BertTextClassifier(backbone, 3, preprocessor=preprocessor, dropout=0.0)


def test_a_copy_has_a_preprocessor_of_its_own():
    model = make_reader_of_texts()
    clone = clone_model(model)
    assert_shares_nothing(model, clone)
    np.testing.assert_array_equal(clone.predict(TEXTS, verbose=0), model.predict(TEXTS, verbose=0))


def test_texts_train_and_are_scored_as_by_the_bare_task():
    labels = np.array([0, 1, 2, 0])
    bare, model = make_reader_of_texts(), PolyakModel(make_reader_of_texts(), 0.0)
    data = {"validation_data": (TEXTS, labels), "batch_size": 2, "shuffle": False, "verbose": 0}
    expected = bare.fit(TEXTS, labels, epochs=2, **data).history
    assert model.fit(TEXTS, labels, epochs=2, **data).history == expected
    assert model.average_step == 4
    expected = bare.evaluate(TEXTS, labels, verbose=0)
    for using in ("average", "raw", "ensemble"):
        assert model.evaluate(TEXTS, labels, verbose=0, using=using) == expected
        received = model.predict(TEXTS, verbose=0, using=using)
        np.testing.assert_allclose(received, bare.predict(TEXTS, verbose=0), rtol=1e-6)


def test_a_model_that_reads_texts_loads_with_its_vocabularies(tmp_path):
    model = PolyakModel(make_reader_of_texts())
    model.update_average()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    for route in ("average", "raw"):
        np.testing.assert_array_equal(
            loaded.predict(TEXTS, verbose=0, using=route),
            model.predict(TEXTS, verbose=0, using=route),
        )
    assert loaded.average_model.preprocessor.tokenizer.vocabulary_size() == len(WORDS)


def test_the_average_of_a_language_model_generates():
    model = PolyakModel(make_language_model(), RULE)
    model.compile("adam", LOSS, sampler="greedy")
    model.fit(PROMPT, LANGUAGE_MODEL.y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    assert np.isfinite(model.evaluate(PROMPT, LANGUAGE_MODEL.y, verbose=0)).all()
    prompt = {"token_ids": TOKENS[:2].copy(), "padding_mask": np.ones((2, 6), "int32")}
    prompt["token_ids"][:, 3:] = 0
    prompt["padding_mask"][:, 3:] = 0
    average = model.average_model
    received = average.generate(prompt, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(received[:, :3], TOKENS[:2, :3])
    logits = average.predict(
        {"token_ids": received, "padding_mask": np.ones_like(received)}, verbose=0
    )
    np.testing.assert_array_equal(received[:, 3:], logits.argmax(-1)[:, 2:-1])
