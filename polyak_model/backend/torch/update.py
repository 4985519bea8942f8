"""How averages are updated: many small ones at once, large ones one by one.

The iterates are checked once for all averages. Where they are finite and not huge, as they nearly
always are, lists of averages are updated by single calls; else each by the formula for all cases.
"""

import math

import torch

from polyak_model.backend.torch.values import value_of

# Up to this many elements, a call takes longer than its arithmetic, and than a copy for the check.
SMALL = 2**15
# So many are copied at once.
TOGETHER = 2**20
# So many of a large tensor are updated at once where there are intermediate results.
BLOCK = 2**18


@torch.no_grad()
def update(updates):
    moves = [(pairs, float(weight)) for pairs, weight in updates if pairs]
    moves = [(pairs, c) for pairs, c in moves if c > 0]
    if not moves:
        return
    targets = [_tensors(pair.target for pair in pairs) for pairs, _ in moves]
    iterates = _like(targets[0], _tensors(pair.raw for pair in moves[0][0]))
    residuals = [None] * len(moves)
    if moves[0][0][0].residual is not None:
        residuals = [_tensors(pair.residual for pair in pairs) for pairs, _ in moves]
        iterates, *others = _in_blocks(iterates, *targets, *residuals)
        targets, residuals = others[: len(moves)], others[len(moves) :]
    for part in _parts(iterates):
        w = iterates[part]
        moderate = _are_moderate(w)
        for (_, c), averages, rests in zip(moves, targets, residuals, strict=True):
            a = averages[part]
            if rests is not None:
                update = _update_compensated if moderate and c < 1 else _update_any_compensated
                update(c, w, a, rests[part])
            elif moderate and c < 1:
                torch._foreach_lerp_(a, w, c)
            else:
                _update_any(c, w, a)


def _tensors(variables):
    # `value_of` for hundreds of variables at each step would take as long as their update.
    return [getattr(variable, "_value", variable) for variable in variables]


def _like(averages, raw):
    """Returns raw weights with the dtypes and on the devices of their averages."""
    tensors = averages + raw
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == len(set(map(torch.Tensor.get_device, tensors))) == 1:
        return raw
    return [w.to(a) for a, w in zip(averages, raw, strict=True)]


def _in_blocks(*lists):
    """Returns lists of tensors with blocks instead of the large ones that a CPU updates.

    The intermediate results for a block stay in the CPU's cache; those for a large tensor would
    each be written to memory and read again.
    """
    large = [i for i, w in enumerate(lists[0]) if w.numel() > BLOCK and w.device.type == "cpu"]
    split = {i for i in large if all(own[i].is_contiguous() for own in lists)}
    if not split:
        return lists
    return [
        [
            block
            for i, tensor in enumerate(own)
            for block in (tensor.view(-1).split(BLOCK) if i in split else (tensor,))
        ]
        for own in lists
    ]


def _parts(tensors):
    """Yields slices of tensors to treat together: some small ones, or a large one."""
    begin, elements = 0, 0
    sizes = (size if size <= SMALL else TOGETHER for size in map(torch.numel, tensors))
    for i, size in enumerate(sizes):
        if i > begin and elements + size > TOGETHER:
            yield slice(begin, i)
            begin, elements = i, 0
        elements += size
    yield slice(begin, len(tensors))


def _flattened(tensors):
    """Yields all values as one flat tensor for each dtype."""
    if len(tensors) == 1:
        yield tensors[0]
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        yield torch._utils._flatten_dense_tensors(group)


def _are_moderate(tensors):
    """Returns whether all are finite, and so small that no difference from them overflows."""
    if len(tensors) == 1 and tensors[0].numel() > SMALL and _has_finite_square(tensors[0]):
        return True
    return all(map(_has_moderate_norm, _flattened(tensors)))


def _has_finite_square(values):
    """Returns whether the sum of squares is finite, so that values are far below the limit."""
    # A product of BLAS takes less than a norm. But its threads, which start at 10,000 values, wait
    # for a time slice, 8 ms, where other work keeps the machine busy. The training itself uses
    # threads for large tensors alone, so only they are checked by such a product.
    values = values.reshape(-1)
    in_32_bits = torch.finfo(values.dtype).bits >= 32
    return in_32_bits and math.isfinite(torch.dot(values, values).item())


def _has_moderate_norm(values):
    # Less than half of what separates the largest numbers: added to those, it is rounded off. No
    # value exceeds the norm, which takes one pass and is NaN where a value is.
    info = torch.finfo(values.dtype)
    return torch.linalg.vector_norm(values).item() < info.max * info.eps / 8


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
