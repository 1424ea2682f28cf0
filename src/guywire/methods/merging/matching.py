"""Which tensor of the base belongs to which tensor of each fine-tuned model, and what becomes of it.

The result has the tensors of the first fine-tuned model (of the base, if there are adapters only): with
a new head it needs the fine-tuned model's names and configuration to load. Each tensor is one of

- pruned: it is in the base and in the models, holds floats, and is selected;
- merged: the same, but not selected; changes are added without pruning, so that one model alone
  leaves the fine-tuned values as they are;
- kept: a head, or anything else that only the fine-tuned model has; or not a float. It is copied.

Base and fine-tuned model may be saved with and without a prefix (``bert.encoder...`` beside
``encoder...``). Embeddings may have grown or shrunk: common rows are merged, further rows kept.
Everything else that does not match is refused in one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from guywire.core.errors import CheckpointError, DataError, SelectionError
from guywire.methods.merging._names import (
    Names,
    Tuned,
    hit,
    is_head,
    match_names,
    modules_of,
    said,
    table_of,
)
from guywire.methods.merging.files import Checkpoint, Entry
from guywire.methods.merging.lora import Adapter, Factors

__all__ = ["FLOATS", "Item", "Plan", "Tuned", "plan"]

FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types that can be merged."""

# Rows are words or positions: the only tensors that grow without becoming something else.
_VOCABULARY = (
    "*embed*.weight",
    "*wte.weight",
    "*shared.weight",
    "*lm_head.weight",
    "*lm_head.bias",
    "*predictions.decoder.weight",
    "*predictions.decoder.bias",
    "*predictions.bias",
    "*final_logits_bias",
)
# Sums and counts of activations: a rescaled change could make a variance negative.
_STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")


@dataclass(frozen=True)
class Part:
    """What one fine-tuned model gives to a tensor.

    Attributes:
        model: its number, from 0.
        entry: its tensor; ``None`` for LoRA factors.
        factors: its LoRA; ``None`` for tensors.
        owner: the checkpoint that the entry is in.
        adapter: the tensor is one that an adapter saved whole.
    """

    model: int
    entry: Entry | None = None
    factors: Factors | None = None
    owner: Checkpoint | None = None
    adapter: bool = False


@dataclass(frozen=True)
class Item:
    """One tensor of the result.

    Attributes:
        name: in the result.
        dtype: in the result: the base's, or that of the only owner.
        shape: in the result.
        base: the base's tensor, if there is one.
        parts: what models give, in their order; models that do not change it give none.
        pruned: it is edited by the method; else changes are added without pruning.
        mask: the name under which survivors are drawn: the base's, the first of those that are tied.
        common: leading elements that base and models share.
        own: what the result's type, shape and further elements are taken from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Entry | None
    parts: tuple[Part, ...]
    pruned: bool
    mask: str
    common: int
    own: Part

    @property
    def numel(self) -> int:
        """Number of elements."""
        size = 1
        for side in self.shape:
            size *= side
        return size


@dataclass
class Plan:
    """All tensors of the result, by file.

    Attributes:
        files: names of files to their items, in order of their bytes.
        metadata: of each file.
        config: where configuration and tokenizer come from.
        kept: names of tensors that only a fine-tuned model has.
        dropped: names of the base's tensors that the result lacks.
        notes: what people should know, one sentence each.
    """

    files: dict[str, list[Item]]
    metadata: dict[str, str]
    config: Checkpoint
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """All items, in the order of files."""
        return [item for items in self.files.values() for item in items]


def plan(
    base: Checkpoint,
    tuned: Sequence[Tuned],
    *,
    select: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Plan:
    """Decide what becomes of each tensor.

    Args:
        base: the pretrained model.
        tuned: the fine-tuned models and adapters.
        select: globs over names of tensors to prune; all if ``None``.
        exclude: globs over names of tensors not to prune; a tensor whose shapes differ is the first
            fine-tuned model's then.

    Returns:
        The plan.

    Raises:
        DataError: weights are quantised.
        CheckpointError: tensors do not match; the sentence ends in a table of names and shapes.
        SelectionError: nothing is left to prune.
    """
    wanted = None if select is None else tuple(select)
    unwanted = tuple(exclude)
    for checkpoint in (base, *(t for t in tuned if isinstance(t, Checkpoint))):
        _refuse_quantised(checkpoint)
    known = [match_names(base, model) for model in tuned]
    lead = next((n for n in known if isinstance(n.tuned, Checkpoint)), None)
    skeleton = _skeleton(base, known, lead)
    problems: list[tuple[str, str, str]] = []
    made = Plan({}, {}, base if lead is None else _checkpoint(lead.tuned))
    items: list[tuple[str, Item]] = []
    last = base.files[-1].name
    for name, (entry, owner, partner) in skeleton.items():
        before = base.tensors.get(partner) if partner else None
        chosen = (
            before is not None
            and before.dtype in FLOATS
            and (wanted is None or hit(name, wanted) or hit(partner or name, wanted))
            and not hit(name, (*unwanted, *_STATISTICS))
            and not hit(partner or name, unwanted)
        )
        spared = hit(name, unwanted) or hit(partner or name, unwanted)
        item = _item(name, entry, owner, before, known, chosen, spared, problems)
        if before is None:
            made.kept.append(name)
        items.append((before.file.name if before is not None else last, item))
    problems += _left_over(base, known, skeleton, lead, made)
    if problems:
        raise CheckpointError(table_of(problems, len(skeleton)))
    if not any(item.pruned and item.parts for _, item in items):
        raise SelectionError(
            f"nothing is left to prune of {len(items)} tensors: loosen --select and --exclude, or "
            "check that the models were fine-tuned from this base"
        )
    for file in (f.name for f in base.files):
        inside = [item for where, item in items if where == file]
        if inside:
            made.files[file] = inside
    made.metadata = {"format": "pt", **made.config.metadata, **base.metadata}
    _note(made, tuned)
    return made


def _checkpoint(model: Tuned) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else model.checkpoint


def _skeleton(
    base: Checkpoint, known: Sequence[Names], lead: Names | None
) -> dict[str, tuple[Entry, Checkpoint, str | None]]:
    """Names of the result to an entry that gives type and shape, its owner, and the base's name."""
    if lead is not None:
        model = _checkpoint(lead.tuned)
        own = {n: (e, model, lead.to_base.get(n)) for n, e in model.tensors.items()}
        order = {name: i for i, name in enumerate(base.tensors)}
        # In the base's order, so that each of its shards is written from front to back.
        return dict(sorted(own.items(), key=lambda row: order.get(row[1][2] or "", len(order))))
    found: dict[str, tuple[Entry, Checkpoint, str | None]] = {
        name: (entry, base, name) for name, entry in base.tensors.items()
    }
    for names in known:
        assert isinstance(names.tuned, Adapter)
        for name, entry in names.tuned.whole.items():
            if name not in names.to_base:
                found.setdefault(name, (entry, names.tuned.checkpoint, None))
    return found


def _item(
    name: str,
    entry: Entry,
    owner: Checkpoint,
    before: Entry | None,
    known: Sequence[Names],
    chosen: bool,
    spared: bool,
    problems: list[tuple[str, str, str]],
) -> Item:
    own = Part(0, entry, owner=owner)
    keep = Item(name, entry.dtype, entry.shape, None, (), False, name, 0, own)
    if before is None or before.dtype not in FLOATS:
        return keep
    parts, common = [], entry.numel
    for number, names in enumerate(known):
        theirs = names.from_base.get(before.name)
        if theirs is None:
            continue
        part = _part(number, names.tuned, theirs)
        shared = _common(before, part)
        if shared is None and spared:
            return keep
        if shared is None:
            shape = part.entry.shape if part.entry else _factor_shape(part)
            problems.append((theirs, said(before.shape), said(shape)))
            continue
        common = min(common, shared)
        parts.append(part)
    common = min(common, before.numel)
    mask = before.name
    return Item(name, before.dtype, entry.shape, before, tuple(parts), chosen, mask, common, own)


def _part(number: int, model: Tuned, name: str) -> Part:
    if isinstance(model, Checkpoint):
        return Part(number, model.tensors[name], owner=model)
    if name in model.factors:
        return Part(number, factors=model.factors[name])
    return Part(number, model.whole[name], owner=model.checkpoint, adapter=True)


def _common(before: Entry, part: Part) -> int | None:
    """Leading elements that two tensors share, ``None`` if they do not match."""
    if part.factors is not None:
        return before.numel if _fits(before.shape, part.factors) else None
    assert part.entry is not None
    after = part.entry
    if after.dtype not in FLOATS:
        return None
    if after.shape == before.shape:
        return before.numel
    grown = (
        len(after.shape) == len(before.shape) > 0
        and after.shape[1:] == before.shape[1:]
        and hit(before.name, _VOCABULARY)
        and not part.adapter  # the base's configuration would not fit
    )
    return min(after.numel, before.numel) if grown else None


def _fits(shape: tuple[int, ...], factors: Factors) -> bool:
    rows, columns = factors.b.shape[0], factors.a.shape[1]
    if factors.transposed:
        return shape == (columns, rows)
    size = 1
    for side in shape[1:]:
        size *= side
    return len(shape) >= 2 and (shape[0], size) == (rows, columns)


def _factor_shape(part: Part) -> tuple[int, ...]:
    assert part.factors is not None
    shape = (part.factors.b.shape[0], part.factors.a.shape[1])
    return shape[::-1] if part.factors.transposed else shape


def _left_over(
    base: Checkpoint,
    known: Sequence[Names],
    skeleton: Mapping[str, tuple[Entry, Checkpoint, str | None]],
    lead: Names | None,
    made: Plan,
) -> list[tuple[str, str, str]]:
    """Names without a partner: heads may come and go, parts of the body may not."""
    problems = []
    for names in known:
        modules = modules_of(names.to_base)
        for name, shape in names.shapes.items():
            if name in names.to_base:
                continue
            if shape is None or not is_head(name, modules):
                problems.append((name, "–", said(shape)))
            elif names is not lead and name not in skeleton:
                made.notes.append(
                    f"{name!r} of {names.tuned.path} is left out: the result has the heads of "
                    f"{made.config.path}"
                )
    if lead is not None:
        matched = set(lead.to_base.values())
        modules = modules_of(matched)
        for name in base.tensors.keys() - matched:
            if is_head(name, modules) or base.tensors[name].dtype not in FLOATS:
                made.dropped.append(name)
            else:
                problems.append((name, said(base.tensors[name].shape), "–"))
        for names in known:
            # A full model that lacks what the first one has is another model.
            if names is lead or not isinstance(names.tuned, Checkpoint):
                continue
            theirs = modules_of(names.from_base)
            for name in matched - names.from_base.keys():
                if not is_head(name, theirs) and base.tensors[name].dtype in FLOATS:
                    problems.append((name, said(base.tensors[name].shape), "–"))
    made.dropped.sort()
    return problems


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    if checkpoint.config().get("quantization_config"):
        raise DataError(
            f"{checkpoint.path} is quantised: a change of codes means nothing; load it in full "
            "precision, save that, and merge the copy"
        )
    for entry in checkpoint.tensors.values():
        codes = entry.dtype in ("U8", "I8") and entry.name.endswith(
            "weight"
        )  # masks are bytes, too
        if entry.dtype.startswith("F8") or codes:
            raise DataError(
                f"{checkpoint.path} holds {entry.name!r} as {entry.dtype}, which looks quantised: "
                "save the model as bf16, fp16 or fp32"
            )


def _note(made: Plan, tuned: Sequence[Tuned]) -> None:
    if made.kept:
        made.notes.append(
            f"kept as fine-tuned, for the base has no such tensors: {_some(made.kept)}"
        )
    if made.dropped:
        made.notes.append(f"not in the result, for the model lacks them: {_some(made.dropped)}")
    for item in made.items:
        if item.base is not None and item.common < item.numel:
            rows = item.common // (item.numel // item.shape[0])
            made.notes.append(
                f"{item.name}: {rows} of {item.shape[0]} rows are merged, the others are those of "
                f"{made.config.path}"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
