"""A hash of variables: a sum over the bits of their values, each with its own odd multiplier."""

import torch

from polyak_model.backend.torch.values import value_of

# The golden ratio in 32 bits, as in Fibonacci hashing: neighbours get multipliers far apart.
_ODD = 0x9E3779B1
_LOW = 2**32 - 1


@torch.no_grad()
def fingerprint(variables):
    # The lower halves of 64-bit integers, since PyTorch has no operations on unsigned ones.
    total = 0
    for variable in variables:
        bits = _bits(value_of(variable))
        total = (total * _ODD + int((_mixed(bits) * _multipliers(bits)).sum())) & _LOW
    signed = total - 2**32 if total >= 2**31 else total
    return torch.tensor(signed or 1, dtype=torch.int32)


def _multipliers(bits):
    return _mixed(torch.arange(1, len(bits) + 1, device=bits.device) * _ODD) | 1


def _mixed(x):
    return x ^ ((x & _LOW) >> 16)


def _bits(values):
    flat = values.reshape(-1)
    if flat.element_size() == 2:
        return flat.view(torch.int16).long() & 0xFFFF
    return flat.view(torch.int32).long()
