"""The pieces of a transformer that half fine-tuning chooses among: matrices and norms, by layer.

A piece is a matrix with its bias, or a norm. Some pieces are only a block of a parameter: the
query, key or value part of a fused projection, one expert of a stacked tensor. Such a part is named
as Python would index it, ``h.0.attn.c_attn.weight[:, 0:768]``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from guywire.core import selection
from guywire.core.errors import SelectionError, UsageError

CATEGORIES = ("attention", "feed-forward", "norm", "always")
Index = tuple[slice | int, ...]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"(?:mlp|ffn?|feed_?forward|densereludense|experts?|moe|block_sparse_moe)(?:_\w+)?",
    re.IGNORECASE,
)
# Words that decide only where no part of the name speaks of attention.
_WEAK = re.compile(
    r"intermediate|output|fc_?[12]|c_fc|lin(?:ear)?_?[123]|w[123io]|wi_[01]|(?:up|gate|down)_proj"
)
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)", re.IGNORECASE)
_ROUTER = re.compile(r"gate|router|shared_expert_gate")
_FUSED = frozenset({"c_attn", "in_proj", "qkv", "qkv_proj", "Wqkv"})
_PART = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<index>[\d:, ]+)\])?")


@dataclass(frozen=True)
class Piece:
    """One matrix with its bias, or one norm.

    Attributes:
        names: of its parameters, or of parts of them.
        category: ``attention``, ``feed-forward`` or ``norm``.
        layer: name of the transformer layer; empty for the whole model.
        unit: within the layer, what the draw is among: one attention, one expert.
    """

    names: tuple[str, ...]
    category: str
    layer: str
    unit: str

    @property
    def stack(self) -> str:
        """The layer's name without its number: the layers that are balanced against each other."""
        return re.sub(r"\.?\d+$", "", self.layer)


def pieces_of(model: nn.Module, categories: Mapping[str, str] | None = None) -> list[Piece]:
    """Return the pieces of a model, in its order.

    Args:
        model: any module, wrapped or not.
        categories: globs over parameter names to a category, before what names and types say.

    Returns:
        The pieces; what is in none of them is always updated.

    Raises:
        SelectionError: there are no layers, or something in a layer is not recognised.
        UsageError: a category is unknown, or its glob matches nothing.
    """
    inner = selection.unwrap(model)
    params = selection.named_parameters(inner)
    given = _given(params, categories or {})
    modules = {selection.canonical(name): module for name, module in inner.named_modules()}
    # By stem: a matrix's weight and bias are one.
    stems: dict[str, list[str]] = {}
    for name in params:
        stems.setdefault(_stem(name), []).append(name)
    found = {
        stem: next((given[n] for n in names if n in given), None)
        or _recognise(stem, modules, [params[n] for n in names])
        for stem, names in stems.items()
    }
    layers = _layers(found)
    out: list[Piece] = []
    unknown: list[str] = []
    for stem, names in stems.items():
        category, explicit = found[stem], any(n in given for n in names)
        layer = _layer_of(stem, layers, explicit=explicit)
        if layer is None or category == "always":
            continue
        if category is None:
            unknown += names
            continue
        unit = _unit(stem, layer, category)
        parts = [names] if explicit else _parts(stem, names, params, modules, stems)
        for part, suffix in zip(parts, _experts(parts, category), strict=True):
            out.append(Piece(tuple(part), category, layer, unit + suffix))
    if unknown:
        raise SelectionError(
            f"{len(unknown)} parameters of transformer layers are not recognised "
            f"({', '.join(unknown[:6])}{', ...' if len(unknown) > 6 else ''}): say what they are "
            f"with categories={{'*.{_tail(unknown[0])}': ...}}, one of {', '.join(CATEGORIES)}"
        )
    if not out:
        raise SelectionError(
            f"{type(inner).__name__} has no transformer layers (numbered modules with an attention "
            "and a feed-forward part): name what to halve with categories={'GLOB': 'feed-forward'}; "
            f"not recognised: {', '.join(list(params)[:6])}"
        )
    return out


def parse(name: str) -> tuple[str, Index | None]:
    """Split the name of a part into the parameter's name and the index.

    Args:
        name: of a parameter, or of a part.

    Returns:
        The parameter's name, and the index or ``None`` for all of it.

    Raises:
        UsageError: it is no such name.

    Example:
        >>> parse("c_attn.weight[:, 0:768]")
        ('c_attn.weight', (slice(None, None, None), slice(0, 768, None)))
    """
    match = _PART.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} names neither a parameter nor a part such as 'weight[0:768]'")
    if match["index"] is None:
        return match["name"], None
    index: list[slice | int] = []
    for item in match["index"].split(","):
        ends = [int(end) if end.strip() else None for end in item.split(":")]
        index.append(slice(*ends) if len(ends) > 1 else int(item))
    return match["name"], tuple(index)


def merged(names: Iterable[str], pieces: Iterable[Piece]) -> list[str]:
    """Put parts together: a parameter all of whose parts are named is named as a whole.

    Args:
        names: of parameters and parts.
        pieces: all pieces of the model.

    Returns:
        Names, in the given order.
    """
    parts: dict[str, list[str]] = {}
    for piece in pieces:
        for name in piece.names:
            parts.setdefault(parse(name)[0], []).append(name)
    chosen = set(names)
    out: dict[str, None] = {}
    for name in names:
        whole = parse(name)[0]
        out[whole if chosen.issuperset(parts.get(whole, ())) else name] = None
    return list(out)


def _given(params: Mapping[str, Tensor], categories: Mapping[str, str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for glob, category in categories.items():
        if category not in CATEGORIES:
            raise UsageError(
                f"the category {category!r} for {glob!r} is none of {', '.join(CATEGORIES)}"
            )
        matched = [name for name in params if fnmatchcase(name, glob)]
        if not matched:
            raise UsageError(f"the glob {glob!r} of categories matches no parameter")
        for name in matched:
            out.setdefault(name, category)
    return out


def _stem(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        return owner
    return f"{owner}.{re.sub(r'_(?:weight|bias)$', '', leaf)}".lstrip(".")


def _recognise(
    stem: str, modules: Mapping[str, nn.Module], params: list[nn.Parameter]
) -> str | None:
    module = modules.get(stem)
    if isinstance(module, nn.Embedding):
        return "always"
    *_, last = parts = stem.split(".")
    kind = "" if module is None else type(module).__name__.lower()
    flat = all(p.dim() < 2 for p in params)
    if "norm" in kind or (flat and _NORM.search(last)):
        return "norm"
    if flat:
        return None
    if "router" in kind or _ROUTER.fullmatch(last):
        return "always"
    if last == "query_key_value":
        # Rows of one head after the other, in an order that only the model's code knows.
        return None
    for part in reversed(parts):
        if _FEED_FORWARD.fullmatch(part):
            return "feed-forward"
        if _ATTENTION.search(part):
            return "attention"
    return "feed-forward" if any(_WEAK.fullmatch(part) for part in reversed(parts)) else None


def _numbered(stem: str) -> list[str]:
    """Return the prefixes of a name that end with a number, the longest first."""
    parts = stem.split(".")
    return [".".join(parts[: i + 1]) for i in reversed(range(len(parts))) if parts[i].isdecimal()]


def _layers(found: Mapping[str, str | None]) -> set[str]:
    """Return the smallest numbered modules with both an attention and a feed-forward matrix."""
    inside: dict[str, set[str]] = {}
    for stem, category in found.items():
        for prefix in _numbered(stem):
            inside.setdefault(prefix, set()).add(category or "")
    full = {prefix for prefix, kinds in inside.items() if kinds >= {"attention", "feed-forward"}}
    return {layer for layer in full if not any(other.startswith(f"{layer}.") for other in full)}


def _layer_of(stem: str, layers: set[str], *, explicit: bool) -> str | None:
    prefixes = _numbered(stem)
    for prefix in prefixes:
        if prefix in layers:
            return prefix
    if not explicit:
        return None
    return next((prefix for prefix in prefixes if prefix != stem), prefixes[0] if prefixes else "")


def _unit(stem: str, layer: str, category: str) -> str:
    rest = stem.removeprefix(layer).lstrip(".").split(".")
    if category == "attention":
        for i, part in enumerate(rest):
            if _ATTENTION.search(part):
                return ".".join(rest[: i + 1])
    if category == "feed-forward":
        for i, part in enumerate(rest[:-1]):
            if part == "experts" and rest[i + 1].isdecimal():
                return ".".join(rest[: i + 2])
    return ""


def _experts(parts: list[list[str]], category: str) -> list[str]:
    """Return what tells the experts of a stacked tensor apart, nothing for all else."""
    if category != "feed-forward" or len(parts) < 2:
        return [""] * len(parts)
    index = [parse(part[0])[1] for part in parts]
    return [f"[{i[0]}]" if i is not None and isinstance(i[0], int) else "" for i in index]


def _parts(
    stem: str,
    names: list[str],
    params: Mapping[str, nn.Parameter],
    modules: Mapping[str, nn.Module],
    stems: Mapping[str, list[str]],
) -> list[list[str]]:
    """Split a fused matrix into the pieces that it holds."""
    last = stem.rpartition(".")[2]
    weight = max((params[n] for n in names), key=lambda p: p.dim())
    if weight.dim() == 3 and "experts" in stem.split("."):
        return [[f"{name}[{e}]" for name in names] for e in range(weight.shape[0])]
    if weight.dim() != 2:
        return [names]
    # Conv1D of GPT-2 keeps its matrix the other way round.
    axis = 1 if type(modules.get(stem)).__name__ == "Conv1D" else 0
    size = weight.shape[axis]
    if last == "gate_up_proj" and size % 2 == 0:
        widths = [size // 2] * 2
    elif last in _FUSED:
        widths = _projections(stem, size, params, modules, stems)
    else:
        return [names]
    ends = [sum(widths[:i]) for i in range(len(widths) + 1)]
    return [
        [f"{n}[{':, ' if axis and params[n].dim() == 2 else ''}{a}:{b}]" for n in names]
        for a, b in itertools.pairwise(ends)
    ]


def _projections(
    stem: str,
    size: int,
    params: Mapping[str, nn.Parameter],
    modules: Mapping[str, nn.Module],
    stems: Mapping[str, list[str]],
) -> list[int]:
    """Return the widths of query, key and value in a fused projection."""
    owner = stem.rpartition(".")[0]
    if f"{owner}.q_attn" in stems:  # GPT-2's cross-attention: keys and values only
        return [size // 2] * 2
    for other in stems:
        # With grouped queries they are wider than keys and values: as wide as the output's input.
        if other.rpartition(".")[0] == owner and other.rpartition(".")[2] in (
            "o_proj", "out_proj", "c_proj", "proj"
        ):  # fmt: skip
            weight = next(params[n] for n in stems[other] if params[n].dim() == 2)
            wide = weight.shape[0 if type(modules.get(other)).__name__ == "Conv1D" else 1]
            if 0 < wide < size and (size - wide) % 2 == 0:
                return [wide, (size - wide) // 2, (size - wide) // 2]
    if size % 3:
        raise SelectionError(
            f"{stem!r} has {size} outputs, which are no query, key and value of equal width: "
            f"take it as one matrix with categories={{'{stem}.*': 'attention'}}"
        )
    return [size // 3] * 3


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def counts(total: int, layers: int, ratio: float) -> list[int]:
    """Return how many of a layer's pieces are updated, for as many layers, as even as can be.

    Args:
        total: pieces of one layer.
        layers: how many layers.
        ratio: the updated fraction.

    Returns:
        One number a layer, the larger ones first; odd halves are rounded up.

    Example:
        >>> counts(3, 4, 0.5), counts(3, 3, 0.5), counts(4, 2, 0.5)
        ([2, 2, 1, 1], [2, 2, 1], [2, 2])
    """
    low = math.floor(ratio * total + 1e-9)
    more = math.floor((ratio * total - low) * layers + 0.5 + 1e-9)
    return [low + 1] * more + [low] * (layers - more)
