"""How averages are updated: many small ones at once, large ones one by one.

The iterates are checked once for all averages. Where they are finite and not huge, as they nearly
always are, averages are updated by the fewest calls; else by a formula for all cases.
"""

import math
import operator

import torch

from polyak_model.backend.torch.groups import SMALL, groups_of
from polyak_model.backend.torch.values import value_of

# So many of a large tensor are updated at once where there are intermediate results.
BLOCK = 2**17


@torch.no_grad()
def update(updates):
    moves = [(pairs, float(weight)) for pairs, weight in updates if pairs]
    moves = [(pairs, c) for pairs, c in moves if c > 0]
    if not moves:
        return
    raw = _values_of("raw", moves[0][0])
    averages = [_values_of("target", pairs) for pairs, _ in moves]
    residuals = [None] * len(moves)
    if moves[0][0][0].residual is not None:
        residuals = [_values_of("residual", pairs) for pairs, _ in moves]
    for group in groups_of(averages[0]):
        iterates, values = group.gather(raw, averages[0])
        moderate = _is_moderate(values, group.flat is None)
        for (_, c), own, rests in zip(moves, averages, residuals, strict=True):
            if rests is not None:
                _update_compensated(c, iterates, group.of(own), group.of(rests), moderate)
            elif moderate and c < 1:
                torch._foreach_lerp_(group.of(own), iterates, c)
            else:
                for w, a in zip(iterates, group.of(own), strict=True):
                    _update_any(c, w, a)


def _values_of(name, pairs):
    # `value_of` for hundreds of variables at each step would take as long as their update.
    return list(map(operator.attrgetter(f"{name}._value"), pairs))


def _is_moderate(values, may_use_threads):
    """Returns whether all are finite, and so small that no difference from them overflows."""
    if may_use_threads and values.numel() > SMALL and _has_finite_square(values):
        return True
    # Less than half of what separates the largest numbers: added to those, it is rounded off. No
    # value exceeds the norm, which takes one pass and is NaN where a value is.
    info = torch.finfo(values.dtype)
    return torch.linalg.vector_norm(values).item() < info.max * info.eps / 8


def _has_finite_square(values):
    """Returns whether the sum of squares is finite, so that values are far below the limit."""
    # A product of BLAS takes less than a norm. But its threads, which start at 10,000 values, wait
    # for a time slice, 8 ms, where other work keeps the machine busy. The training itself uses
    # threads for large tensors alone, so only they are checked by such a product.
    values = values.reshape(-1)
    in_32_bits = torch.finfo(values.dtype).bits >= 32
    return in_32_bits and math.isfinite(torch.dot(values, values).item())


def _update_any(c, w, a):
    """Updates an average, `a += c * (w - a)`, for any iterate."""
    w = torch.where(torch.isfinite(w), w, a)
    # Half of a difference never overflows, and halving is exact. From the nearer end the step is
    # at most half of the difference, so it does not overflow either.
    half = 0.5 * w - 0.5 * a
    moved = a + 2 * c * half if c <= 0.5 else w + 2 * (c - 1) * half
    a.copy_(w if c == 1 else moved)


def _update_compensated(c, iterates, averages, residuals, moderate):
    """Updates averages of twice the precision, `a + r`: lists of tensors."""
    for part in _in_blocks(iterates, averages, residuals):
        if moderate and c < 1:
            _update_moderate(c, *part)
        else:
            for w, a, r in zip(*part, strict=True):
                _update_any_compensated(c, w, a, r)


def _in_blocks(*lists):
    """Yields lists of tensors to update at once: small ones, or a block of one that a CPU updates.

    The intermediate results for a block stay in the CPU's cache; those for a large tensor would
    each be written to memory and read again.
    """
    tensors = [own[0] for own in lists]
    contiguous = all(map(torch.Tensor.is_contiguous, tensors))
    if len(lists[0]) > 1 or tensors[0].device.type != "cpu" or not contiguous:
        yield lists
        return
    for blocks in zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True):
        yield [[block] for block in blocks]


def _update_moderate(c, w, a, r):
    """Does so for moderate iterates, and leaves averages intact where it is interrupted."""
    difference = torch._foreach_sub(w, a)
    torch._foreach_lerp_(r, difference, c)  # The step.
    before = difference  # Another list would take time to allocate, and leave the cache.
    torch._foreach_copy_(before, a)
    torch._foreach_add_(a, r)
    torch._foreach_sub_(before, a)
    torch._foreach_add_(r, before)


def _update_any_compensated(c, w, a, r):
    """Does the same for any iterate: tensors."""
    step = _step(c, w, a, r)
    moved = a + step
    rest = step - (moved - a)
    # Where the difference overflows, it does not at a quarter of the scale, which is exact.
    overflows = ~torch.isfinite(rest)
    moved = torch.where(overflows, (1 - c) * a + c * w, moved)
    scaled = 4 * (_step(c, w / 4, a / 4, r / 4) - (moved / 4 - a / 4))
    rest = torch.where(overflows, scaled, rest)
    moved, rest = (w, torch.zeros_like(r)) if c == 1 else (moved, rest)
    finite = torch.isfinite(w)
    a.copy_(torch.where(finite, moved, a))
    r.copy_(torch.where(finite, rest, r))


def _step(c, w, a, r):
    return c * ((w - a) - r) + r


@torch.no_grad()
def assign(pairs, weight=1.0):
    pairs = [(value_of(target), value_of(source)) for target, source in pairs]
    if pairs and weight > 0:
        torch._foreach_copy_(*zip(*pairs, strict=True))
