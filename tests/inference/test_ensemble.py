import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from models import trained
from scipy.special import logsumexp

from polyak_model import PolyakModel
from polyak_model.inference.ensemble import join

LOGITS = st.lists(st.floats(-50, 50), min_size=3, max_size=3)


@pytest.mark.tensorflow
def test_the_mean_joins_every_leaf_of_a_nested_output():
    import tensorflow as tf

    one = {"a": tf.constant([1.0]), "b": [tf.constant([2.0, 4.0])]}
    other = {"a": tf.constant([3.0]), "b": [tf.constant([0.0, 0.0])]}
    joined = join("mean", [one, other])
    assert joined["a"].numpy().tolist() == [2.0]
    assert joined["b"][0].numpy().tolist() == [1.0, 2.0]


@pytest.mark.tensorflow
@given(one=LOGITS, other=LOGITS)
def test_softmax_joins_logits_to_the_logarithm_of_the_mean_probability(one, other):
    import tensorflow as tf

    joined = join("softmax", [tf.constant([row], "float64") for row in (one, other)])
    probabilities = [np.exp(row - logsumexp(row)) for row in (np.array(one), np.array(other))]
    np.testing.assert_allclose(np.exp(joined.numpy()[0]), np.mean(probabilities, axis=0), rtol=1e-9)


def test_a_callable_joins_whole_outputs(batches):
    def largest(outputs):
        return keras.ops.maximum(*outputs)

    model = trained(batches, combine=largest)
    x = batches[0]
    answers = [model.predict(x, using=route, verbose=0) for route in ("raw", "average")]
    np.testing.assert_array_equal(
        model.predict(x, using="ensemble", verbose=0), np.maximum(*answers)
    )


@pytest.mark.parametrize(
    "combine",
    [list, lambda outputs: outputs[0][:, :2], lambda outputs: {"joined": outputs[0]}],
    ids=["keeps-both", "drops-a-class", "makes-a-dict"],
)
def test_a_combine_that_changes_the_structure_is_refused(combine, batches):
    model = trained(batches, combine=combine)
    with pytest.raises(ValueError, match="`combine` must return one output of the structure"):
        model.predict_on_batch(batches[0], using="ensemble")


def test_integers_are_not_averaged():
    class Decision(layers.Layer):
        def call(self, inputs):
            return keras.ops.argmax(inputs, -1)

    inner = keras.Sequential([keras.Input((3,)), Decision()])
    model = PolyakModel(inner, inference="ensemble")
    with pytest.raises(ValueError, match="`combine='mean'` needs outputs of floats"):
        model(np.ones((2, 3), "float32"))
