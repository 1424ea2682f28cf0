"""PEGO: a group of LoRA adapters, kept orthogonal to the pretrained weights and to each other.

For whoever fine-tunes a pretrained model on a few domains and wants it to work on one it has not
seen: the pretrained directions that carry what generalises cost much to change, and the adapters of
a group learn different things. At the end they are merged away and inference costs nothing.

    preserve  = sum_i   ||W0 D_i'||,      D_i = scaling * B_i A_i
    diversify = sum_i<j ||D_i D_j'||
    penalty   = strength * (preserve + diversify), summed over adapted layers

W0: the frozen weight ``[out, in]``; A_i ``[r, in]`` and B_i ``[out, r]``: the adapters; ||X||: the
sum of absolute entries (``norm="l1"``) or of squares (``"fro2"``). With ``side="input"`` rows are held
orthogonal, as above and in the authors' code; with ``"output"`` columns: ||W0' D_i||, ||D_i' D_j||.

No product of two full matrices is needed: W0 D' = (W0 A') B', so every term is the norm of a product
of two thin matrices, O(out in r) instead of O(out^2 in). The absolute values need the entries of that
product once, some rows at a time, and their gradient falls out in the same pass; squares do without.

For a square W0 of full rank ``preserve`` is zero only at D = 0: it is a shrinkage that is dear along
the large singular directions of W0 and cheap along the small ones.

Source: Hu, Zhang, Qi, Shi, Gao, "Learn to Preserve and Diversify: Parameter-Efficient Group
with Orthogonal Regularization for Domain Generalization", ECCV 2024, arXiv 2407.15085. ``norm`` and
``side`` are variants that the authors' code mentions; ``normalise`` is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from guywire.core import tensors
from guywire.core.errors import SelectionError, UsageError
from guywire.core.regularizer import Regularizer, Step, Strength, strength_at
from guywire.methods.adapters._lora import Site, sites

__all__ = ["PEGO", "diversify_loss", "preserve_loss"]

Norm = Literal["l1", "fro2"]
Side = Literal["input", "output"]

_ROWS = 256
_WIDTH = 768
"""Of the model that the default strength belongs to (ViT-B)."""


def preserve_loss(
    base: Tensor,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    *,
    norm: Norm = "l1",
    side: Side = "input",
) -> Tensor:
    """Return ``sum_i ||W0 (B_i A_i)'||``, differentiable once in A and B.

    Memory is that of some rows of the product. Half precision is computed in float32.

    Args:
        base: W0, ``[out, in]``; a constant. Of a fused projection give the rows that count.
        A: ``[r, in]``, or several of these (ranks may differ).
        B: ``[out, r]``, as many.
        norm: ``l1`` (sum of absolute entries) or ``fro2`` (sum of squares).
        side: ``input`` (inner products of rows) or ``output`` (of columns, ``W0' B A``).

    Returns:
        A 0-d tensor in at least float32.

    Raises:
        UsageError: shapes do not fit, or ``norm`` or ``side`` is unknown.

    Example:
        >>> A, B = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0], [0.0]])
        >>> preserve_loss(torch.eye(2), A, B)  # of the identity: the update's own L1 norm
        tensor(9.)
    """
    As, Bs = _factors(A, B, norm, side, tuple(base.shape))
    if side == "output":
        # W0' D = (B' W0)' A, and D' = A' B' has the same form as D: swap the roles.
        base, As, Bs = base.T, [b.T for b in Bs], [a.T for a in As]
    with torch.autocast(base.device.type, enabled=False):  # the sums overflow half precision
        left = _Times.apply(base.detach(), torch.cat(As).T)
        lefts = left.split([a.shape[0] for a in As], dim=1)  # pyright: ignore[reportOptionalMemberAccess]
        return _norm(lefts, Bs, norm)


def diversify_loss(
    A: Sequence[Tensor], B: Sequence[Tensor], *, norm: Norm = "l1", side: Side = "input"
) -> Tensor:
    """Return ``sum_i<j ||(B_i A_i)(B_j A_j)'||``, differentiable once in A and B.

    Args:
        A: factors ``[r, in]`` (ranks may differ).
        B: factors ``[out, r]``, as many.
        norm: ``l1`` (sum of absolute entries) or ``fro2`` (sum of squares).
        side: ``input`` (inner products of rows) or ``output`` (of columns).

    Returns:
        A 0-d tensor in at least float32; zero with a single module.

    Raises:
        UsageError: shapes do not fit, or ``norm`` or ``side`` is unknown.

    Example:
        >>> A = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 5.0]])]
        >>> B = [torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [3.0]])]
        >>> diversify_loss(A, B)
        tensor(6.)
    """
    As, Bs = _factors(A, B, norm, side, None)
    if side == "output":
        As, Bs = [b.T for b in Bs], [a.T for a in As]
    pairs = list(combinations(range(len(As)), 2))
    if not pairs:
        return As[0].new_zeros(())
    with torch.autocast(As[0].device.type, enabled=False):
        lefts = [Bs[i] @ (As[i] @ As[j].T) for i, j in pairs]
        return _norm(lefts, [Bs[j] for _, j in pairs], norm)


@final
class PEGO(Regularizer):
    """Keep LoRA adapters orthogonal to the frozen weights and to each other.

    The penalty depends on parameters only, so its gradient is added once an optimiser step: the same
    under accumulation, AMP, DDP and FSDP2 (which gathers the weights of one adapted layer at a time).
    :func:`guywire.lora_group` makes the adapters.

    Args:
        strength: a number, or a schedule ``step -> number``. It multiplies plain sums, which grow
            with the width of the layers: 1e-3 is the paper's at width 768.
        side: ``input`` (rows orthogonal) or ``output`` (columns).
        norm: ``l1``, or ``fro2`` for squares.
        preserve: weight of the first term beside the second; 0 leaves it out.
        diversify: weight of the second term; 0 leaves it out.
        adapters: PEFT's names of the group; all adapters of the model if ``None``.
        normalise: scale each sum as if its matrix had 768 x 768 entries, so that one strength serves
            other widths.

    Raises:
        SelectionError: at attach, if the model has no such adapters.
        UsageError: at attach, if a value makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
        >>> model = gw.lora_group(model, n=2, r=2, target_modules=["0"])
        >>> optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        >>> with gw.attach(model, optimizer, gw.PEGO(1e-3)) as wires:
        ...     model(torch.ones(3, 6)).square().mean().backward()
        ...     optimizer.step()
        ...     bool(wires.penalty() > 0)
        True
    """

    slug: ClassVar[str] = "pego"
    title: ClassVar[str] = (
        "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization "
        "for Domain Generalization"
    )
    arxiv: ClassVar[str] = "2407.15085"
    place: ClassVar[str] = "step"
    memory: ClassVar[str] = "0"
    passes: ClassVar[str] = "0"

    def __init__(
        self,
        strength: Strength = 1e-3,
        *,
        side: Side = "input",
        norm: Norm = "l1",
        preserve: float = 1.0,
        diversify: float = 1.0,
        adapters: Sequence[str] | None = None,
        normalise: bool = False,
    ) -> None:
        self.strength = strength
        self.side: Side = side
        self.norm: Norm = norm
        self.preserve = preserve
        self.diversify = diversify
        self.adapters = adapters
        self.normalise = normalise
        self._groups: list[list[Site]] = []
        self._number = 0

    def setup(self, model: nn.Module) -> None:
        """Find the adapters of each layer.

        Args:
            model: the user's module.

        Raises:
            SelectionError: there are none, or a base weight is no plain matrix.
            UsageError: a value makes no sense.
        """
        _check_kind(self.norm, self.side)
        strength_at(self.strength, 0)
        for name, value in (("preserve", self.preserve), ("diversify", self.diversify)):
            if not 0.0 <= value < float("inf"):
                raise UsageError(f"{name} is {value}: it must be a finite number of at least 0")
        groups: dict[int, list[Site]] = {}
        for site in sites(model, self.adapters):
            shape = (site.B.shape[0], site.A.shape[1])
            if tuple(site.base.shape) != shape or not site.base.is_floating_point():
                raise SelectionError(
                    f"the weight of {site.name!r} is stored as {site.base.dtype} of shape "
                    f"{tuple(site.base.shape)}, not as a plain matrix {shape}: PEGO multiplies with "
                    "it, so load the model without quantisation"
                )
            if site.adapter in getattr(site.layer, "lora_variant", {}):
                raise SelectionError(
                    f"the adapter {site.adapter!r} of {site.name!r} is a variant of LoRA (DoRA, say) "
                    "whose update is not B A: make the adapters with lora_group"
                )
            groups.setdefault(id(site.layer), []).append(site)
        self._groups = list(groups.values())

    def before_step(self, step: Step) -> None:
        """Add the gradient of the penalty to that of the factors.

        Args:
            step: the step that is about to happen.
        """
        self._number = step.number
        strength = strength_at(self.strength, step.number)
        if step.skipped or strength == 0.0:
            return
        for group in self._groups:
            params = [p for site in group for p in (site.A, site.B)]
            held = [p.requires_grad and step.owns(p) for p in params]
            if not any(held):
                continue
            values = [_whole(p).requires_grad_(own) for p, own in zip(params, held, strict=True)]
            with torch.enable_grad():
                value = self._value(group, values[::2], values[1::2])
            if not value.requires_grad:  # a single adapter, and only the second term
                continue
            wanted = [v for v in values if v.requires_grad]
            pulls = iter(torch.autograd.grad(value, wanted, materialize_grads=True))
            for p, own in zip(params, held, strict=True):
                if not own:
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                pull = tensors.local(tensors.place_like(next(pulls), p))
                tensors.local(p.grad).add_(pull, alpha=strength * step.scale)

    def penalty(self) -> Tensor | None:
        """Return ``strength * (preserve + diversify)`` over all adapted layers.

        Returns:
            A 0-d tensor, or ``None`` before attach.
        """
        if not self._groups:
            return None
        strength = strength_at(self.strength, self._number)
        with torch.no_grad():
            parts = [
                self._value(g, [_whole(s.A) for s in g], [_whole(s.B) for s in g])
                for g in self._groups
            ]
            return strength * torch.stack([p.to(parts[0]) for p in parts]).sum()

    def teardown(self) -> None:
        """Let go of the model."""
        self._groups = []

    def _value(self, group: Sequence[Site], A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
        scaled = [b if s.scaling == 1.0 else s.scaling * b for s, b in zip(group, B, strict=True)]
        out_width, in_width = B[0].shape[0], A[0].shape[1]
        total = A[0].new_zeros((), dtype=torch.promote_types(A[0].dtype, torch.float32))
        if self.preserve:
            base = _whole(group[0].base)
            term = preserve_loss(base, A, scaled, norm=self.norm, side=self.side)
            total = total + self.preserve * term
        if self.diversify and len(group) > 1:
            term = diversify_loss(A, scaled, norm=self.norm, side=self.side)
            total = total + self.diversify * term
        if self.normalise:
            total = total * (_WIDTH / (out_width if self.side == "input" else in_width)) ** 2
        return total


class _Times(torch.autograd.Function):
    """``constant @ x`` for a wide constant, of which only some rows are ever converted to x's type."""

    @staticmethod
    def forward(ctx: Any, constant: Tensor, x: Tensor) -> Tensor:
        ctx.constant = constant
        return torch.cat([rows.to(x.dtype) @ x for rows in constant.split(_ROWS)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (grad,) = grads
        parts = zip(ctx.constant.split(_ROWS), grad.split(_ROWS), strict=True)
        total = torch.zeros(
            (ctx.constant.shape[1], grad.shape[1]), dtype=grad.dtype, device=grad.device
        )
        for rows, part in parts:
            total.addmm_(rows.to(grad.dtype).T, part)
        return None, total


class _AbsoluteSum(torch.autograd.Function):
    """``sum |left_i @ right_i'|`` of stacked thin matrices, some rows of the products at a time.

    With S = sign(left right') the gradients are ``S right`` and ``S' left``, and the value is the inner
    product of the first with ``left``: one pass gives all three, and backward only multiplies.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        to_left, to_right = torch.empty_like(left), torch.zeros_like(right)
        for rows, out in _pieces(left, to_left):
            signs = (rows @ right.mT).sign_()
            out.copy_(signs @ right)
            to_right.baddbmm_(signs.mT, rows)
        ctx.save_for_backward(to_left, to_right)
        return (left * to_left).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        to_left, to_right = ctx.saved_tensors
        return grads[0] * to_left, grads[0] * to_right


def _pieces(left: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut ``[n, rows, k]`` into pieces of some rows in all."""
    rows = max(1, _ROWS // left.shape[0])
    return zip(*(t.split(rows, dim=1) for t in (left, *more)), strict=True)


def _norm(lefts: Sequence[Tensor], rights: Sequence[Tensor], norm: Norm) -> Tensor:
    """Return the sum of the norms of ``left_i @ right_i'``."""
    left, right = _stacked(lefts), _stacked(rights)
    if norm == "fro2":
        return ((left.mT @ left) * (right.mT @ right)).sum()
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        return _AbsoluteSum.apply(left, right)  # pyright: ignore[reportReturnType]
    return torch.stack([(rows @ right.mT).abs_().sum() for (rows,) in _pieces(left)]).sum()


def _stacked(thin: Sequence[Tensor]) -> Tensor:
    """Stack matrices of one height; columns of zeros, which change no product, fill up the rank."""
    widest = max(t.shape[1] for t in thin)
    return torch.stack([nn.functional.pad(t, (0, widest - t.shape[1])) for t in thin])


def _factors(
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    norm: str,
    side: str,
    shape: tuple[int, ...] | None,
) -> tuple[list[Tensor], list[Tensor]]:
    _check_kind(norm, side)
    As = [A] if isinstance(A, Tensor) else list(A)
    Bs = [B] if isinstance(B, Tensor) else list(B)
    if not As or len(As) != len(Bs):
        raise UsageError(f"there are {len(As)} factors A and {len(Bs)} factors B: give one of each")
    shape = shape or (Bs[0].shape[0], As[0].shape[-1])
    for a, b in zip(As, Bs, strict=True):
        if a.dim() != 2 or b.shape != (shape[0], a.shape[0]) or a.shape[1] != shape[1]:
            raise UsageError(
                f"factors of shapes A {tuple(a.shape)} and B {tuple(b.shape)} make no update of "
                f"shape {shape}: A is [r, in], B is [out, r]"
            )
    dtype = torch.promote_types(As[0].dtype, torch.float32)
    return [a.to(dtype) for a in As], [b.to(dtype) for b in Bs]


def _check_kind(norm: str, side: str) -> None:
    if norm not in ("l1", "fro2"):
        raise UsageError(f"norm={norm!r} is neither 'l1' nor 'fro2'")
    if side not in ("input", "output"):
        raise UsageError(f"side={side!r} is neither 'input' nor 'output'")


def _whole(tensor: Tensor) -> Tensor:
    """Return a detached tensor of the whole shape; under FSDP2 this communicates."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
