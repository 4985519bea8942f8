"""Completes an average in a file from the weights that it shares with the raw model."""

import typing

import numpy as np

from polyak_model.saving import layout
from polyak_model.saving.wrapper_reader import read_rules_and_shared
from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.tensor import Variable
from polyak_model.weight_files.training_state import split_variables
from polyak_model.weight_files.writer import create_variable


class Lora(typing.NamedTuple):
    """The LoRA of a layer in a file."""

    kernel: Variable
    first: Variable
    second: Variable
    alpha: Variable

    def write(self, name, file, dtype=None):
        """Writes the kernel with the product of the factors added, as Keras saves it.

            kernel + alpha / rank * first @ second

        Args:
            name: The name of the kernel.
            file: An `h5py.File` or a `TensorsWriter`.
            dtype: The dtype to write, as Keras names it. Defaults to None: that
                of the kernel.

        Raises:
            InputError: If the kernel is quantized.
        """
        kernel = self.kernel.read()
        if "float" not in self.kernel.dtype:
            raise refusal(
                self.kernel.source,
                f"the kernel {self.kernel.name!r} under LoRA is quantized",
                "Load the file with Keras and save its `average_model` or `raw_model`",
            )
        first, second = (factor.read().astype("float32") for factor in (self.first, self.second))
        scale = np.float32(self.alpha.read()) / first.shape[-1]
        merged = kernel.astype("float32") + scale * (first @ second)
        dtype = dtype or self.kernel.dtype
        write = create_variable(file, name, kernel.shape, dtype)
        write((), merged.astype(dtype))


def find_shared_variables(weights, wrapper, group):
    """Returns the variables of the raw model that an average shares, a dict by name inside it.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.
        group: The group of an average.
    """
    _, shared = read_rules_and_shared(weights, wrapper)
    if not shared:
        return {}
    model, _ = split_variables(weights, wrapper.raw)
    return {
        name: variable
        for name, variable in model.items()
        if f"{group}/{name}" not in weights.variables
    }


def take_lora(variables):
    """Removes LoRA from the variables of a model, and the kernels that have it.

    Args:
        variables: Dict from names to `Variable`s.

    Returns:
        Dict from the names of those kernels to the `Lora` of each.

    Raises:
        InputError: If a part of it is missing.
    """
    found = {}
    for alpha in [name for name in variables if layout.is_lora_alpha(name)]:
        folder = alpha.rpartition("/")[0]
        names = [name for name in variables if name.startswith(f"{folder}/lora_")]
        factors = [name for end in ("_a", "_b") for name in names if name.endswith(end)]
        # Keras saves the kernel first.
        parts = [variables.get(name) for name in (f"{folder}/0", *factors, alpha)]
        if len(parts) != 4 or not _fit(*parts):
            raise refusal(variables[alpha].source, f"{folder!r} lacks a part of its LoRA")
        found[f"{folder}/0"] = Lora(*parts)
        for name in (f"{folder}/0", *names):
            variables.pop(name, None)
    return found


def _fit(kernel, first, second, alpha):
    return (
        kernel is not None
        and "float" in first.dtype
        and "float" in second.dtype
        and alpha.shape == ()
        and len(second.shape) == 2
        and first.shape[-1:] == second.shape[:1]
        # A quantized kernel may be packed.
        and ("float" not in kernel.dtype or first.shape[:-1] + second.shape[1:] == kernel.shape)
    )
