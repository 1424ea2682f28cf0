"""Models by name."""

from __future__ import annotations

import difflib
from dataclasses import replace

import torch

from guywire.core.errors import UsageError
from guywire.lab.models.classifier import Classifier
from guywire.lab.models.seeding import seeded
from guywire.lab.streams import Stream

__all__ = ["IMAGE_MODELS", "TEXT_MODELS", "attention_glob", "build", "prepare"]

IMAGE_MODELS = ("mlp", "cnn", "resnet18", "vit", "efficientnet-lite0")
TEXT_MODELS = ("minilm",)

# Sizes for EfficientNet, whose five halvings leave two by two positions of 64 pixels. On drawings of
# 64 pixels a linear probe gained nothing from enlarging them further (70.7% of 40 classes at 64,
# 68.6% at 96, 68.2% at 128), and a step's cost grows with the area.
_SMALLEST, _LARGEST = 64, 224
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# What the projections to queries, keys and values are called across encoders and their versions.
_ATTENTION = (
    "backbone.*.[qkv]_proj.*",
    "backbone.*.query.*",
    "backbone.*.key.*",
    "backbone.*.value.*",
    "backbone.*.[qkv]_lin.*",
    "backbone.*.c_attn.*",
    "backbone.*.in_proj_*",
)


def build(name: str, stream: Stream, generator: torch.Generator) -> Classifier:
    """Return a model that fits a stream, with a head that has no classes yet.

    Args:
        name: ``mlp``, ``cnn`` (slim), ``resnet18``, ``vit``, ``efficientnet-lite0``, ``minilm``, or
            ``hf:NAME`` with a hub id or a folder.
        stream: what :func:`prepare` returned for this name.
        generator: of the CPU; every fresh weight comes from it, and the global random state stays
            untouched.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        UsageError: no such model, or one for another kind of stream.
        MissingExtraError: a package that it needs is not installed.
        DataError: a pretrained model cannot be loaded.

    Example:
        >>> from guywire.lab import streams
        >>> stream = streams.load(streams.StreamConfig(data="digits"))
        >>> model = build("mlp", stream, torch.Generator().manual_seed(0))
        >>> model.grow(2, torch.Generator().manual_seed(1))
        >>> model(torch.zeros(3, *stream.shape)).shape
        torch.Size([3, 2])
    """
    _check(name, stream)
    if stream.kind == "text" and stream.pad_id is None:
        raise UsageError(
            f"the texts of {stream.name!r} are not tokenised yet: pass what prepare({name!r}, "
            "stream) returns"
        )
    with seeded(generator):
        backbone = _backbone(name, stream)
    model = Classifier(backbone, int(backbone.width), name)  # pyright: ignore[reportArgumentType]
    return model.train()


def prepare(name: str, stream: Stream) -> Stream:
    """Bring a stream into the form that a model reads.

    Args:
        name: as in :func:`build`.
        stream: as loaded.

    Returns:
        The stream itself, or one with token ids, or with another size and normalisation of images.

    Raises:
        UsageError: no such model, or one for another kind of stream.
        MissingExtraError: a package that it needs is not installed.
        DataError: its tokenizer or settings cannot be loaded.
    """
    _check(name, stream)
    if name == "efficientnet-lite0":
        mean, std = (torch.tensor(values) for values in _IMAGENET)
        side = max(_SMALLEST, min(_LARGEST, *stream.shape[1:]))
        return replace(stream, size=side, channels=3, mean=mean, std=std)
    if name == "minilm" or name.startswith("hf:"):
        from guywire.lab.models import huggingface

        source = huggingface.minilm_folder() if name == "minilm" else name.removeprefix("hf:")
        change = huggingface.tokenised if stream.kind == "text" else huggingface.as_images
        return change(source, stream, name)
    return stream


def attention_glob(name: str) -> list[str]:
    """Return the selection of a model's self-attention: projections to queries, keys and values.

    Args:
        name: of a model that has self-attention: ``vit``, ``minilm`` or ``hf:NAME``.

    Returns:
        Globs for ``select=``.

    Raises:
        UsageError: the model has none.

    Example:
        >>> "backbone.*.query.*" in attention_glob("minilm")
        True
    """
    if name not in ("vit", "minilm") and not name.startswith("hf:"):
        raise UsageError(
            f"the model {name!r} has no self-attention to select: use vit, minilm or hf:NAME"
        )
    return list(_ATTENTION)


def _backbone(name: str, stream: Stream) -> torch.nn.Module:
    if name == "mlp":
        from guywire.lab.models.mlp import MLP

        return MLP(stream.shape)
    if name in ("cnn", "resnet18"):
        from guywire.lab.models.cnn import CNN

        return CNN(stream.shape, base=20 if name == "cnn" else 64)
    if name == "efficientnet-lite0":
        from guywire.lab.models import efficientnet

        return efficientnet.pretrained()
    from guywire.lab.models import huggingface

    if name == "vit":
        return huggingface.vit(stream.shape)
    source = huggingface.minilm_folder() if name == "minilm" else name.removeprefix("hf:")
    return huggingface.pretrained(source, stream, name)


def _check(name: str, stream: Stream) -> None:
    if name.startswith("hf:"):
        return  # its configuration tells what it reads
    known = (*IMAGE_MODELS, *TEXT_MODELS)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"name one of {', '.join(known)} or hf:NAME"
        )
        raise UsageError(f"there is no model {name!r}: {hint}")
    fitting = IMAGE_MODELS if stream.kind == "image" else TEXT_MODELS
    if name not in fitting:
        raise UsageError(
            f"the model {name!r} does not read {stream.kind}s, which {stream.name!r} is made of: "
            f"use {', '.join(fitting)} or hf:NAME"
        )
