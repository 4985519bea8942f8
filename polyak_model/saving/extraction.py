"""A plain Keras model out of the file of a PolyakModel, without Keras and without running code."""

import json
import shutil
import types
import zipfile
import zlib

import numpy as np

from polyak_model.saving.wrapper_reader import find_wrappers
from polyak_model.weight_files.atomic_write import written_whole
from polyak_model.weight_files.inspection import BLOCK
from polyak_model.weight_files.keras_archive import CONFIG, METADATA, WEIGHTS, copy_member
from polyak_model.weight_files.refusal import in_one_line, refusal
from polyak_model.weight_files.tensor import cut
from polyak_model.weight_files.writer import create_groups, create_variable, created_weights

CONTENTS = ("average", "raw")
_ASSETS = "assets"
# As `average_model.save` does it: plain SGD has no state to lose, and Keras evaluates no model that
# was saved without an optimizer.
_SGD = {
    "module": "keras.optimizers",
    "class_name": "SGD",
    "config": {"name": "sgd", "learning_rate": 0.01},
    "registered_name": None,
}
_SGD_STATE = {"optimizer/vars/0": np.int64(0), "optimizer/vars/1": np.float32(0.01)}


def find_whole_wrapper(weights):
    """Returns the `Wrapper` that a file is of.

    Args:
        weights: A `WeightFile`.

    Raises:
        InputError: If the file is of anything else.
    """
    wrappers = find_wrappers(weights)
    if not wrappers:
        raise refusal(
            weights.path,
            "it holds no average beside its model",
            "Name a file that PolyakModel.save or save_weights wrote",
        )
    if wrappers[0].path:
        raise refusal(
            weights.path,
            f"it is of a model of which a PolyakModel, at {wrappers[0].path!r}, is a part",
            "Load it with Keras and save that part's `average_model` or `raw_model`",
        )
    return wrappers[0]


def extract(weights, contents, output):
    """Writes the average or the raw model as a file of its own.

    Args:
        weights: A `WeightFile` of a PolyakModel.
        contents: `"average"` or `"raw"`. The average model of a `.keras` file is
            compiled for evaluation, with the loss and metrics of the raw model
            and plain SGD; the raw one keeps its optimizer and the state of that.
        output: Path of a `.weights.h5` file; or of a `.keras` file, if `weights`
            is one.

    Raises:
        InputError: If the file cannot be used; nothing is written then.
        OSError: If the output cannot be written; what lay there is unchanged.
    """
    group = getattr(find_whole_wrapper(weights), contents)
    variables = _inside(group, weights.variables)
    attributes = _inside(group, weights.attributes)
    if str(output).endswith(".weights.h5"):
        with written_whole(output) as partial:
            _write_hdf5(partial, weights, variables, attributes)
        return
    config = _model_config(weights)
    state = {}
    if contents == "average" and "optimizer" in config.get("compile_config", {}):
        config["compile_config"]["optimizer"] = _SGD
        if "optimizer/inner_optimizer" in attributes:
            # Under mixed precision Keras would put a LossScaleOptimizer around it.
            config["compile_config"]["auto_scale_loss"] = False
        state = _SGD_STATE
        variables, attributes = map(_without_optimizer, (variables, attributes))
    with written_whole(output) as partial:
        hdf5 = partial.with_name(WEIGHTS)
        _write_hdf5(hdf5, weights, variables, attributes, state)
        with zipfile.ZipFile(partial, "w") as archive:
            copy_member(weights.archive, METADATA, archive, weights.path)
            archive.writestr(CONFIG, _dump(config, weights.path))
            archive.write(hdf5, WEIGHTS)
            _copy_assets(weights, group, archive)


def _inside(group, named):
    prefix = f"{group}/"
    return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}


def _without_optimizer(named):
    return {k: v for k, v in named.items() if k.partition("/")[0] != "optimizer"}


def _model_config(weights):
    settings = weights.config.get("config")
    model = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("class_name"), str):
        raise refusal(weights.path, f"its {CONFIG} describes no PolyakModel")
    # The wrapper carries it for the raw model.
    compilation = weights.config.get("compile_config")
    if not isinstance(compilation, dict):
        return dict(model)
    return model | {"compile_config": dict(compilation)}


def _dump(config, path):
    try:
        return json.dumps(config)
    except RecursionError as error:
        # A little less deep may be read than can be written.
        raise refusal(path, f"its {CONFIG} is nested too deep") from error


def _write_hdf5(path, weights, variables, attributes, arrays=()):
    with created_weights(path, like=weights) as file:
        create_groups(file, attributes)
        for name, variable in variables.items():
            moved = types.SimpleNamespace(name=name, shape=variable.shape, dtype=variable.dtype)
            write = create_variable(file, moved)
            for part in cut(variable.shape, BLOCK):
                write(part.index, variable.read(part))
        for name in arrays:
            file[name] = arrays[name]


def _copy_assets(weights, group, target):
    inside = f"{_ASSETS}/{group}/"
    for name in weights.archive.namelist():
        if name.startswith(inside) and not name.endswith("/"):
            moved = f"{_ASSETS}/{name.removeprefix(inside)}"
            try:
                with weights.archive.open(name) as original, target.open(moved, "w") as copy:
                    shutil.copyfileobj(original, copy)
            except (EOFError, zipfile.BadZipFile, zlib.error) as error:
                problem = f"its member {name!r} is damaged ({in_one_line(error)})"
                raise refusal(weights.path, problem) from error
