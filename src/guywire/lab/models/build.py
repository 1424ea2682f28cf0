"""Models by name."""

from __future__ import annotations

import difflib

import torch

from guywire.core.errors import UsageError
from guywire.lab.models.classifier import Classifier
from guywire.lab.models.seeding import seeded
from guywire.lab.streams import Stream

__all__ = ["build", "prepare"]

_IMAGE = ("mlp",)
_TEXT = ()


def build(name: str, stream: Stream, generator: torch.Generator) -> Classifier:
    """Return a model that fits a stream, with a head that has no classes yet.

    Args:
        name: ``mlp``.
        stream: what :func:`prepare` returned for this name.
        generator: every first value comes from it; the global random state stays untouched.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        UsageError: no such model, or one for another kind of stream.

    Example:
        >>> from guywire.lab import streams
        >>> stream = streams.load(streams.StreamConfig(data="digits"))
        >>> model = build("mlp", stream, torch.Generator().manual_seed(0))
        >>> model.grow(2, torch.Generator().manual_seed(1))
        >>> model(torch.zeros(3, *stream.shape)).shape
        torch.Size([3, 2])
    """
    _check(name, stream)
    with seeded(generator):
        from guywire.lab.models.mlp import MLP

        backbone = MLP(stream.shape)
    return Classifier(backbone, backbone.width, name)


def prepare(name: str, stream: Stream) -> Stream:
    """Bring a stream into the form that a model reads.

    Args:
        name: as in :func:`build`.
        stream: as loaded.

    Returns:
        The stream itself, or one with token ids, or with another size and normalisation of images.

    Raises:
        UsageError: no such model, or one for another kind of stream.
    """
    _check(name, stream)
    return stream


def _check(name: str, stream: Stream) -> None:
    known = (*_IMAGE, *_TEXT)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"name one of {', '.join(known)}"
        raise UsageError(f"there is no model {name!r}: {hint}")
    fitting = _IMAGE if stream.kind == "image" else _TEXT
    if name not in fitting:
        raise UsageError(
            f"the model {name!r} does not read {stream.kind}s, which {stream.name!r} is made of: "
            f"use one of {', '.join(fitting)}"
        )
