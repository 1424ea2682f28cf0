"""The forward pass of ``nn.MultiheadAttention`` through projections that can be listened to.

The original hands its weights to one function, so that no layer sees the projections; this computes
the same with ``project`` for the input projections and the module ``out_proj`` for the output's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.curvature._layers import Build, Call, linear
from guywire.curvature._pieces import Direct, Piece

__all__ = ["Attention", "is_attention", "projection_rule", "repeat_rule"]

Project = Callable[[Tensor, str, tuple[int, int] | None, tuple[int, int]], Tensor]
Repeat = Callable[[str, int], Tensor]


class Attention:
    """A stand-in for the ``forward`` of one ``nn.MultiheadAttention``.

    Args:
        module: the attention.
        project: (input, name of the weight, its rows or ``None`` for all, rows of ``in_proj_bias``)
            to the projection.
        repeat: (``bias_k`` or ``bias_v``, batch size) to ``[1, batch, E]``.
    """

    def __init__(self, module: nn.MultiheadAttention, project: Project, repeat: Repeat) -> None:
        self.module, self.project, self.repeat = module, project, repeat

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as the module's own forward pass in eval mode does."""
        m = self.module
        batched = query.dim() == 3
        q, k, v = self._projections(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        elif m.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        t, b, e = q.shape
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal needs attn_mask")  # as the original
        bias = _mask(attn_mask, q.dtype)
        if bias is not None and bias.dim() == 3:
            bias = bias.view(b, m.num_heads, t, -1)
        padding = _mask(key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding.view(b, 1, 1, -1)
            bias = padding if bias is None else bias + padding
        extra = 0
        if m.bias_k is not None:
            k = torch.cat([k, self.repeat("bias_k", b)])
            v = torch.cat([v, self.repeat("bias_v", b)])
            extra += 1
        if m.add_zero_attn:
            k = torch.cat([k, k.new_zeros(1, b, e)])
            v = torch.cat([v, v.new_zeros(1, b, e)])
            extra += 1
        if bias is not None and extra:
            bias = F.pad(bias, (0, extra))
        q, k, v = (x.unflatten(2, (m.num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(2, 3)
            weights = (scores if bias is None else scores + bias).softmax(-1)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, bias)
        out = out.permute(2, 0, 1, 3).flatten(2)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out = out.squeeze(1)
            weights = None if weights is None else weights.squeeze(0)
        elif m.batch_first:
            out = out.transpose(0, 1)
        return m.out_proj(out), weights

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, Any, Any]:
        m, e = self.module, self.module.embed_dim
        if not m._qkv_same_embed_dim:
            return (
                self.project(query, "q_proj_weight", None, (0, e)),
                self.project(key, "k_proj_weight", None, (e, 2 * e)),
                self.project(value, "v_proj_weight", None, (2 * e, 3 * e)),
            )
        if query is key and key is value:
            whole = (0, 3 * e)
            q, k, v = self.project(query, "in_proj_weight", whole, whole).chunk(3, -1)
            return q, k, v
        if key is value:
            rows = (e, 3 * e)
            k, v = self.project(key, "in_proj_weight", rows, rows).chunk(2, -1)
            return self.project(query, "in_proj_weight", (0, e), (0, e)), k, v
        return (
            self.project(query, "in_proj_weight", (0, e), (0, e)),
            self.project(key, "in_proj_weight", (e, 2 * e), (e, 2 * e)),
            self.project(value, "in_proj_weight", (2 * e, 3 * e), (2 * e, 3 * e)),
        )


def is_attention(module: nn.Module) -> bool:
    """Say whether a module is an attention that `Attention` can stand in for."""
    kind = nn.MultiheadAttention
    return isinstance(module, kind) and type(module).forward is kind.forward


def projection_rule(shape: torch.Size, call: Call) -> Build:
    """The rule for a projection by some rows of a weight, of this shape."""

    def build(g: Tensor) -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        x = call.x
        if "weight" in call.wanted:
            pieces["weight"] = linear(x, g, call.split, shape, call.dtype)
        if "bias" in call.wanted:
            pieces["bias"] = Direct(call.split(g).flatten(1, -2).sum(1), call.dtype)
        return pieces

    return build


def repeat_rule(shape: torch.Size, call: Call) -> Build:
    """The rule for a parameter of this shape that every sample gets a copy of."""

    def build(g: Tensor) -> dict[str, Piece]:
        return {"p": Direct(call.split(g).flatten(1, -2).sum(1).unflatten(1, shape), call.dtype)}

    return build


def _mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
