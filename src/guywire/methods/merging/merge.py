"""Merge fine-tuned checkpoints on disk, tensor by tensor, piece by piece.

Nothing is ever loaded whole: a piece of 2^20 weights is read from the base and from each model, edited,
and written at its place in a file of the result, by a few threads. The result depends on the models,
the method, rate, seed and weights alone, not on the order of tensors, files or threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from guywire.core.errors import UsageError
from guywire.methods.merging._choose import choose_qs
from guywire.methods.merging._companions import companions, write_companions
from guywire.methods.merging._compressed import write_delta
from guywire.methods.merging._editor import Editor, Inputs
from guywire.methods.merging._output import Target, layout, request_of
from guywire.methods.merging._threads import Threads
from guywire.methods.merging._tied import tied
from guywire.methods.merging.edits import METHODS
from guywire.methods.merging.files import Checkpoint
from guywire.methods.merging.lora import Adapter, is_adapter
from guywire.methods.merging.masks import BLOCK
from guywire.methods.merging.matching import Item, Plan, Tuned, plan

__all__ = ["MergeResult", "Progress", "merge_checkpoints"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much (in elements)."""

Calibration = Callable[[Checkpoint, Sequence[Tuned]], Sequence[Mapping[str, Inputs]]]


_SMALL = 16 * BLOCK


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        out: the folder that was made.
        recipe: method, rate, seed and so on, as in the result's ``guywire-merge.json``.
        tensors: how many were ``pruned``, ``merged`` without pruning, ``kept`` as the fine-tuned
            model has them, and ``unchanged``, for no model touches them.
        size: bytes of weights in the folder.
        reused: elements that an interrupted merge had written, and that were found sound.
        notes: what people should know, one sentence each.
    """

    out: Path
    recipe: dict[str, Any]
    tensors: dict[str, int]
    size: int
    reused: int
    notes: tuple[str, ...]


def merge_checkpoints(
    base: str | os.PathLike[str],
    tuned: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    method: str = "dare",
    rate: float | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    seed: int = 0,
    q: float | None = None,
    inputs: Calibration | None = None,
    select: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    delta_only: bool = False,
    force: bool = False,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Prune and merge the changes of fine-tuned checkpoints into a new one.

    Args:
        base: the pretrained model: a folder as ``save_pretrained`` writes it, a safetensors file, or
            the index of a sharded one.
        tuned: fine-tuned models of the same kinds, and folders of PEFT LoRA adapters.
        out: the folder to make; it loads with ``from_pretrained`` if the models do.
        method: one of :data:`~guywire.methods.merging.edits.METHODS`.
        rate: share of each change that is dropped, in [0, 1); 0.9 for random methods, 0.8 for those
            that rank, if ``None``.
        weights: of the models; each 1/n where changes are added, and equal where signs are elected,
            if ``None``.
        scale: of the sum of changes.
        seed: of the survivors.
        q: for ``darex-q``, what survivors are divided by, in [1 - rate, 1]; if ``None``, each layer's
            own, from calibration inputs if there are any.
        inputs: gives calibration inputs, see :func:`~guywire.methods.merging.calibration`.
        select: globs over names of tensors to prune; all if ``None``. The others are merged without
            pruning.
        exclude: globs over names of tensors not to prune.
        delta_only: write a compressed delta instead of a model; random methods only.
        force: replace what an earlier merge made at ``out``.
        resume: go on with an interrupted merge to ``out``.
        threads: at most; one a core if ``None``.
        progress: told how far it is.

    Returns:
        What was done.

    Raises:
        UsageError: words or numbers are wrong, or ``out`` is there already.
        CheckpointError: a file is damaged, tensors do not match, or the disk is full.
        DataError: a model cannot be read, or is of a kind that cannot be merged.
        SelectionError: nothing is left to prune.
    """
    out, sources = Path(out), [Path(base), *map(Path, tuned)]
    if not tuned:
        raise UsageError("name at least one fine-tuned model after the base")
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}: there are {', '.join(METHODS)}")
    chosen = METHODS[method]
    rate = _rate(method, rate)
    shares = _weights(chosen.elects, weights, len(tuned), scale)
    _check_q(method, q, rate)
    if inputs is not None and method not in ("wanda", "darex-q"):
        raise UsageError(f"{method} needs no calibration inputs: leave --calibrate out")
    if method == "wanda" and inputs is None:
        raise UsageError("wanda ranks changes by the layers' inputs: give --calibrate FILE")
    if delta_only and chosen.prune != "random":
        raise UsageError(
            f"a compressed delta of {method} would need an index of what survived: use dare, darex-q "
            "or dare-ties, whose survivors follow from the seed"
        )
    target = Target(out, sources, force=force, resume=resume)
    say = progress or (lambda *_: None)
    with Checkpoint(base) as pretrained, Threads(threads) as pool:
        models = [_open(path) for path in sources[1:]]
        try:
            made = plan(pretrained, models, select=select, exclude=exclude)
            made.files = _grouped(tied(pretrained, made.files))
            editor = Editor(pretrained, chosen, rate, seed, shares, scale, len(models), inputs={})
            if inputs is not None:
                editor.inputs = _inputs(inputs(pretrained, models), made)
            run = pool.map
            if method == "darex-q" and rate > 0.0:
                say("choosing q", 0, 1)
                kind = pretrained.config().get("model_type")
                editor.qs = (
                    choose_qs(editor, made.items, run, model_type=kind)
                    if q is None
                    else _same(q, made)
                )
            recipe = _recipe(method, editor, models, q, made, select, exclude)
            _prepare(editor, made.items, pool, say)
            reused = 0
            target.begin(_request(recipe, editor, sources, made, delta_only), resume=resume)
            with target.working():
                if delta_only:
                    size = write_delta(target, editor, made, recipe, pool, say)
                else:
                    size, reused = _write(target, editor, made, pool, say)
                write_companions(target.work, companions(made, pretrained), recipe)
                target.finish()
        finally:
            for model in models:
                (model if isinstance(model, Checkpoint) else model.checkpoint).close()
    counts = {
        "pruned": sum(i.pruned and bool(i.parts) for i in made.items),
        "merged": sum(not i.pruned and bool(i.parts) for i in made.items),
        "kept": sum(i.base is None for i in made.items),
        "unchanged": sum(i.base is not None and not i.parts for i in made.items),
    }
    return MergeResult(out, recipe, counts, size, reused, tuple(made.notes))


def _open(path: Path) -> Tuned:
    return Adapter(path) if is_adapter(path) else Checkpoint(path)


def _rate(method: str, rate: float | None) -> float:
    default = METHODS[method].default_rate
    if default is None:
        if rate:
            raise UsageError(f"{method} does not prune: leave --rate out, or choose another method")
        return 0.0
    rate = default if rate is None else rate
    if not 0.0 <= rate < 1.0:
        raise UsageError(f"the rate is {rate}: it is the share that is dropped, in [0, 1)")
    return rate


def _weights(
    elects: bool, weights: Sequence[float] | None, models: int, scale: float
) -> tuple[float, ...]:
    if not math.isfinite(scale):
        raise UsageError(f"the scale is {scale}: it must be a finite number")
    if weights is None:
        return (1.0 if elects else 1.0 / models,) * models
    if len(weights) != models:
        raise UsageError(f"there are {len(weights)} weights for {models} models: give one for each")
    if not all(math.isfinite(w) for w in weights):
        raise UsageError(f"the weights are {list(weights)}: they must be finite numbers")
    if elects and (min(weights) < 0 or not sum(weights)):
        raise UsageError(
            f"the weights are {list(weights)}: where signs are elected they count votes, so they must "
            "not be negative, nor all 0"
        )
    return tuple(float(w) for w in weights)


def _check_q(method: str, q: float | None, rate: float) -> None:
    if q is None:
        return
    if method != "darex-q":
        raise UsageError(f"{method} has no q: leave --q out, or use darex-q")
    if not 1.0 - rate <= q + 1e-12 or q > 1.0:
        raise UsageError(f"q is {q}: it must be in [1 - rate, 1] = [{1.0 - rate:g}, 1]")


def _grouped(items: Iterable[tuple[str, Item]]) -> dict[str, list[Item]]:
    files: dict[str, list[Item]] = {}
    for file, item in items:
        files.setdefault(file, []).append(item)
    return files


def _same(q: float, made: Plan) -> dict[tuple[int, str], float]:
    return {(p.model, i.base.name): q for i in made.items if i.base for p in i.parts}


def _inputs(found: Sequence[Mapping[str, Inputs]], made: Plan) -> dict[tuple[int, str], Inputs]:
    """Turn each model's layer names into the base's tensor names."""
    out: dict[tuple[int, str], Inputs] = {}
    for item in made.items:
        if item.base is None:
            continue
        for model, layers in enumerate(found):
            for name in (item.name, item.base.name):
                if name.endswith(".weight") and (seen := layers.get(name.removesuffix(".weight"))):
                    out[model, item.base.name] = seen
                    break
    known = sorted({name for layers in found for name in layers})
    if not out:
        raise UsageError(
            f"none of the {len(known)} calibrated layers ({', '.join(known[:3])}, ...) has a weight in "
            "the base: inputs go by the layer's name, as in model.named_modules()"
        )
    return out


def _recipe(
    method: str,
    editor: Editor,
    models: Sequence[Tuned],
    q: float | None,
    made: Plan,
    select: Iterable[str] | None,
    exclude: Iterable[str],
) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "method": method,
        "rate": editor.rate,
        "seed": editor.seed,
        "weights": list(editor.weights),
        "scale": editor.scale,
        "base": editor.base.path.name,
        "models": [model.path.name for model in models],
        "select": None if select is None else list(select),
        "exclude": list(exclude),
    }
    if method == "darex-q":
        values = list(editor.qs.values()) or [1.0 - editor.rate]
        recipe["q"] = {
            "chosen": "given" if q is not None else "calibrated" if editor.inputs else "data-free",
            "mean": sum(values) / len(values),
            "min": min(values),
            "max": max(values),
        }
    return recipe


def _request(
    recipe: dict[str, Any],
    editor: Editor,
    sources: Sequence[Path],
    made: Plan,
    delta_only: bool,
) -> str:
    files = {f for i in made.items for e in (i.base, i.own.entry) if e for f in [e.file]}
    files |= {p.entry.file for i in made.items for p in i.parts if p.entry}
    stats = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    rows = [
        (f, i.name, i.dtype, i.shape, i.pruned, i.mask) for f, g in made.files.items() for i in g
    ]
    qs = sorted((*key, q) for key, q in editor.qs.items())
    norms = sorted((*key, float(seen.norms.double().sum())) for key, seen in editor.inputs.items())
    return request_of(
        recipe=recipe, stats=stats, rows=rows, qs=qs, norms=norms, delta=delta_only,
        sources=[str(source) for source in sources],
    )  # fmt: skip


def _prepare(editor: Editor, items: Sequence[Item], pool: Threads, say: Progress) -> None:
    if editor.method.prune not in ("magnitude", "wanda") or editor.rate == 0.0:
        return
    total, done = sum(item.numel for item in items), 0
    # Steps between the passes over a tensor take one thread: small tensors are ranked side by side.
    small = [item for item in items if item.numel <= _SMALL]

    def one(item: Item) -> int:
        editor.prepare(item, map)
        return item.numel

    for count in pool.map(one, small):
        done += count
        say("ranking", done, total)
    for item in items:
        if item.numel > _SMALL:
            editor.prepare(item, pool.map)
            done += item.numel
            say("ranking", done, total)


def _write(
    target: Target, editor: Editor, made: Plan, pool: Threads, say: Progress
) -> tuple[int, int]:
    total = sum(item.numel for item in made.items)
    work: list[tuple[str, Item, int, int, int]] = []
    size = 0
    for file, items in made.files.items():
        header, offsets, length = layout(items, made.metadata)
        target.open(file, header, length)
        size += length
        for item in items:
            width = _width(item)
            for start, stop in editor.pieces(item):
                work.append((file, item, start, stop, offsets[item.name] + start * width))

    def one(job: tuple[str, Item, int, int, int]) -> tuple[int, bool]:
        file, item, start, stop, at = job
        if target.has(file, at, (stop - start) * _width(item)):
            return stop - start, True
        values: Tensor = editor.edit(item, start, stop)[0]
        target.write(file, at, values)
        return stop - start, False

    done = reused = 0
    for count, known in pool.map(one, work):
        done += count
        reused += count * known
        say("writing", done, total)
    return size, reused


def _width(item: Item) -> int:
    from guywire.core.headers import DTYPES

    return DTYPES[item.dtype].itemsize
