"""How averages are updated: many small ones at once, large ones one by one.

The iterates are checked once for all averages. Where they are finite and not huge, as they nearly
always are, lists of averages are updated by single calls; else each by the formula for all cases.
"""

import torch

from polyak_model.backend.torch.values import value_of

# Up to this many elements PyTorch uses one thread, and a call takes longer than its arithmetic.
TOGETHER = 2**15


@torch.no_grad()
def update(updates):
    moves = [(pairs, float(weight)) for pairs, weight in updates]
    moves = [(pairs, c) for pairs, c in moves if pairs and c > 0]
    if not moves:
        return
    targets = [[value_of(pair.target) for pair in pairs] for pairs, _ in moves]
    raw = [value_of(pair.raw) for pair in moves[0][0]]
    iterates = [_like(a, w) for a, w in zip(targets[0], raw, strict=True)]
    for indices in _parts(iterates):
        w = [iterates[i] for i in indices]
        moderate = all(map(_are_moderate, _flattened(w)))
        for (pairs, c), averages in zip(moves, targets, strict=True):
            a = [averages[i] for i in indices]
            if pairs[0].residual is not None:
                r = [value_of(pairs[i].residual) for i in indices]
                update = _update_compensated if moderate and c < 1 else _update_any_compensated
                update(c, w, a, r)
            elif moderate and c < 1:
                torch._foreach_lerp_(a, w, c)
            else:
                _update_any(c, w, a)


def _like(a, w):
    return w if w.dtype == a.dtype and w.device == a.device else w.to(a)


def _parts(tensors):
    """Yields lists of the indices of tensors to treat together."""
    part, elements = [], 0
    for i, tensor in enumerate(tensors):
        if part and elements + tensor.numel() > TOGETHER:
            yield part
            part, elements = [], 0
        part.append(i)
        elements += tensor.numel()
    yield part


def _flattened(tensors):
    """Yields all values as one flat tensor for each dtype."""
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        yield group[0] if len(group) == 1 else torch._utils._flatten_dense_tensors(group)


def _are_moderate(values):
    """Returns whether all are finite, and so small that no difference from them overflows."""
    if not values.numel():
        return True
    # Less than half of what separates the largest numbers: added to those, it is rounded off.
    info = torch.finfo(values.dtype)
    limit = info.max * info.eps / 8
    low, high = values.aminmax()
    return bool((-limit < low) & (high < limit))


def _update_any(c, iterates, averages):
    """Updates averages, `a += c * (w - a)`, for any iterates."""
    for w, a in zip(iterates, averages, strict=True):
        w = torch.where(torch.isfinite(w), w, a)
        # Half of a difference never overflows, and halving is exact. From the nearer end the step
        # is at most half of the difference, so it does not overflow either.
        half = 0.5 * w - 0.5 * a
        moved = a + 2 * c * half if c <= 0.5 else w + 2 * (c - 1) * half
        a.copy_(w if c == 1 else moved)


def _update_compensated(c, w, a, r):
    """Updates averages of twice the precision, `a + r`: lists of tensors."""
    step = torch._foreach_sub(w, a)
    torch._foreach_sub_(step, r)
    torch._foreach_mul_(step, c)
    torch._foreach_add_(step, r)
    moved = torch._foreach_add(a, step)
    rest = torch._foreach_sub(step, torch._foreach_sub(moved, a))
    torch._foreach_copy_(a, moved)
    torch._foreach_copy_(r, rest)


def _update_any_compensated(c, iterates, averages, residuals):
    """Does the same for any iterates."""
    for w, a, r in zip(iterates, averages, residuals, strict=True):
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
