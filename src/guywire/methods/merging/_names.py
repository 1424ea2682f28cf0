"""Names of tensors: which of a fine-tuned model's are which of the base's, and what to say if none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from guywire.core.errors import CheckpointError
from guywire.methods.merging.files import Checkpoint
from guywire.methods.merging.lora import Adapter

Tuned = Checkpoint | Adapter
_MOST_ROWS = 20


@dataclass(frozen=True)
class Names:
    """A fine-tuned model's names in terms of the base's."""

    tuned: Tuned
    to_base: dict[str, str]  # only those that are in the base

    def __post_init__(self) -> None:
        object.__setattr__(self, "from_base", {mine: n for n, mine in self.to_base.items()})

    from_base: dict[str, str] = field(init=False, repr=False, default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        return shapes_of(self.tuned)


def shapes_of(model: Tuned) -> dict[str, tuple[int, ...] | None]:
    if isinstance(model, Checkpoint):
        return {name: entry.shape for name, entry in model.tensors.items()}
    whole = {name: entry.shape for name, entry in model.whole.items()}
    return {**dict.fromkeys(model.factors), **whole}


def match_names(base: Checkpoint, model: Tuned) -> Names:
    """Find the prefix by which names differ, if any."""
    names = list(shapes_of(model))
    here = base.tensors.keys()
    plain = {name: name for name in names if name in here}
    best = plain
    # The commonest first parts are the only candidates: "bert.", "model.", "transformer.".
    ours = Counter(n.split(".")[0] for n in here).most_common(3)
    theirs = Counter(n.split(".")[0] for n in names).most_common(3)
    for prefix, _ in theirs:
        cut = {n: n[len(prefix) + 1 :] for n in names if n.startswith(f"{prefix}.")}
        best = max(best, {n: b for n, b in cut.items() if b in here} | plain, key=len)
    for prefix, _ in ours:
        longer = {n: f"{prefix}.{n}" for n in names if f"{prefix}.{n}" in here}
        best = max(best, longer | plain, key=len)
    if len(set(best.values())) < len(best):
        best = plain
    if len(best) * 2 < len(names):
        unknown = [n for n in names if n not in best]
        rows = [(n, "–", said(shapes_of(model)[n])) for n in unknown]
        rows += [(n, said(base.tensors[n].shape), "–") for n in here - set(best.values())]
        raise CheckpointError(
            f"{model.path} was not fine-tuned from {base.path}: of its {len(names)} tensors only "
            f"{len(best)} have a name that the base has, too\n" + rows_of(rows)
        )
    return Names(model, best)


def modules_of(names: Iterable[str]) -> set[str]:
    """All modules that hold one of the tensors, at any depth."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    return found


def is_head(name: str, modules: set[str]) -> bool:
    """Tell whether a tensor is in a module of its own, outside any list of layers.

    Its outermost module without a matched tensor must not lie in or be an item of a list, which has
    a number for a name. The thirteenth layer of a model whose base has twelve is no head.
    """
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if parts[depth - 1].isdigit() and depth > 1:
            return False
        if ".".join(parts[:depth]) not in modules:
            return True
    return False


def hit(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def said(shape: tuple[int, ...] | None) -> str:
    return "LoRA" if shape is None else "×".join(map(str, shape)) or "number"


def table_of(problems: Sequence[tuple[str, str, str]], total: int) -> str:
    return (
        f"{len(problems)} tensors of {total} do not match: merge models of one architecture, or "
        "--exclude those whose fine-tuned values are to be kept\n" + rows_of(problems)
    )


def rows_of(problems: Sequence[tuple[str, str, str]]) -> str:
    rows = [("tensor", "base", "fine-tuned"), *sorted(set(problems))[:_MOST_ROWS]]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"  {name:{wide[0]}s}  {a:{wide[1]}s}  {b}" for name, a, b in rows]
    if len(problems) > _MOST_ROWS:
        lines.append(f"  ... and {len(problems) - _MOST_ROWS} more")
    return "\n".join(lines)
