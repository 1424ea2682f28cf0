"""The terms of AlignGuard-LoRA, on plain matrices and on products of thin ones.

W0 and its update D are ``[out, in]``. F is the Fisher information of alignment data for the layer's
outputs, ``[out, out]``; U_m its top eigenvectors, lambda_i its eigenvalues, P = U_m U_m'.

    D_A = P D,  D_T = (I - P) D                               what alignment depends on, and the rest
    fisher_norm        = sum_i lambda_i |u_i' D|^2            = |F^{1/2} D_A|_F^2
    riemannian_overlap = mean_ij eta_ij |D_A,ij D_T,ij|,      eta = 1 + beta sigmoid(|D_A + D_T| - tau)
    geodesic_overlap   = <D_A, D_T>^2 / (|D_A|^2 |D_T|^2 + eps)

With D_A and D_T cut out of one D by an orthogonal projector, ``<D_A, D_T> = tr(D' P (I - P) D) = 0``
whatever D is: the geodesic overlap and its gradient vanish. It says something about two updates that
are trained side by side.

Source: AlignGuard-LoRA, arXiv 2508.02079. The paper does not say which weight eta looks at (here the
update, or with ``base`` the updated weight), nor is it established that it takes the mean over entries
(``reduce="sum"`` is the other reading).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from guywire.core.errors import UsageError

__all__ = [
    "Product",
    "critical_subspace",
    "fisher_norm",
    "geodesic_overlap",
    "layer_terms",
    "riemannian_overlap",
    "split_update",
    "squared_norm",
]

Reduce = Literal["mean", "sum"]

EPSILON = 1e-12
_ROWS = 256


class Product(NamedTuple):
    """An update ``left @ right`` of thin factors, such as ``(scaling * B, A)``.

    Attributes:
        left: ``[out, r]``.
        right: ``[r, in]``.
    """

    left: Tensor
    right: Tensor


def critical_subspace(gram: Tensor, energy: float = 0.9) -> tuple[Tensor, Tensor]:
    """Return the fewest top eigenvectors that hold a share of the trace.

    Args:
        gram: F, symmetric and positive semi-definite, ``[out, out]``.
        energy: share of the trace in [0, 1]; at 0 there are none.

    Returns:
        U_m ``[out, m]`` and the eigenvalues ``[m]``, falling.

    Raises:
        UsageError: the energy lies outside [0, 1].

    Example:
        >>> basis, values = critical_subspace(torch.diag(torch.tensor([1.0, 5.0, 4.0])), 0.9)
        >>> values
        tensor([5., 4.])
    """
    if not 0.0 <= energy <= 1.0:
        raise UsageError(f"energy={energy} is a share of the trace: it must lie in [0, 1]")
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    total = values.sum()
    if energy == 0.0 or not bool(total > 0):
        return vectors[:, :0].clone(), values[:0].clone()
    slack = torch.finfo(gram.dtype).eps * len(values)
    missing = values.cumsum(0) < (energy - slack) * total
    m = min(int(missing.sum()) + 1, len(values))
    return vectors[:, :m].clone(), values[:m].clone()


def split_update(update: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``P D`` and ``(I - P) D``.

    Args:
        update: D, ``[out, in]``.
        basis: U_m, ``[out, m]``.

    Returns:
        Both parts, ``[out, in]``.

    Example:
        >>> split_update(torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0], [0.0]]))
        (tensor([[2.],
                [0.]]), tensor([[0.],
                [3.]]))
    """
    critical = basis @ (basis.T @ update)
    return critical, update - critical


def fisher_norm(update: Tensor | Product, basis: Tensor, values: Tensor) -> Tensor:
    """Return ``sum_i lambda_i |u_i' D|^2``, without a root of F.

    Args:
        update: D, ``[out, in]``, or its factors.
        basis: U_m, ``[out, m]``.
        values: the eigenvalues, ``[m]``.

    Returns:
        A 0-d tensor.

    Example:
        >>> fisher_norm(
        ...     torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([5.0])
        ... )
        tensor(20.)
    """
    if isinstance(update, Product):
        inside = basis.T @ update.left
        rows = ((inside @ (update.right @ update.right.T)) * inside).sum(1)
        return (values * rows).sum()
    return (values * (basis.T @ update).square().sum(1)).sum()


def squared_norm(update: Product, metric: Tensor | None = None) -> Tensor:
    """Return ``sum_ij H_ij D_ij^2``.

    Args:
        update: the factors of D.
        metric: H, ``[out, in]``, positive; ``None`` for ones, which needs no ``[out, in]`` product.

    Returns:
        A 0-d tensor.
    """
    if metric is not None:
        return (metric * (update.left @ update.right).square()).sum()
    return ((update.left.T @ update.left) * (update.right @ update.right.T)).sum()


def riemannian_overlap(
    aligned: Tensor | Product,
    task: Tensor | Product,
    *,
    beta: float = 4.0,
    tau: float = 0.01,
    base: Tensor | None = None,
    reduce: Reduce = "mean",
) -> Tensor:
    """Return how far two updates move the same entries, more where the movement is large.

    Of factors only some rows of the product are held at a time, and the gradient falls out in the
    same pass. Where an entry is zero the sub-gradient 0 is taken.

    Args:
        aligned: D_A, ``[out, in]``, or its factors.
        task: D_T, likewise.
        beta: weight of large entries.
        tau: from where on they count as large.
        base: W0, to let eta look at ``|W0 + D_A + D_T|`` instead of ``|D_A + D_T|``.
        reduce: over entries.

    Returns:
        A 0-d tensor.

    Raises:
        UsageError: ``reduce`` is neither.

    Example:
        >>> a, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
        >>> riemannian_overlap(a, t, beta=0.0)
        tensor(1.5000)
    """
    if reduce not in ("mean", "sum"):
        raise UsageError(f"reduce={reduce!r} is neither 'mean' nor 'sum'")
    if isinstance(aligned, Product) and isinstance(task, Product):
        total: Any = _Overlap.apply(*aligned, *task, base, beta, tau)
        size = aligned.left.shape[0] * aligned.right.shape[1]
    else:
        a, t = (x.left @ x.right if isinstance(x, Product) else x for x in (aligned, task))
        where = a + t if base is None else a + t + base
        eta = 1.0 + beta * torch.sigmoid(where.abs() - tau)
        total, size = (eta * (a * t).abs()).sum(), a.numel()
    return total / size if reduce == "mean" else total


def geodesic_overlap(
    aligned: Tensor | Product, task: Tensor | Product, *, epsilon: float = EPSILON
) -> Tensor:
    """Return the squared cosine between two updates: 0 where one of them is zero.

    Args:
        aligned: D_A, ``[out, in]``, or its factors.
        task: D_T, likewise.
        epsilon: added to the denominator.

    Returns:
        A 0-d tensor in [0, 1].

    Example:
        >>> a = torch.tensor([[1.0, 1.0]])
        >>> geodesic_overlap(a, torch.tensor([[1.0, 0.0]]))
        tensor(0.5000)
    """
    if isinstance(aligned, Product) and isinstance(task, Product):
        inner = ((aligned.left.T @ task.left) * (aligned.right @ task.right.T)).sum()
        norms = squared_norm(aligned) * squared_norm(task)
    else:
        a, t = (x.left @ x.right if isinstance(x, Product) else x for x in (aligned, task))
        inner, norms = (a * t).sum(), a.square().sum() * t.square().sum()
    return inner.square() / (norms + epsilon)


def layer_terms(
    updates: Sequence[Product],
    basis: Tensor,
    values: Tensor,
    *,
    two_branch: bool,
    metric: Tensor | None = None,
    base: Tensor | None = None,
    beta: float = 4.0,
    tau: float = 0.01,
    reduce: Reduce = "mean",
    overlap: bool = True,
    geodesic: bool = True,
) -> dict[str, Tensor]:
    """Return the terms of one layer.

    Args:
        updates: of the adapters; two branches are that of the task, then of alignment.
        basis: U_m, ``[out, m]``.
        values: the eigenvalues, ``[m]``.
        two_branch: D_T and D_A are the two updates, and not both cut out of their sum.
        metric: H, ``[out, in]``, or ones.
        base: as for :func:`riemannian_overlap`.
        beta: likewise.
        tau: likewise.
        reduce: likewise.
        overlap: compute it.
        geodesic: compute it.

    Returns:
        ``aligned``, ``task`` and, where wanted, ``overlap`` and ``geodesic``.
    """
    if two_branch:
        task, aligned = updates
        off = Product(aligned.left - basis @ (basis.T @ aligned.left), aligned.right)
        terms = {
            "aligned": fisher_norm(aligned, basis, values) + fisher_norm(task, basis, values),
            "task": squared_norm(task, metric) + squared_norm(off, metric),
        }
    else:
        whole = Product(
            torch.cat([u.left for u in updates], 1), torch.cat([u.right for u in updates])
        )
        critical = basis @ (basis.T @ whole.left)
        aligned = Product(critical, whole.right)
        task = Product(whole.left - critical, whole.right)
        terms = {"aligned": fisher_norm(whole, basis, values), "task": squared_norm(task, metric)}
    if overlap:
        terms["overlap"] = riemannian_overlap(
            aligned, task, beta=beta, tau=tau, base=base, reduce=reduce
        )
    if geodesic:
        terms["geodesic"] = geodesic_overlap(aligned, task)
    return terms


class _Overlap(torch.autograd.Function):
    """The sum of the Riemannian overlap for thin factors, with its gradient, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        left_a: Tensor,
        right_a: Tensor,
        left_t: Tensor,
        right_t: Tensor,
        base: Tensor | None,
        beta: float,
        tau: float,
    ) -> Tensor:
        total = left_a.new_zeros(())
        wanted = any(ctx.needs_input_grad[:4])
        grads = [torch.zeros_like(x) for x in (left_a, right_a, left_t, right_t)] if wanted else []
        for lo in range(0, left_a.shape[0], _ROWS):
            rows = slice(lo, lo + _ROWS)
            a, t = left_a[rows] @ right_a, left_t[rows] @ right_t
            where = a + t if base is None else a + t + base[rows].to(a.dtype)
            gate = torch.sigmoid(where.abs() - tau)
            eta, size = 1.0 + beta * gate, (a * t).abs()
            total += (eta * size).sum()
            if not wanted:
                continue
            through = beta * gate * (1.0 - gate) * where.sign() * size
            to_a = eta * t.abs() * a.sign() + through
            to_t = eta * a.abs() * t.sign() + through
            grads[0][rows] = to_a @ right_a.T
            grads[1].addmm_(left_a[rows].T, to_a)
            grads[2][rows] = to_t @ right_t.T
            grads[3].addmm_(left_t[rows].T, to_t)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*(grads[0] * g for g in ctx.saved_tensors), None, None, None)
