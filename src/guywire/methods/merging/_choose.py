"""Choose DAREx-q's q for each layer while streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from guywire.methods.merging._editor import Editor, Inputs, Piece
from guywire.methods.merging._names import hit
from guywire.methods.merging.masks import BLOCK
from guywire.methods.merging.matching import Item, Part
from guywire.methods.merging.rescale import output_energy, q_of_energy

Map = Callable[
    [Callable[[Piece], tuple[float, float]], Sequence[Piece]], Iterable[tuple[float, float]]
]

# Their rows are looked up, not multiplied: they have no inputs to weigh changes with.
_LOOKED_UP = (
    "*embed*",
    "*wte.weight",
    "*wpe.weight",
    "*shared.weight",
    "*relative_attention_bias*",
)
TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose linear layers keep their weights as ``[in, out]``."""


def choose_qs(
    editor: Editor, items: Sequence[Item], run: Map, *, model_type: str | None
) -> dict[tuple[int, str], float]:
    """Return q for every model and pruned tensor, by :func:`~guywire.methods.merging.q_star`.

    Without calibration inputs every input feature counts as 1. Biases get their weight's q, other
    tensors the mean over layers.

    Args:
        editor: of the merge, with inputs if there are any.
        items: all tensors.
        run: maps a function over pieces, in order.
        model_type: as the configuration says it.

    Returns:
        (model, base name) to q; empty if no layer decides.
    """
    by_name = {item.base.name: item for item in items if item.base is not None}
    found: dict[tuple[int, str], float] = {}
    for name, item in by_name.items():
        if not item.pruned or len(item.shape) != 2 or item.common != item.numel or not item.numel:
            continue
        for part in item.parts:
            seen = _inputs_of(editor, part, item, model_type)
            if seen is None:
                continue
            bias = by_name.get(name.removesuffix("weight") + "bias") if name != "bias" else None
            found[part.model, name] = _q(editor, item, part, seen, bias, run)
            if bias is not None:
                found[part.model, bias.base.name if bias.base else bias.name] = found[
                    part.model, name
                ]
    out = dict(found)
    for model in range(editor.models):
        layers = [q for (i, n), q in found.items() if i == model and by_name[n].shape[1:]]
        if layers:
            mean = sum(layers) / len(layers)
            for name, item in by_name.items():
                if item.pruned:
                    out.setdefault((model, name), mean)
    return out


def _inputs_of(editor: Editor, part: Part, item: Item, model_type: str | None) -> Inputs | None:
    assert item.base is not None
    if editor.inputs:
        seen = editor.inputs.get((part.model, item.base.name))
        return seen if seen is not None and seen.turned(item.shape) is not None else None
    if hit(item.base.name, _LOOKED_UP):
        return None
    turned = model_type in TRANSPOSED
    ones = torch.ones(1, item.shape[0 if turned else 1])
    return Inputs(ones, ones[0], turned, ones=True)


def _q(editor: Editor, item: Item, part: Part, seen: Inputs, bias: Item | None, run: Map) -> float:
    shift = _shift(editor, bias, part.model, item.shape[1 if seen.turned(item.shape) else 0])
    if seen.turned(item.shape):
        delta = editor.change(item, part, 0, item.numel).view(item.shape).T
        return q_of_energy(*output_energy(delta, seen.rows, shift), editor.rate)
    width = item.shape[1]
    step = max(1, BLOCK // width) * width
    pieces = [(at, min(at + step, item.numel)) for at in range(0, item.numel, step)]

    def energy(piece: Piece) -> tuple[float, float]:
        delta = editor.change(item, part, *piece).view(-1, width)
        rows = slice(piece[0] // width, piece[1] // width)
        if seen.ones and shift is None:
            return float(delta.square().sum()), float(delta.sum(1).square().sum())
        return output_energy(delta, seen.rows, None if shift is None else shift[rows])

    sums = list(run(energy, pieces))
    return q_of_energy(sum(s for s, _ in sums), sum(s for _, s in sums), editor.rate)


def _shift(editor: Editor, bias: Item | None, model: int, width: int) -> Tensor | None:
    """The change of a layer's bias, if there is one."""
    if bias is None or not bias.pruned or bias.numel != width or bias.common != width:
        return None
    part = next((p for p in bias.parts if p.model == model), None)
    return None if part is None else editor.change(bias, part, 0, width)
