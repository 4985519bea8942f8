"""Folders of snapshots, written without Keras."""

import numpy as np

from polyak_model import PowerAverage
from polyak_model.rules import cumulative_share
from polyak_model.snapshots.folder import snapshot_name
from polyak_model.snapshots.record import Record, Weight, write_snapshot

KERNEL = "layers/dense/vars/0"
MEAN = "layers/batch_normalization/vars/2"
SEED = "layers/dropout/seed_generator/vars/0"
GROUPS = {"layers/dense/vars": {"name": "dense"}}
STEPS = tuple(range(50, 801, 50))
PAIR = PowerAverage.pair()


def make_walk(count=800, seed=0):
    """Returns random walks from step 0 on, an array of shape (steps + 1, 3, 2)."""
    return np.random.default_rng(seed).normal(size=(count + 1, 3, 2)).cumsum(0)


def average(rule, walk, step):
    """Returns the average of a walk after a step, from the shares of the rule."""
    shares = np.diff(cumulative_share(rule, step, np.arange(-1, step + 1)))
    return np.tensordot(shares, walk[: step + 1], 1)


def write_run(folder, rules=PAIR, steps=STEPS, walk=None, dtype="float32", **changes):
    """Writes the snapshots of a run.

    Args:
        folder: Where, a `pathlib.Path`; it is created.
        rules: Dict from name to rule.
        steps: The steps with a snapshot.
        walk: The iterates, as of `make_walk`.
        dtype: Of the kernel in the model.
        **changes: Of fields of the records.
    """
    walk = make_walk(max(steps)) if walk is None else walk
    folder.mkdir(exist_ok=True)
    for sequence, step in enumerate(steps, 1):
        fields = {"run": "a", "step": step, "iterations": step, "period": 0, "sequence": sequence}
        record = Record(**{**fields, "rules": rules, "groups": GROUPS, **changes})
        weights = {
            name: [
                Weight(KERNEL, average(rule, walk, step).astype("float32"), dtype, True),
                Weight(MEAN, np.full(2, step, "float32"), dtype, False),
                Weight(SEED, np.array([step, 1], "uint32"), "uint32", False),
            ]
            for name, rule in rules.items()
        }
        write_snapshot(folder / snapshot_name(step), record, weights)
