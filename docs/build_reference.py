"""Builds the API reference from docstrings: python docs/build_reference.py FOLDER.

A warning, such as a name that cannot be documented, is an error.
"""

import pathlib
import sys
import warnings

import pdoc

import polyak_model

MODULES = [
    "polyak_model",
    "polyak_model.checkpoints",
    "polyak_model.snapshots",
    "polyak_model.soups",
    # Methods of a PolyakModel: fit, evaluate and predict; build; compile.
    "polyak_model.inference.routed_model",
    "polyak_model.wrapper.building",
    "polyak_model.wrapper.training",
]


def main(folder):
    warnings.simplefilter("error")
    # pdoc does not call a module's `__getattr__`.
    vars(polyak_model).update({name: getattr(polyak_model, name) for name in polyak_model.__all__})
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*MODULES, output_directory=pathlib.Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
