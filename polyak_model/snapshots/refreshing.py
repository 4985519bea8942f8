"""Refreshes the statistics of a model with inputs from a file."""

from polyak_model.average.batch_norm import refresh_statistics
from polyak_model.errors import InputError
from polyak_model.weight_files.refusal import in_one_line


def refresh(model, inputs):
    """Recomputes the BatchNormalization statistics of a model.

    Args:
        model: A `keras.Model`.
        inputs: Array, or list of arrays.

    Raises:
        InputError: If Keras cannot call the model on the inputs.
    """
    try:
        refresh_statistics(model, inputs, verbose=0)
    except Exception as error:  # Each backend raises its own classes for wrong shapes and dtypes.
        raise InputError(
            f"Cannot refresh the statistics with these inputs: {in_one_line(error)}. "
            "Pass arrays of the shapes and dtypes of the model's inputs."
        ) from error
