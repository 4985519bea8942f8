"""Training steps on PyTorch, for `overhead.py`.

A step calls the training function of `fit` with one batch. The update of the averages is
also timed alone, in turns of its own with the floor.

`AveragedModel` is `torch.optim.swa_utils.AveragedModel` with its exponential average by
foreach calls. `ema-pytorch` is its `EMA` with `use_foreach`, at every step and without
warmup, if the package is installed. Both average a list of the parameters, which is
their fastest form: they need not search the layers for them.
"""

import functools
import itertools

import keras
import torch
from training_steps import (
    DECAY,
    UNTIMED,
    Variant,
    add_installed,
    bare,
    begin_training,
    prepare_training,
    take_turns,
)

from polyak_model import PolyakModel


class Peer(keras.callbacks.Callback):
    """Averages the float weights of a model; a subclass says how."""

    def on_train_begin(self, logs=None):
        weights = [w.value for w in self.model.weights if keras.backend.is_float_dtype(w.dtype)]
        self.raw = torch.nn.ParameterList(weights)


class AveragedModel(Peer):
    """Averages with PyTorch."""

    def on_train_begin(self, logs=None):
        super().on_train_begin()
        swa = torch.optim.swa_utils
        self.peer = swa.AveragedModel(self.raw, multi_avg_fn=swa.get_ema_multi_avg_fn(DECAY))
        self.average = self.peer.module

    def on_train_batch_end(self, batch, logs=None):
        self.peer.update_parameters(self.raw)


class EMAPytorch(Peer):
    """Averages with ema-pytorch."""

    def on_train_begin(self, logs=None):
        super().on_train_begin()
        import ema_pytorch

        self.peer = ema_pytorch.EMA(
            self.raw,
            beta=DECAY,
            min_value=DECAY,  # Otherwise the decay would grow from 0.
            update_after_step=0,
            update_every=1,
            include_online_model=False,
            use_foreach=True,
        )
        self.average = self.peer.ema_model

    def on_train_batch_end(self, batch, logs=None):
        self.peer.update()


PEERS = {"ema-pytorch": Variant(bare, EMAPytorch)}
VARIANTS = add_installed(PEERS) | {"AveragedModel": Variant(bare, AveragedModel)}


def measure(make, batch_size, options):
    """Times the steps of all variants of a model, and updates alone, in alternation.

    Returns:
        A dict from each variant, and `floor`, to a dict of `first`, the seconds of
        the first call, and `steps`, a list of seconds per training step. Where there
        is an update, `alone` is a list of its seconds.
    """
    calls = options.rounds + UNTIMED
    prepared = {name: prepare(name, make, batch_size, calls) for name in options.variants}
    updates = {name: waiting(update) for name, (_, update) in prepared.items() if update}
    updates["floor"] = prepare_floor(make().count_params())
    steps = {name: step for name, (step, _) in prepared.items()}
    times = take_turns(steps, options.rounds, options.seed)
    alone = take_turns(updates, options.rounds, options.seed)
    times["floor"] = alone.pop("floor")
    for name, own in alone.items():
        times[name]["alone"] = own["steps"]
    return times


def prepare(name, make, batch_size, calls):
    """Returns a training step as in `fit`, and the update of its averages alone or None."""
    variant = VARIANTS[name]
    model, callback, batch = prepare_training(variant, make, batch_size)
    model.make_train_function()
    begin_training(callback, model, calls)
    data = [tuple(map(torch.tensor, batch))]
    batches = itertools.count()

    def step():
        logs = model.train_function(data)
        callback.on_train_batch_end(next(batches), logs)

    update = None
    if variant.build is bare and name != "bare":
        update = functools.partial(callback.on_train_batch_end, 0)
    elif isinstance(model, PolyakModel) and type(callback) is keras.callbacks.Callback:
        update = model.update_average
    return waiting(step), update


def prepare_floor(parameters):
    """Returns a function that reads two buffers and writes one of them, in place."""
    average, w = (torch.full((parameters,), value) for value in (0.0, 1.0))
    return waiting(lambda: average.add_(w, alpha=1 - DECAY))


def waiting(function):
    """Returns a function that waits until an accelerator, if there is one, has done its work."""

    def wait():
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return wait
