"""How PyTorch's objects are copied by structure, see `polyak_model.backend.structure`."""

import keras
import torch
from keras.src.backend.common import global_state

PRIVATE = ((keras.Variable, ("_value",)),)


def is_bookkeeping(name):
    return False


def track_copies(old, new, copier):
    pass  # What a module holds is what it tracks.


def is_shared(value):
    # Data types, devices, functions. Whatever else is PyTorch's has a rule, or tells `copy` how.
    kinds = (torch.dtype, torch.device, torch.layout, torch.memory_format)
    return isinstance(value, kinds)


def _copy_tensor(value, copier):
    # Without a device of its own, a copy is where its original is.
    device = global_state.get_global_attribute("torch_device") or value.device
    copy = value.detach().clone().to(device)
    if isinstance(value, torch.nn.Parameter):
        copy = torch.nn.Parameter(copy, requires_grad=value.requires_grad)
    return copier.add(value, copy)


def _copy_variable(value, copier):
    # Its parameter is also one of the modules that hold the variable.
    return copier.add(value, object.__new__(type(value)), copier.fill)


def _copy_module(value, copier):
    return copier.add(value, object.__new__(type(value)), copier.fill)


def _copy_script(value, copier):
    raise TypeError("it is compiled by torch.jit")


_RULES = {
    keras.Variable: _copy_variable,
    torch.Generator: lambda value, copier: copier.add(value, value.clone_state()),
    torch.Tensor: _copy_tensor,
    torch.jit.ScriptModule: _copy_script,
    torch.nn.Module: _copy_module,
    # Its state belongs to the weights of the original.
    torch.optim.Optimizer: lambda value, copier: copier.optimizer(),
}


def copy_rules():
    return _RULES
