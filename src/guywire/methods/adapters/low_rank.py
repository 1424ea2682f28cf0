"""Linear layers as two thin ones: factorise a pretrained model by SVD, and fold it back.

``W [out, in]`` with singular value decomposition ``U S V^T`` becomes ``W2 W1`` of rank r,

    W1 = S_r^1/2 V_r^T  [r, in],  without bias,      W2 = U_r S_r^1/2  [out, r],  with W's bias,
    r = floor(in out / (ratio (in + out))),

so the pair has one ratio-th of W's weights and multiplications. A layer ``fc1`` becomes a
:class:`LowRank` with the parameters ``fc1.0.weight``, ``fc1.1.weight`` and ``fc1.1.bias``.

Source: Guo, Wang, Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank
Approximation", arXiv 2310.10700.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guywire.core import selection
from guywire.core.errors import AttachError, SelectionError, UsageError

__all__ = ["KEPT", "LowRank", "dense_weight", "factorize", "fold_factors", "rank_of", "svd_factors"]

Init = Literal["svd", "random", "shape"]

KEPT = (
    "head", "*_head", "classifier", "score", "cls", "pooler", "*norm*", "*embed*", "downsample",
    "*_projection",
)  # fmt: skip
"""Names, or parts of dotted names, of layers that stay as they are: heads and what embeds."""


def rank_of(out_features: int, in_features: int, ratio: float) -> int:
    """Return the rank at which a pair of factors has one ratio-th of the weights, rounded down.

    Args:
        out_features: outputs.
        in_features: inputs.
        ratio: how many times fewer weights.

    Returns:
        The rank; 0 for a layer that is too small.

    Raises:
        UsageError: the ratio is not above 0.

    Example:
        >>> [rank_of(768, 768, c) for c in (1.5, 2, 3)], rank_of(768, 3072, 2)
        ([256, 192, 128], 307)
    """
    if not 0.0 < ratio < math.inf:
        raise UsageError(f"ratio is {ratio}: say how many times fewer weights, such as 2.0")
    return math.floor(in_features * out_features / (ratio * (in_features + out_features)) + 1e-9)


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the balanced factors of the best approximation of some rank.

    Args:
        weight: ``[out, in]``.
        rank: at least 1; more than there is gives all there is.

    Returns:
        ``W1 [r, in]`` and ``W2 [out, r]``, with ``W1 W1^T = W2^T W2 = S_r``.

    Example:
        >>> first, second = svd_factors(torch.diag(torch.tensor([4.0, 1.0])), 1)
        >>> second @ first
        tensor([[4., 0.],
                [0., 0.]])
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    root = s[:rank].sqrt()
    first, second = root[:, None] * vt[:rank], u[:, :rank] * root
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


class LowRank(nn.Sequential):
    """Two thin linear layers in place of a wide one: ``y = W2 W1 x + b``.

    Code that reads the ``weight`` of the layer that was here (T5, ``nn.TransformerEncoderLayer``)
    finds the product, which is multiplied out only where a function needs it.

    Args:
        first: ``W1``, without bias.
        second: ``W2``, with the layer's bias.
        conv1d: whether the layer was GPT-2's ``Conv1D``, for folding.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear, *, conv1d: bool = False) -> None:
        super().__init__(first, second)
        self.conv1d = conv1d

    @property
    def first(self) -> nn.Linear:
        """The layer from inputs to the rank."""
        return self[0]  # pyright: ignore[reportReturnType]

    @property
    def second(self) -> nn.Linear:
        """The layer from the rank to outputs."""
        return self[1]  # pyright: ignore[reportReturnType]

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.first.in_features

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.second.out_features

    @property
    def weight(self) -> _Product:
        """The product ``W2 W1``, transposed for what was a ``Conv1D``; made when it is used."""
        return _Product(self.first.weight, self.second.weight, turned=self.conv1d)

    @property
    def bias(self) -> Tensor | None:
        """The second layer's bias."""
        return self.second.bias


class _Product:
    """``W2 W1`` as whoever asks for a layer's weight sees it."""

    def __init__(self, first: Tensor, second: Tensor, *, turned: bool) -> None:
        self.first, self.second, self.turned = first, second, turned
        self.dtype, self.device = second.dtype, second.device
        shape = (second.shape[0], first.shape[1])
        self.shape = torch.Size(shape[::-1] if turned else shape)

    def dense(self) -> Tensor:
        """Return the product, with a graph."""
        product = self.second @ self.first
        return product.T if self.turned else product

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply out for any function of torch."""
        plain = [a.dense() if isinstance(a, cls) else a for a in args]
        more = {k: v.dense() if isinstance(v, cls) else v for k, v in (kwargs or {}).items()}
        return function(*plain, **more)


def factorize(
    model: nn.Module,
    ratio: float = 2.0,
    *,
    exclude: Sequence[str] = KEPT,
    init: Init = "svd",
    rank: int | None = None,
    min_out_features: int = 10,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a model with its linear layers factorised.

    ``nn.Linear`` and GPT-2's ``Conv1D`` are replaced; subclasses of them, weights that are tied to
    others and parts of ``nn.MultiheadAttention`` (which reads weights itself) stay. The model that
    was given is left alone, and everything that is not replaced is copied bit for bit.

    To load a factorised model again, factorise the architecture with ``init="shape"`` and the same
    arguments, then ``load_state_dict``.

    Args:
        model: a plain model, such as one of ``transformers``.
        ratio: how many times fewer weights a layer gets.
        exclude: globs; a layer whose name, or a dotted part of it, matches stays. The default keeps
            heads, poolers, embeddings and projections between towers.
        init: ``"svd"`` of the weights, ``"random"`` factors of about a linear layer's scale, or
            ``"shape"``: zeros, to be loaded.
        rank: the same in all layers, in place of the ratio's; cut to what a layer has.
        min_out_features: layers with fewer outputs are taken for heads and stay.
        seed: of random factors.

    Returns:
        The copy.

    Raises:
        AttachError: the model is sharded, or cannot be copied.
        SelectionError: no layer can be factorised.
        UsageError: an argument makes no sense.

    Example:
        >>> model = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 3))
        >>> small = factorize(model, 2.0)
        >>> [tuple(p.shape) for p in small.parameters()]
        [(12, 60), (40, 12), (40,), (3, 40), (3,)]
    """
    if init not in ("svd", "random", "shape"):
        raise UsageError(f"init={init!r} is none of 'svd', 'random', 'shape'")
    if rank is not None and rank < 1:
        raise UsageError(f"rank is {rank}: it must be at least 1")
    rank_of(1, 1, ratio)
    small = _copied(model)
    chosen = _eligible(small, exclude, min_out_features)
    generator = torch.Generator().manual_seed(seed)
    replaced = 0
    for name, module in chosen.items():
        out, into = _sizes(module)
        r = rank_of(out, into, ratio) if rank is None else min(rank, out, into)
        if r < 1:
            continue
        _put(small, name, _pair(module, r, init, generator))
        replaced += 1
    if not replaced:
        raise SelectionError(
            f"{type(model).__name__} has no linear layer to factorise at ratio {ratio:g}: those "
            f"that exclude={list(exclude)} names, tied and small ones stay"
        )
    return small


def fold_factors(model: nn.Module) -> nn.Module:
    """Return a copy in which every pair of factors is one dense layer again.

    The names are those of the original architecture; folding gives up what factorising saved, so
    it is for checking, or for code that wants the plain architecture.

    Args:
        model: from :func:`factorize`.

    Returns:
        The copy.

    Raises:
        SelectionError: there is nothing to fold.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 30))
        >>> dense = fold_factors(factorize(model, rank=30))
        >>> bool(torch.allclose(dense[0].weight, model[0].weight, atol=1e-6))
        True
    """
    dense = _copied(model)
    pairs = {name: m for name, m in dense.named_modules() if isinstance(m, LowRank)}
    if not pairs:
        raise SelectionError(f"{type(model).__name__} has no factorised layers: nothing to fold")
    for name, pair in pairs.items():
        _put(dense, name, _folded(pair))
    return dense


def dense_weight(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as ``[out, in]``, whichever way round it keeps it.

    Args:
        module: ``nn.Linear`` or ``Conv1D``.

    Returns:
        The weight, or a transposed view of it.
    """
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    return weight.T if _is_conv1d(module) else weight


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _sizes(module: nn.Module) -> tuple[int, int]:
    out, into = dense_weight(module).shape
    return int(out), int(into)


def _copied(model: nn.Module) -> nn.Module:
    inner = selection.unwrap(model)
    if any(hasattr(p, "device_mesh") for p in inner.parameters()):
        raise AttachError(
            "a sharded model cannot be factorised or folded: do it before fully_shard"
        )
    try:
        return copy.deepcopy(inner)
    except Exception as error:  # whatever a user's __deepcopy__ may raise
        raise AttachError(
            f"the model cannot be copied ({error}): keep no tensor with a graph, and nothing "
            "uncopyable such as a lock, as an attribute of a module"
        ) from error


def _eligible(
    model: nn.Module, exclude: Sequence[str], min_out_features: int
) -> dict[str, nn.Module]:
    """Return the layers to replace, by name."""
    shared: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        shared[id(p)] = shared.get(id(p), 0) + 1
    closed = [
        name for name, m in model.named_modules() if isinstance(m, LowRank | nn.MultiheadAttention)
    ]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or not (type(module) is nn.Linear or _is_conv1d(module)):
            continue
        weight: Any = module.weight
        if not weight.is_floating_point() or shared[id(weight)] > 1:
            continue
        if any(name.startswith(f"{outer}.") for outer in closed):
            continue
        words = [name, *name.split(".")]
        if any(fnmatchcase(word, glob) for word in words for glob in exclude):
            continue
        if _sizes(module)[0] >= min_out_features:
            found[name] = module
    return found


def _pair(module: nn.Module, rank: int, init: Init, generator: torch.Generator) -> LowRank:
    out, into = _sizes(module)
    weight = dense_weight(module)
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if init == "svd":
        one, two = svd_factors(weight, rank)
    elif init == "random":
        # Each factor keeps the scale of what goes through it.
        draws = [torch.randn(s, generator=generator) for s in ((rank, into), (out, rank))]
        one, two = (d.div_(d.shape[1] ** 0.5).to(**options) for d in draws)
    else:
        one, two = torch.zeros(rank, into, **options), torch.zeros(out, rank, **options)
    bias: Tensor | None = module.bias  # pyright: ignore[reportAssignmentType]
    first = nn.utils.skip_init(nn.Linear, into, rank, bias=False, **options)
    second = nn.utils.skip_init(nn.Linear, rank, out, bias=bias is not None, **options)
    flag = weight.requires_grad
    first.weight = nn.Parameter(one, requires_grad=flag)
    second.weight = nn.Parameter(two, requires_grad=flag)
    if bias is not None:
        second.bias = bias
    pair = LowRank(first, second, conv1d=_is_conv1d(module))  # pyright: ignore[reportArgumentType]
    return pair.train(module.training)


def _folded(pair: LowRank) -> nn.Module:
    first, second = pair.first.weight.detach(), pair.second.weight.detach()
    wide = torch.promote_types(second.dtype, torch.float32)
    product = (second.to(wide) @ first.to(wide)).to(second.dtype)
    out, into = product.shape
    if pair.conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):  # its initial values are drawn from the global random state
            layer: Any = Conv1D(out, into)
        product = product.T.contiguous()
    else:
        layer = nn.utils.skip_init(
            nn.Linear, into, out, bias=pair.bias is not None, device=product.device,
            dtype=product.dtype,
        )  # fmt: skip
    layer.weight = nn.Parameter(product, requires_grad=pair.second.weight.requires_grad)
    if pair.bias is not None:
        layer.bias = pair.bias
    return layer.train(pair.training)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
