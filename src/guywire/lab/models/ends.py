"""Two checkpoints of one model: Hugging Face folders, safetensors files, or PEFT adapters of one base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from guywire.core.errors import DataError, UsageError, need
from guywire.core.tensors import Tensors
from guywire.lab.models import huggingface

__all__ = ["Ends", "load_ends"]

Kind = Literal["language", "text", "image"]

_KINDS: dict[str, Kind] = {
    "ForCausalLM": "language",
    "LMHeadModel": "language",
    "ForSequenceClassification": "text",
    "ForImageClassification": "image",
}
_ADAPTER = "default"
_SAME = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Ends:
    """A model and two states that fit it.

    Attributes:
        model: in eval mode, on the CPU, in float32.
        start: of the first checkpoint, names as in ``model.state_dict()``.
        end: of the second.
        kind: ``language`` (causal), ``text`` (classification) or ``image`` (classification).
        source: folder or hub id that has the tokenizer or image processor.
        adapters: whether the states are adapters.
    """

    model: nn.Module
    start: Tensors
    end: Tensors
    kind: Kind
    source: str
    adapters: bool


def load_ends(start: Path, end: Path, base: str | None = None) -> Ends:
    """Load two checkpoints of one model.

    Args:
        start: a folder of a model, a folder of a PEFT adapter, or a safetensors file.
        end: the same kind.
        base: folder or hub id of the model that adapters are of, or that gives a safetensors file its
            architecture.

    Returns:
        The model and both states.

    Raises:
        UsageError: they are not of one model, or of a kind that cannot be evaluated here.
        DataError: one of them cannot be loaded.
        MissingExtraError: a package is not installed.
    """
    kinds = [_kind_of(path) for path in (start, end)]
    if ("adapter" in kinds) and kinds[0] != kinds[1]:
        raise UsageError(
            f"{start} is of kind {kinds[0]} and {end} of kind {kinds[1]}: give two adapters of one "
            "base, or two whole models (merge the adapter first)"
        )
    return _adapters(start, end, base) if kinds[0] == "adapter" else _models(start, end, base)


def _kind_of(path: Path) -> str:
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return "adapter"
        if (path / "config.json").is_file():
            return "model"
        raise UsageError(f"{path} has neither config.json nor adapter_config.json: it is no model")
    if path.suffix == ".safetensors" and path.is_file():
        return "tensors"
    raise UsageError(
        f"there is no checkpoint {path}: give a Hugging Face folder, a PEFT adapter's folder or a "
        ".safetensors file"
    )


def _models(start: Path, end: Path, base: str | None) -> Ends:
    source = base or next((str(p) for p in (start, end) if p.is_dir()), None)
    if source is None:
        raise UsageError(
            f"{start.name} and {end.name} are tensors without an architecture: add --model with the "
            "folder or hub id of such a model"
        )
    model, kind = _build(source)
    states = [_state(path, model) for path in (start, end)]
    return Ends(model, states[0], states[1], kind, source, adapters=False)


def _state(path: Path, model: nn.Module) -> Tensors:
    if path.is_file():
        return _tensors(path)
    transformers = need("transformers", extra="hf")
    named = (_json(path / "config.json").get("architectures") or ["?"])[0]
    if named != type(model).__name__:
        raise UsageError(
            f"{path} is a {named} and the other one a {type(model).__name__}: there is no line between "
            "models of different architectures"
        )
    with huggingface._loading(str(path)), huggingface._quiet(transformers):
        other, report = type(model).from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            str(path), use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:  # they would be random, and the numbers with them
        raise DataError(
            f"{path} lacks {min(report['missing_keys'])!r} and {len(report['missing_keys']) - 1} more "
            f"weights of a {named}: it is no whole model"
        )
    other = other.float()
    # Tied weights once, so that the distance does not count them twice.
    once = {name for name, _ in other.named_parameters()}
    again = {name for name, _ in other.named_parameters(remove_duplicate=False)} - once
    return {n: v.detach().clone() for n, v in other.state_dict().items() if n not in again}


def _adapters(start: Path, end: Path, base: str | None) -> Ends:
    need("peft", extra="adapters")
    from peft import PeftModel, set_peft_model_state_dict

    configs = [_json(path / "adapter_config.json") for path in (start, end)]
    for key in _SAME:
        one, two = (_plain(config.get(key)) for config in configs)
        if one != two:
            raise UsageError(
                f"the adapters have {key} {one} and {two}: there is no line between them, retrain or "
                "convert one to the other's"
            )
    source = base or configs[0].get("base_model_name_or_path")
    if not source:
        raise UsageError(f"{start} does not say of which base it is: add --model FOLDER or hub id")
    files = [_tensors(path / "adapter_model.safetensors") for path in (start, end)]
    if files[0].keys() != files[1].keys():
        name = min(files[0].keys() ^ files[1].keys())
        raise UsageError(f"only one of the adapters has {name!r}: they are not of one kind")
    model, kind = _build(source, _classes(files[0]))
    with huggingface._loading(str(start)):
        dressed = PeftModel.from_pretrained(model, str(start), adapter_name=_ADAPTER)  # pyright: ignore[reportArgumentType]
    states = []
    for tensors in files:
        set_peft_model_state_dict(dressed, tensors, adapter_name=_ADAPTER)
        states.append(
            {
                name: value.detach().clone()
                for name, value in dressed.state_dict().items()
                if _ADAPTER in name.split(".")
            }
        )
    return Ends(dressed.eval(), states[0], states[1], kind, str(source), adapters=True)


def _build(source: str, classes: int | None = None) -> tuple[nn.Module, Kind]:
    transformers = need("transformers", extra="hf")
    with huggingface._loading(source):
        config = transformers.AutoConfig.from_pretrained(source)
    named = getattr(config, "architectures", None) or [""]
    if classes is not None and _kind(named[0]) not in ("text", "image"):
        # An adapter for classification of a base that was trained for something else.
        named = [_classifier_of(config, transformers)]
        config.num_labels = classes
    elif classes is not None:
        config.num_labels = classes
    kind = _kind(named[0])
    if kind is None:
        raise UsageError(
            f"the model {source!r} is a {named[0] or 'model of no known architecture'}: causal "
            f"language models and classifiers of texts or images can be evaluated here; use "
            "gw.diagnostics.connectivity in Python for others"
        )
    with huggingface._loading(source), huggingface._quiet(transformers):
        model = getattr(transformers, named[0]).from_pretrained(
            source, config=config, use_safetensors=True
        )
    return model.float().eval(), kind


def _classifier_of(config: Any, transformers: Any) -> str:
    for auto in ("AutoModelForSequenceClassification", "AutoModelForImageClassification"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            return mapping[type(config)].__name__
    return ""


def _kind(architecture: str) -> Kind | None:
    return next((k for end, k in _KINDS.items() if architecture.endswith(end)), None)


def _classes(tensors: Mapping[str, Any]) -> int | None:
    """Rows of the head that an adapter was trained with, where it brings one."""
    ends = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    for name, value in tensors.items():
        if name.endswith(ends) and "lora_" not in name:
            return value.shape[0]
    return None


def _tensors(path: Path) -> Tensors:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # the library raises a type of its own
        raise DataError(f"{path} cannot be read as safetensors: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__} where an object is due")
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value or None
