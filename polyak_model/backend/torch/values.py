"""The tensors behind variables."""

import keras
import torch


def value_of(variable):
    """Returns the tensor of a variable, or what is a tensor already.

    Inside a layer of a 16-bit policy, `variable.value` would be a rounded copy.

    Args:
        variable: A `keras.Variable` or a tensor.
    """
    value = variable._value if isinstance(variable, keras.Variable) else variable
    return value if isinstance(value, torch.Tensor) else keras.ops.convert_to_tensor(value)
