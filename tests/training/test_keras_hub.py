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


def compile_eagerly(model, **settings):
    """Compiles so that nothing is traced, which takes longer than these small models do."""
    model.compile("adam", LOSS, run_eagerly=True, **settings)
    return model


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
    # Each `fit`, `evaluate` and `predict` traces the preprocessor, which takes seconds.
    expected = bare.fit(TEXTS, labels, **data).history
    assert model.fit(TEXTS, labels, **data).history == expected
    assert model.average_step == 2
    logs = model.evaluate(TEXTS, labels, verbose=0, using="ensemble", return_dict=True)
    for name, value in logs.items():
        assert value == pytest.approx(expected[f"val_{name}"][0], rel=1e-6)
    assert len(logs) == 2
    predicted = bare.predict(TEXTS, verbose=0)
    received = model.predict(TEXTS, verbose=0, using="ensemble")
    np.testing.assert_allclose(received, predicted, rtol=1e-6)


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
    compile_eagerly(model, sampler="greedy")
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


def make_reader_and_writer():
    """Makes a language model with a tokenizer of three words."""
    keras.utils.set_random_seed(0)
    words = ["<|endoftext|>", "a", "b", "c", "Ġ", "Ġa", "Ġb", "Ġc"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = ["Ġ a", "Ġ b", "Ġ c"]
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=6)
    backbone = keras_hub.models.GPT2Backbone(**SIZES, dropout=0.0)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)


SENTENCES = np.array(["a b c", "b c a", "c a b", "a a b"])


def generate(model):
    return model.generate(["a b", "c"], max_length=6, stop_token_ids=None)


def test_each_model_of_a_language_model_trained_on_texts_generates_texts():
    bare, model = make_reader_and_writer(), PolyakModel(make_reader_and_writer(), 0.5)
    for each in (bare, model):
        compile_eagerly(each, sampler="greedy")
        each.fit(SENTENCES, batch_size=2, shuffle=False, verbose=0)
    before = generate(model.average_model)
    assert generate(model.raw_model) == generate(bare)
    bare.set_weights(model.average_model.get_weights())
    assert before == generate(bare)
    assert all(len(text) > len(start) for text, start in zip(before, ["a b", "c"], strict=True))
    with pytest.raises(AttributeError, match="model.raw_model.generate or model.average_model.gen"):
        model.generate(["a"])
    assert model.predict(SENTENCES, using="ensemble", verbose=0).shape == (4, 6, 20)
    # What was compiled to generate reads the current weights.
    model.raw_model.set_weights([-weight for weight in model.raw_model.get_weights()])
    model.update_average()
    bare.set_weights(model.average_model.get_weights())
    after = generate(model.average_model)
    assert after == generate(bare)
    assert after != before


def change(mode):
    """Makes a classifier whose backbone has LoRA, or is quantized, or both."""
    keras.utils.set_random_seed(0)
    model = make_text_classifier()
    if mode != "lora":
        model.backbone.quantize(mode.removesuffix("+lora"))
    if mode.endswith("lora"):
        model.backbone.enable_lora(2)
    return model


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
# The embeddings of recent versions of KerasHub have no float8.
@pytest.mark.parametrize(
    ("mode", "cloned"),
    [
        ("lora", "clone_function"),
        ("int8", "copied"),
        ("int4", "clone_function"),
        ("int8+lora", "copied"),
    ],
)
def test_a_backbone_changed_before_wrapping_is_averaged_and_loads(mode, cloned, tmp_path):
    def make():
        return change(mode)

    def wrap():
        model = PolyakModel(make(), RULE, clone_function=make if cloned != "copied" else None)
        model.compile(keras.optimizers.SGD(0.1), LOSS, run_eagerly=True)
        return model

    def check(loaded):
        for using in ("average", "raw"):
            expected, received = (
                each.predict(CLASSIFIER.x, using=using, verbose=0) for each in (model, loaded)
            )
            # Keras merges LoRA into the weights that it saves.
            np.testing.assert_allclose(received, expected, rtol=0, atol=1e-7)

    model = wrap()
    model.fit(CLASSIFIER.x, CLASSIFIER.y, batch_size=4, shuffle=False, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = wrap()
    fresh.load_weights(tmp_path / "model.weights.h5")
    check(fresh)
    if cloned == "copied":
        model.save(tmp_path / "model.keras")
        check(keras.models.load_model(tmp_path / "model.keras", compile=False))
