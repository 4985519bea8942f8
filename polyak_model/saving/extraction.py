"""Extracts a plain Keras model from the file of a PolyakModel, without Keras."""

import numpy as np

from polyak_model.saving import layout
from polyak_model.saving.sharing_reader import find_shared_variables, take_lora
from polyak_model.saving.wrapper_reader import find_whole_wrapper, read_rules
from polyak_model.weight_files import safetensors_file
from polyak_model.weight_files.combine import copy
from polyak_model.weight_files.keras_archive import CONFIG
from polyak_model.weight_files.output import writing
from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.training_state import is_inside, split_variables
from polyak_model.weight_files.writer import create_groups, created_weights

# As in `average_model.save`: plain SGD has no state to lose, and Keras evaluates no model that was
# saved without an optimizer.
_SGD = {
    "module": "keras.optimizers",
    "class_name": "SGD",
    "config": {"name": "sgd", "learning_rate": 0.01},
    "registered_name": None,
}
_SGD_STATE = {"optimizer/vars/0": np.int64(0), "optimizer/vars/1": np.float32(0.01)}


def extract(weights, contents, output):
    """Writes an average model or the raw model to a file of its own.

    Args:
        weights: A `WeightFile` of a PolyakModel.
        contents: `"average"` for the first average, the name of another one, or
            `"raw"`. In a `.keras` file, an average model is compiled for
            evaluation, with plain SGD and the loss and metrics of the raw model;
            the raw one keeps its optimizer with its state.
        output: Path of a `.weights.h5` file; of a `.safetensors` file, for the
            weights alone; or of a `.keras` file, if `weights` is one.

    Raises:
        InputError: If the file cannot be used or the output cannot be written;
            what was at `output` is unchanged then.
    """
    wrapper = find_whole_wrapper(weights)
    group = _find_group(weights, wrapper, contents)
    groups = _inside(group, weights.attributes)
    names = _inside(group, weights.variables)
    config, state = None, {}
    if str(output).endswith(".keras"):
        config = _model_config(weights)
        compilation = config.get("compile_config", {})
        if contents != "raw" and layout.OPTIMIZER in compilation:
            compilation[layout.OPTIMIZER] = _SGD
            if "optimizer/inner_optimizer" in groups.values():
                # Under mixed precision Keras would wrap it in a LossScaleOptimizer.
                compilation["auto_scale_loss"] = False
            state = _SGD_STATE
            groups, names = (
                {old: new for old, new in each.items() if not is_inside(new, {layout.OPTIMIZER})}
                for each in (groups, names)
            )
    if str(output).endswith(safetensors_file.ENDING):
        model, _ = split_variables(weights, group)
        names = {old: new for old, new in names.items() if new in model}
    variables = {new: weights.variables[old] for old, new in names.items()}
    if contents != "raw":
        variables |= find_shared_variables(weights, wrapper, group)
    with_lora = take_lora(variables)
    size = sum(variable.nbytes for variable in variables.values())
    size += sum(lora.kernel.nbytes for lora in with_lora.values())
    with (
        writing(output, size) as partial,
        created_weights(partial, weights, config, group) as file,
    ):
        create_groups(file, {new: weights.attributes[old] for old, new in groups.items()})
        copy(weights, {variable.name: new for new, variable in variables.items()}, file)
        for name, lora in with_lora.items():
            lora.write(name, file)
        for name, array in state.items():
            file[name] = array


def _find_group(weights, wrapper, contents):
    if contents == "raw":
        return wrapper.raw
    names = list(read_rules(weights, wrapper))
    name = names[0] if contents == layout.ONLY else contents
    if name not in names:
        raise refusal(
            weights.path,
            f"it contains no average called {contents!r}",
            f"Its contents are {', '.join([*names, 'raw'])}",
        )
    return wrapper.averages[name]


def _inside(group, names):
    """Returns a dict from the names inside a group to the names relative to it."""
    prefix = f"{group}/"
    return {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _model_config(weights):
    settings = weights.config.get("config")
    model = settings.get(layout.CONFIG_MODEL) if isinstance(settings, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("class_name"), str):
        raise refusal(weights.path, f"its {CONFIG} does not describe a PolyakModel")
    # The wrapper stores what the raw model was compiled with.
    compilation = weights.config.get("compile_config")
    if not isinstance(compilation, dict):
        return dict(model)
    return model | {"compile_config": dict(compilation)}
