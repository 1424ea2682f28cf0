"""What goes beside merged weights, so that the result loads by itself: settings, tokenizer, index."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from guywire.core.errors import CheckpointError
from guywire.core.headers import DTYPES
from guywire.core.writing import write_bytes, write_json
from guywire.methods.merging.files import Checkpoint
from guywire.methods.merging.matching import Plan

RECIPE = "guywire-merge.json"
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".bpe"}
_NOT = {"adapter_config.json", "trainer_state.json", RECIPE, "all_results.json", "README.md"}
_LARGEST_BESIDE = 2 << 30
_TOKENISER = (
    "token",
    "vocab",
    "merges",
    "special_",
    "preprocessor",
    "processor",
    "chat_",
    "spiece",
)


def companions(plan: Plan, base: Checkpoint) -> dict[str, bytes]:
    """Collect configuration, tokenizer and index, so that the result loads by itself.

    Args:
        plan: of the merge.
        base: where a tokenizer comes from if the fine-tuned model has none.

    Returns:
        Names of files (with folders) to contents.
    """
    found: dict[str, bytes] = {}
    for source, only in ((plan.config.folder, None), (base.folder, _TOKENISER)):
        files = [f for f in sorted(source.iterdir()) if _wanted(f)]
        if only is not None and any(name.startswith(_TOKENISER) for name in found):
            continue
        for file in files:
            if only is None or file.name.startswith(only):
                found.setdefault(file.name, read_beside(file))
    for folder in _modules(plan.config.folder):
        for file in sorted(folder.rglob("*")):
            if file.is_file() and (file.suffix in _SUFFIXES or file.suffix == ".safetensors"):
                found[str(file.relative_to(plan.config.folder))] = read_beside(file)
    if len(plan.files) > 1:
        found[index_name(base)] = _index(plan)
    return found


def read_beside(file: Path) -> bytes:
    """Read a file that goes with the weights, unless it is too large to be one.

    Args:
        file: the file.

    Returns:
        Its content.

    Raises:
        CheckpointError: it cannot be read, or claims gigabytes.
    """
    try:
        if (size := file.stat().st_size) > _LARGEST_BESIDE:
            raise CheckpointError(
                f"{file} has {size >> 20} MiB, too many for what goes with weights: remove it"
            )
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def write_companions(folder: Path, files: dict[str, bytes], recipe: dict[str, Any]) -> None:
    """Write what :func:`companions` found, and what was done."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content, durable=False)
    write_json(folder / RECIPE, recipe)


def index_name(base: Checkpoint) -> str:
    """Return the name of the index of a result that is sharded as its base is."""
    if base.path.is_file() and base.path.name.endswith(".index.json"):
        return base.path.name
    found = sorted(base.folder.glob("*.safetensors.index.json"))
    return found[0].name if len(found) == 1 else "model.safetensors.index.json"


def _index(plan: Plan) -> bytes:
    total = sum(item.numel * DTYPES[item.dtype].itemsize for item in plan.items)
    where = {item.name: file for file, items in plan.files.items() for item in items}
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(value, indent=2) + "\n").encode()


def _wanted(file: Path) -> bool:
    return (
        file.is_file()
        and (file.suffix in _SUFFIXES or file.name.upper().startswith("LICENSE"))
        and file.name not in _NOT
        and not file.name.endswith(".index.json")
        and not file.name.startswith(".")
    )


def _modules(folder: Path) -> list[Path]:
    """Folders of the further modules of a sentence-transformers model."""
    try:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        names = [entry["path"] for entry in listed]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    # A name that leads elsewhere ('..' is a name, too) would copy to elsewhere.
    names = [n for n in names if isinstance(n, str) and n != ".." and n and Path(n).name == n]
    return [folder / n for n in names if os.path.isdir(folder / n)]
