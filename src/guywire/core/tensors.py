"""Arithmetic on named tensors: the few kernels that penalties are made of.

Every kernel works elementwise on the *local* part of each tensor, so under FSDP2 it touches this
process's shard and communicates nothing. On a CPU it walks each tensor in blocks that stay in the
cache, so a pull costs one pass over memory and no temporary of a parameter's size; on other devices
it works tensor by tensor, with one temporary of the largest parameter's size. Anchors and weights may
lie on another device than the parameters: they are fetched block by block.

All of them expect to run under ``torch.no_grad()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Tensors",
    "add_pull",
    "add_sign",
    "clone",
    "distance",
    "local",
    "place_like",
    "pull_towards",
    "reduce_shards",
    "shrink_towards",
]

Tensors = dict[str, Tensor]

# Elements a block. 256 Ki floats make a buffer of 1 MiB, small enough for a shared cache; smaller
# blocks cost more in calls than they save in memory traffic (benchmarks/penalty.py).
_BLOCK = 1 << 18

# Where an anchor lies elsewhere than a parameter on a GPU, so many elements are fetched at a time.
_FETCHED = 1 << 24


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, detached: a DTensor's shard, or the tensor itself.

    Args:
        tensor: an ordinary tensor or a ``DTensor``.

    Returns:
        A tensor that shares the memory.
    """
    tensor = tensor.detach()
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def clone(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a detached copy that shares no memory, sharded as the original is.

    Args:
        tensor: an ordinary tensor or a ``DTensor``.
        dtype: of the copy; the tensor's own if ``None``.

    Returns:
        The copy.
    """
    copy = tensor.detach().clone()
    return copy if dtype is None else copy.to(dtype)


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor on the device, and sharded over processes, as another one is.

    Nothing is communicated: every process must hold the whole of a tensor that gets sharded.

    Args:
        tensor: an ordinary tensor of the whole shape, or a ``DTensor``.
        like: what to follow.

    Returns:
        The tensor itself where it is in place already, else a copy of it, or of a part.
    """
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or hasattr(tensor, "device_mesh"):
        return tensor if tensor.device == like.device else tensor.to(like.device)
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * mesh.ndim
    whole = DTensor.from_local(tensor.to(like.device), mesh, everywhere, run_check=False)
    placements = like.placements  # pyright: ignore[reportAttributeAccessIssue]
    return whole.redistribute(mesh, placements)


def add_pull(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    strengths: Sequence[float],
    precisions: Sequence[Tensor] | None = None,
) -> None:
    """Add ``strength * precision * (param - anchor)`` to each gradient in place.

    Args:
        grads: local gradients, changed in place.
        params: local parameters.
        anchors: local anchors; ``None`` stands for zero.
        strengths: one number a tensor.
        precisions: local weights of the quadratic; ``None`` stands for one everywhere.
    """
    for s, g, d, f in _differences(grads, params, anchors, strengths, precisions):
        _add_product(g, d, f, s)


def add_sign(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    strengths: Sequence[float],
) -> None:
    """Add ``strength * sign(param - anchor)`` to each gradient in place.

    Args:
        grads: local gradients, changed in place.
        params: local parameters.
        anchors: local anchors; ``None`` stands for zero.
        strengths: one number a tensor.
    """
    for s, g, d, _ in _differences(grads, params, anchors, strengths, None):
        g.add_(d.sign_(), alpha=s)


def pull_towards(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    rates: Sequence[float],
    precisions: Sequence[Tensor] | None = None,
) -> None:
    """Take ``rate * precision * (param - anchor)`` off each parameter in place.

    Args:
        params: local parameters, changed in place.
        anchors: local anchors; ``None`` stands for zero.
        rates: one number a tensor.
        precisions: local weights; ``None`` stands for one everywhere.
    """
    if precisions is None and all(anchor is None for anchor in anchors):
        for p, r in zip(params, rates, strict=True):
            p.mul_(1.0 - r)  # bit for bit what AdamW's decay does
        return
    for r, p, d, f in _differences(params, params, anchors, rates, precisions):
        _add_product(p, d, f, -r)


def shrink_towards(
    params: Sequence[Tensor], anchors: Sequence[Tensor | None], rates: Sequence[float]
) -> None:
    """Move each parameter by ``rate`` towards its anchor, stopping there: the proximal step of L1.

    Args:
        params: local parameters, changed in place.
        anchors: local anchors; ``None`` stands for zero.
        rates: one number a tensor.
    """
    for r, p, d, _ in _differences(params, params, anchors, rates, None):
        p.sub_(d.clamp_(-r, r))


def distance(
    param: Tensor, anchor: Tensor | None, precision: Tensor | None = None, *, power: int = 2
) -> Tensor:
    """Return ``sum(precision * |param - anchor|^power)`` over the local parts, in at least float32.

    Args:
        param: a local parameter.
        anchor: its local anchor; ``None`` stands for zero.
        precision: local weights; ``None`` stands for one everywhere.
        power: 1 or 2.

    Returns:
        A 0-d tensor on the parameter's device.
    """
    dtype = torch.promote_types(param.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=param.device)
    weights = None if precision is None else [precision]
    for _, _, d, f in _differences([param], [param], [anchor], [1.0], weights):
        d = d.to(dtype)
        d = d.abs() if power == 1 else d.square()
        total += torch.sum(d if f is None else d * f)
    return total


def reduce_shards(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Sum local values into one that is the same on every process.

    Values that belong to sharded parameters are summed over the processes that hold the shards,
    with one collective call for all parameters that are sharded alike.

    Args:
        parts: pairs of a parameter and the value summed over its local part (0-d).

    Returns:
        The total (0-d), or ``None`` if there are no parts.
    """
    plain: Tensor | None = None
    sharded: dict[Any, Tensor] = {}
    for parameter, value in parts:
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            plain = value if plain is None else plain + value.to(plain)
        else:
            key = (mesh, tuple(parameter.placements))  # pyright: ignore[reportAttributeAccessIssue]
            sharded[key] = value + sharded[key] if key in sharded else value
    for (mesh, placements), value in sharded.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        kinds = [Replicate() if one.is_replicate() else Partial() for one in placements]
        whole = DTensor.from_local(value, mesh, kinds, run_check=False).full_tensor()
        plain = whole if plain is None else plain + whole.to(plain)
    return plain


def _add_product(
    target: Tensor, difference: Tensor, precision: Tensor | None, scale: float
) -> None:
    if precision is None:
        target.add_(difference, alpha=scale)
    elif target.dtype == difference.dtype == precision.dtype:
        target.addcmul_(precision, difference, value=scale)
    else:
        target.add_(difference * precision, alpha=scale)


def _differences(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    scales: Sequence[float],
    precisions: Sequence[Tensor] | None,
) -> Iterator[tuple[float, Tensor, Tensor, Tensor | None]]:
    """Yield (scale, target, param - anchor, precision) block by block.

    The difference may be written to; the next block overwrites it.
    """
    buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for i, param in enumerate(params):
        scale, anchor = scales[i], anchors[i]
        precision = None if precisions is None else precisions[i]
        dtype = param.dtype if anchor is None else torch.promote_types(param.dtype, anchor.dtype)
        if precision is not None:
            dtype = torch.promote_types(dtype, precision.dtype)
        key = (param.device, dtype)
        if param.device.type == "cpu" and key not in buffers:
            buffers[key] = torch.empty(_BLOCK, dtype=dtype)
        for target, p, *far in _blocks(targets[i], param, anchor, precision):
            a, f = (None if t is None else t.to(p.device, non_blocking=True) for t in far)
            out = buffers[key][: p.numel()].view(p.shape) if key in buffers else None
            if a is None:
                d = p.to(dtype, copy=True) if out is None else out.copy_(p)
            else:
                d = torch.sub(p, a) if out is None else torch.sub(p, a, out=out)
            yield scale, target, d, f


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    first = tensors[0]
    assert first is not None
    together = all(t is None or t.device == first.device for t in tensors)
    size = _BLOCK if first.device.type == "cpu" else _FETCHED
    if (first.device.type != "cpu" and together) or first.numel() <= size:
        yield tensors
        return
    if all(t is None or t.is_contiguous() for t in tensors):
        flat = [None if t is None else t.view(-1) for t in tensors]
    elif all(t is None or t.stride() == first.stride() for t in tensors) and _dense(first):
        # The same dense layout in another order of dimensions, such as channels_last.
        flat = [None if t is None else t.as_strided((t.numel(),), (1,)) for t in tensors]
    else:
        # Layouts differ: whole rows together where they are short, else row by row.
        rows = size // (first.numel() // first.shape[0])
        if rows:
            yield from _split(tensors, first.shape[0], rows)
            return
        for row in range(first.shape[0]):
            yield from _blocks(*(None if t is None else t[row] for t in tensors))
        return
    yield from _split(flat, first.numel(), size)


def _split(
    tensors: Sequence[Tensor | None], length: int, size: int
) -> Iterator[tuple[Tensor | None, ...]]:
    count = -(-length // size)
    pieces = [[None] * count if t is None else t.split(size) for t in tensors]
    return zip(*pieces, strict=True)


def _dense(tensor: Tensor) -> bool:
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
