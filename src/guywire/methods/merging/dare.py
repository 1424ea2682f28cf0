"""DARE and DAREx-q: throw most of a fine-tuning's change away, and rescale what is left.

For whoever stores or merges many fine-tuned copies of one pretrained model. A random share ``rate``
of the difference to the pretrained weights is dropped, and what survives is divided by ``q``:

    theta = base + (1 - M) * (tuned - base) / q,     M ~ Bernoulli(rate) per weight

``q = 1 - rate`` is DARE, whose output has no bias and a variance of ``rate / (1 - rate) * Q``, which
breaks at rates near 1. A larger q trades variance for bias: DAREx-q. ``rescale.py`` and ``search.py``
choose it. ``q = 1`` drops without rescaling.

Which weights survive follows from the seed and the tensor's name alone, so the order of tensors,
shards and processes does not matter. The head is no change of anything pretrained: leave it out.

Source: Deng, Zhao, Vakilian, Chen, Li, Thrampoulidis, "DARE the Extreme: Revisiting Delta-Parameter
Pruning For Fine-Tuned Models", arXiv 2410.09344; DARE itself is arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from guywire.core.errors import SelectionError, UsageError
from guywire.core.tensors import Tensors
from guywire.methods.merging.masks import survivors

__all__ = ["drop_and_rescale", "keep", "prunable", "rescale_kept", "rescaled"]

Factors = float | Mapping[str, float]


def drop_and_rescale(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rate: float,
    q: Factors | None = None,
    *,
    seed: int = 0,
    select: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Tensors:
    """Return fine-tuned weights of which only a random part of the change is left, rescaled.

    Args:
        base: names to pretrained tensors.
        tuned: names to fine-tuned tensors; their names and types are those of the result.
        rate: share of the change that is dropped, in [0, 1).
        q: what survivors are divided by, in [1 - rate, 1]; one number, or names to numbers;
            ``None`` is ``1 - rate``, which is DARE.
        seed: of the survivors.
        select: globs over the names of tensors to prune; all of them if ``None``.
        exclude: globs over names to leave as fine-tuned, such as the head's.

    Returns:
        New tensors. What is not pruned, has no partner in ``base`` or holds no floats is as in
        ``tuned``.

    Raises:
        UsageError: rate or q is out of range, or a partner has another shape.
        SelectionError: nothing is left to prune.

    Example:
        >>> base, tuned = {"w": torch.zeros(1000)}, {"w": torch.ones(1000)}
        >>> edited = drop_and_rescale(base, tuned, 0.9, q=0.5)["w"]
        >>> edited.unique().tolist(), int(edited.count_nonzero()) < 200
        ([0.0, 2.0], True)
    """
    kept = keep(base, tuned, rate, seed=seed, select=select, exclude=exclude)
    return rescale_kept(base, tuned, kept, 1.0 - rate if q is None else q)


def keep(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rate: float,
    *,
    seed: int = 0,
    select: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Tensors:
    """Return which weights of each tensor survive; one draw serves every q.

    Args:
        base: names to pretrained tensors.
        tuned: names to fine-tuned tensors.
        rate: share that is dropped, in [0, 1).
        seed: of the survivors.
        select: as for :func:`drop_and_rescale`.
        exclude: as for :func:`drop_and_rescale`.

    Returns:
        Names to positions in the flattened tensor, ``[survivors]`` int64, increasing.

    Raises:
        UsageError: the rate is out of range, or a partner has another shape.
        SelectionError: nothing is left to prune.
    """
    check_rate(rate)
    return {
        name: survivors(name, tuned[name].numel(), rate, seed).to(tuned[name].device)
        for name in prunable(base, tuned, select, exclude)
    }


def rescale_kept(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    q: Factors,
) -> Tensors:
    """Return ``base + kept change / q``.

    Args:
        base: names to pretrained tensors.
        tuned: names to fine-tuned tensors.
        kept: names to the positions that survive, or to masks of the tensors' shapes; tensors that
            are not named stay as fine-tuned.
        q: one number, or a number for each name in ``kept``.

    Returns:
        New tensors under the names of ``tuned``.

    Raises:
        UsageError: a q is not in (0, 1], or is missing.

    Example:
        >>> base, tuned = {"w": torch.zeros(4)}, {"w": torch.arange(4.0)}
        >>> rescale_kept(base, tuned, {"w": torch.tensor([1, 3])}, 0.5)["w"]
        tensor([0., 2., 0., 6.])
    """
    if isinstance(q, Mapping) and (missing := kept.keys() - q.keys()):
        raise UsageError(f"there is no q for {min(missing)!r}: give one for every pruned tensor")
    return {
        name: rescaled(base[name], value, kept[name], q[name] if isinstance(q, Mapping) else q)
        if name in kept
        else value.detach().clone()
        for name, value in tuned.items()
    }


def rescaled(base: Tensor, tuned: Tensor, kept: Tensor, q: float) -> Tensor:
    """Return one tensor with the kept part of its change divided by q.

    The difference is taken in at least float32. With ``q = 1`` survivors are the fine-tuned values
    themselves, bit for bit.

    Args:
        base: pretrained, of any shape.
        tuned: fine-tuned, of the same shape.
        kept: positions in the flattened tensor, int64, or a mask of the same shape.
        q: in (0, 1].

    Returns:
        A tensor of the shape and type of ``tuned``.

    Raises:
        UsageError: q is out of range.
    """
    if not 0.0 < q <= 1.0:
        raise UsageError(f"q is {q}: it must be in (0, 1], where 1 does not rescale")
    where = kept.reshape(-1)
    before, after = base.detach().reshape(-1)[where], tuned.detach().reshape(-1)[where]
    if q != 1.0:
        wide = torch.promote_types(after.dtype, torch.float32)
        before = before.to(wide)
        after = before + (after.to(wide) - before) / q
    out = base.detach().to(tuned.dtype, copy=True, memory_format=torch.contiguous_format)
    out.view(-1)[where] = after.to(tuned.dtype)
    return out


def prunable(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    select: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> list[str]:
    """Return the names of the tensors to prune.

    Args:
        base: names to pretrained tensors.
        tuned: names to fine-tuned tensors.
        select: globs; all of them if ``None``.
        exclude: globs.

    Returns:
        Names, in the order of ``tuned``.

    Raises:
        UsageError: a partner has another shape.
        SelectionError: no name is left.
    """
    wanted = None if select is None else _globs(select)
    unwanted = _globs(exclude)
    found = []
    for name, value in tuned.items():
        if name not in base or not value.is_floating_point():
            continue
        if wanted is not None and not _hit(name, wanted):
            continue
        if _hit(name, unwanted):
            continue
        if base[name].shape != value.shape:
            raise UsageError(
                f"{name!r} has the shape {tuple(base[name].shape)} in the base and "
                f"{tuple(value.shape)} fine-tuned: exclude it, it stays as fine-tuned then"
            )
        found.append(name)
    if not found:
        raise SelectionError(
            f"select={select!r} and exclude={exclude!r} leave none of the {len(tuned)} tensors to prune"
        )
    return found


def check_rate(rate: float) -> None:
    """Refuse a rate that is none.

    Args:
        rate: share that is dropped.

    Raises:
        UsageError: it is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise UsageError(f"the rate is {rate}: it is the share that is dropped, in [0, 1)")


def _globs(rules: str | Iterable[str]) -> list[str]:
    return [rules] if isinstance(rules, str) else list(rules)


def _hit(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
