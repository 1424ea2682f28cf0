"""One small rule per layer type: per-sample weight gradients from inputs and output gradients.

A rule is called in the forward pass with the layer's input, and returns a function from the
gradient of the layer's output to pieces, one for each parameter that is wanted. Tensors come as
``[N, positions, ...]`` out of ``split``, whatever the layout in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core.errors import UsageError
from guywire.curvature._pieces import Direct, Outer, Piece, Scatter

__all__ = ["Build", "Call", "Rule", "linear", "rule_for"]

Build = Callable[[Tensor], dict[str, Piece]]


@dataclass
class Call:
    """One call of a layer.

    Args:
        module: the layer.
        x: its input (expanded, if the layer was shared by all samples).
        output: its output; gone once the rule has been called, so that it is not kept alive.
        wanted: local names of parameters.
        split: of input and output into ``[N, positions, ...]``.
        dtype: of the sums.
    """

    module: Any
    x: Tensor
    output: Tensor
    wanted: frozenset[str]
    split: Callable[[Tensor], Tensor]
    dtype: torch.dtype


Rule = Callable[[Call], Build | None]


def rule_for(module: Any) -> Rule | None:
    """Return the rule for a layer, or ``None`` if there is none for its type.

    A subclass that overrides the forward pass is another type.

    Args:
        module: the layer.

    Returns:
        The rule.

    Raises:
        UsageError: the layer mixes the samples of a batch, so that per-sample gradients do not
            exist.
    """
    for kind, rule in _RULES:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if isinstance(module, nn.modules.conv._ConvNd) and (
                type(module)._conv_forward is not kind._conv_forward
            ):
                return None
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise UsageError(
                    f"{module} has no running statistics and mixes the samples of a batch: "
                    "per-sample gradients need track_running_stats=True"
                )
            if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
                return None
            return rule
    name, home = type(module).__name__, type(module).__module__
    own = set(module._parameters)
    if name == "Conv1D" and home.startswith("transformers."):
        return _hf_conv1d
    if name.endswith(("RMSNorm", "T5LayerNorm")) and own == {"weight"} and _epsilon(module):
        return _named_rms_norm
    return None


def linear(
    x: Tensor, g: Tensor, split: Callable[[Tensor], Tensor], shape: torch.Size, dtype: torch.dtype
) -> Outer:
    """Return the gradient of W in ``y = x W^T``.

    Args:
        x: ``[..., K]``.
        g: gradient of y, ``[..., M]``.
        split: into samples.
        shape: of W, ``[M, K]``.
        dtype: of the sums.

    Returns:
        The piece.
    """
    left = split(g).flatten(1, -2).transpose(1, 2).unsqueeze(1)
    right = split(x).flatten(1, -2).transpose(1, 2).unsqueeze(1)
    return Outer(left, lambda lo, hi: right[lo:hi], shape, dtype)


def _linear(call: Call) -> Build | None:
    x, shape = call.x, call.module.weight.shape
    if x.dim() < 2:
        x = x[None]

    def build(g: Tensor) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        if g.dim() < 2:
            g = g[None]
        if "weight" in call.wanted:
            pieces["weight"] = linear(x, g, call.split, shape, call.dtype)
        if "bias" in call.wanted:
            pieces["bias"] = Direct(call.split(g).flatten(1, -2).sum(1), call.dtype)
        return pieces

    return build


def _hf_conv1d(call: Call) -> Build | None:
    # y = x W + b with W [in, out]: the roles of input and gradient are exchanged.
    x, shape = call.x, call.module.weight.shape

    def build(g: Tensor) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        if "weight" in call.wanted:
            pieces["weight"] = linear(g, x, call.split, shape, call.dtype)
        if "bias" in call.wanted:
            pieces["bias"] = Direct(call.split(g).flatten(1, -2).sum(1), call.dtype)
        return pieces

    return build


def _conv(call: Call) -> Build | None:
    conv = call.module
    spatial = len(conv.kernel_size)
    if call.output.dim() != spatial + 2:
        return None
    x, weight, groups = call.x, conv.weight, conv.groups

    def build(g: Tensor) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        g = call.split(g)
        k = g.shape[1]
        if "bias" in call.wanted:
            pieces["bias"] = Direct(g.flatten(3).sum(3).sum(1), call.dtype)
        if "weight" in call.wanted:
            xs, out = call.split(x), g.shape[3:]
            # [n, k, C, *S] -> [n, G, C / G, k * positions]
            left = g.unflatten(2, (groups, -1)).flatten(4)
            left = left[:, 0] if k == 1 else left.permute(0, 2, 3, 1, 4).flatten(3)

            def right(lo: int, hi: int) -> Tensor:
                part = _windows(conv, xs[lo:hi].flatten(0, 1), out)
                part = part.view(hi - lo, k, groups, -1, part.shape[-1])
                return part[:, 0] if k == 1 else part.permute(0, 2, 3, 1, 4).flatten(3)

            pieces["weight"] = Outer(left, right, weight.shape, call.dtype)
        return pieces

    return build


def _windows(conv: Any, x: Tensor, out: torch.Size) -> Tensor:
    """Return the inputs that each output position sees, ``[B, C * kernel, positions]``."""
    spatial = len(conv.kernel_size)
    if conv.padding_mode != "zeros" or conv.padding == "same":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    elif conv.padding != "valid" and any(conv.padding):
        x = F.pad(x, [p for one in reversed(conv.padding) for p in (one, one)])
    for d in range(spatial):
        dilation, kernel = conv.dilation[d], conv.kernel_size[d]
        x = x.unfold(2 + d, dilation * (kernel - 1) + 1, conv.stride[d])[..., ::dilation]
    order = [0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial)]
    return x.permute(order).reshape(x.shape[0], -1, out.numel())


def _embedding(call: Call) -> Build | None:
    emb = call.module
    ids, shape, padding = call.x, emb.weight.shape, emb.padding_idx

    def build(g: Tensor) -> dict[str, Piece]:
        flat = call.split(ids).flatten(1) if ids.dim() else ids.view(1, 1)
        if padding is not None:
            flat = flat.masked_fill(flat == padding, -1)
        values = call.split(g) if ids.dim() else g.view(1, 1, -1)
        values = values.reshape(*flat.shape, shape[1])
        return {"weight": Scatter(flat, values, shape, call.dtype)}

    return build


def _normed(call: Call, normed: Callable[[Tensor], Tensor], keep: int) -> Build:
    """Build for ``y = weight * normed(x) + bias``.

    ``keep`` is the number of last dimensions of the parameter (layer norms), or -1 for channels in
    dimension 1 of the layer's input.
    """
    x = call.x

    def reduce(t: Tensor) -> Tensor:
        t = call.split(t)
        if keep < 0:
            return t.flatten(3).sum(3).sum(1) if t.dim() > 3 else t.sum(1)
        return t.flatten(1, t.dim() - keep - 1).sum(1)

    def build(g: Tensor) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        g = g.to(call.dtype)
        if "weight" in call.wanted:
            pieces["weight"] = Direct(reduce(normed(x.detach().to(call.dtype)) * g), call.dtype)
        if "bias" in call.wanted:
            pieces["bias"] = Direct(reduce(g), call.dtype)
        return pieces

    return build


def _layer_norm(call: Call) -> Build | None:
    m = call.module
    shape = m.normalized_shape
    return _normed(call, lambda x: F.layer_norm(x, shape, None, None, m.eps), len(shape))


def _group_norm(call: Call) -> Build | None:
    m = call.module
    return _normed(call, lambda x: F.group_norm(x, m.num_groups, None, None, m.eps), -1)


def _rms_norm(call: Call) -> Build | None:
    m = call.module
    # Without an epsilon of its own, the layer takes that of its input's type.
    eps = torch.finfo(call.x.dtype).eps if m.eps is None else m.eps
    shape = list(m.normalized_shape)
    return _normed(call, lambda x: F.rms_norm(x, shape, None, eps), len(shape))


def _named_rms_norm(call: Call) -> Build | None:
    # Hugging Face has an RMS norm for each architecture; the numbers say whether this is one.
    m, eps = call.module, _epsilon(call.module)
    width = [m.weight.numel()]

    def normed(x: Tensor) -> Tensor:
        return F.rms_norm(x, width, None, eps)

    expected = (normed(call.x.detach().to(call.dtype)) * m.weight.detach()).to(call.output.dtype)
    rough = 1e-4 if call.output.dtype in (torch.float32, torch.float64) else 3e-2
    if call.x.shape[-1:] != m.weight.shape or not torch.allclose(
        expected, call.output.detach(), rtol=rough, atol=rough * 1e-2, equal_nan=True
    ):
        return None
    return _normed(call, normed, 1)


def _batch_norm(call: Call) -> Build | None:
    m = call.module
    if call.output.dim() < 2:
        return None
    shape = [1, -1, *[1] * (call.output.dim() - 2)]

    def normed(x: Tensor) -> Tensor:
        scale = (m.running_var.to(call.dtype) + m.eps).rsqrt()
        return (x - m.running_mean.to(call.dtype).view(shape)).mul_(scale.view(shape))

    return _normed(call, normed, -1)


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


_RULES: list[tuple[Any, Rule]] = [
    (nn.Linear, _linear),
    (nn.Conv1d, _conv),
    (nn.Conv2d, _conv),
    (nn.Conv3d, _conv),
    (nn.Embedding, _embedding),
    (nn.LayerNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.BatchNorm1d, _batch_norm),
    (nn.BatchNorm2d, _batch_norm),
    (nn.BatchNorm3d, _batch_norm),
]
if hasattr(nn, "RMSNorm"):
    _RULES.append((nn.RMSNorm, _rms_norm))
