"""A small encoder-decoder (or one from the hub) for studies on text: tokens, batches, scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.errors import UsageError, need
from guywire.lab.studies.fisher_sequential_transfer.gap_sentences import SENTINEL

__all__ = [
    "IGNORED",
    "Encoded",
    "build_model",
    "build_tokenizer",
    "collate",
    "encode",
    "shuffled",
    "text_scores",
    "token_loss",
    "write",
]

IGNORED = -100
"""Label of positions that are no token: padding never counts."""

Encoded = list[tuple[list[int], list[int]]]
"""Token ids of source and target, each closed by the end-of-sequence token."""

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer(
    model: str,
    file: Path,
    texts: Sequence[str] = (),
    prefixes: Sequence[str] = (),
    *,
    vocab: int = 2000,
) -> Any:
    """Return the tokenizer: of a hub model, read from ``file``, or trained and written there.

    Args:
        model: ``"tiny"`` or ``"hf:NAME"``.
        file: where the byte-pair encoding of ``"tiny"`` is kept.
        texts: to train it on; training texts only.
        prefixes: of tasks, each to be one token.
        vocab: its size.

    Returns:
        A Hugging Face tokenizer with the sentinels of gap sentences.

    Raises:
        UsageError: the hub model's tokenizer has no sentinels.
    """
    transformers = need("transformers", extra="hf")
    if model != "tiny":
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.removeprefix("hf:"))
        if SENTINEL.format(0) not in tokenizer.get_vocab():
            raise UsageError(
                f"the tokenizer of {model} has no {SENTINEL.format(0)}: gap sentences need a model "
                "of the T5 family"
            )
        return tokenizer
    if not file.exists():
        _train(texts, prefixes, vocab, file)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN
    )


def _train(texts: Sequence[str], prefixes: Sequence[str], vocab: int, file: Path) -> None:
    tokenizers = need("tokenizers", extra="hf")
    specials = [_PAD, _END, _UNKNOWN, *(SENTINEL.format(i) for i in range(5))]
    specials += [prefix.strip() for prefix in prefixes]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, specials.index(_END))]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    temporary = file.with_suffix(".tmp")
    tokenizer.save(str(temporary))
    temporary.replace(file)


def build_model(
    model: str, tokenizer: Any, *, layers: int, width: int, dropout: float
) -> nn.Module:
    """Return an encoder-decoder: a small BART from a configuration, or a pretrained one.

    Args:
        model: ``"tiny"`` or ``"hf:NAME"``.
        tokenizer: from :func:`build_tokenizer`.
        layers: of the encoder, and of the decoder, of ``"tiny"``.
        width: of its hidden states.
        dropout: of it.

    Returns:
        The model, in train mode; its weights come from torch's global generator.
    """
    transformers = need("transformers", extra="hf")
    if model != "tiny":
        name = model.removeprefix("hf:")
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(name).train()
    config = transformers.BartConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        dropout=dropout,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config).train()


def encode(
    pairs: Sequence[tuple[str, str]],
    tokenizer: Any,
    prefix: str,
    *,
    source_length: int = 512,
    target_length: int = 256,
) -> Encoded:
    """Turn pairs of texts into token ids.

    Args:
        pairs: source and target.
        tokenizer: of the model.
        prefix: put before each source: it says which task this is.
        source_length: the longest source; the rest is cut off.
        target_length: the longest target.

    Returns:
        The ids.
    """
    if not pairs:
        return []
    sources = tokenizer(
        [prefix + source for source, _ in pairs], truncation=True, max_length=source_length
    )["input_ids"]
    targets = tokenizer(
        text_target=[target for _, target in pairs], truncation=True, max_length=target_length
    )["input_ids"]
    return list(zip(sources, targets, strict=True))


def collate(items: Encoded, pad: int) -> dict[str, Tensor]:
    """Return a padded batch; padding has the label -100 and no attention.

    Args:
        items: the sequences.
        pad: the padding token.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape ``[batch, source]``, ``labels`` of shape
        ``[batch, target]``.
    """
    longest = max(len(source) for source, _ in items), max(len(target) for _, target in items)
    sources = torch.full((len(items), longest[0]), pad)
    labels = torch.full((len(items), longest[1]), IGNORED)
    for row, (source, target) in enumerate(items):
        sources[row, : len(source)] = torch.tensor(source)
        labels[row, : len(target)] = torch.tensor(target)
    lengths = torch.tensor([len(source) for source, _ in items])
    mask = (torch.arange(longest[0])[None] < lengths[:, None]).long()
    return {"input_ids": sources, "attention_mask": mask, "labels": labels}


def shuffled(
    items: Encoded, size: int, pad: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Yield one epoch of batches; sequences of similar length stand together, to pad less.

    Args:
        items: the sequences.
        size: of a batch.
        pad: the padding token.
        generator: of the order.

    Yields:
        Batches as of :func:`collate`.
    """
    order = torch.randperm(len(items), generator=generator).tolist()
    pool = 16 * size
    groups: list[list[int]] = []
    for start in range(0, len(order), pool):
        near = sorted(
            order[start : start + pool], key=lambda i: len(items[i][0]) + len(items[i][1])
        )
        groups += [near[i : i + size] for i in range(0, len(near), size)]
    for index in torch.randperm(len(groups), generator=generator).tolist():
        yield collate([items[i] for i in groups[index]], pad)


@torch.no_grad()
def token_loss(model: nn.Module, items: Encoded, pad: int, *, size: int = 64) -> float:
    """Return the mean of -log p over all target tokens, in nats, in eval mode.

    Args:
        model: the encoder-decoder; its train flag is put back.
        items: the sequences.
        pad: the padding token.
        size: of a batch; the result does not depend on it.

    Returns:
        Nats per token, the end-of-sequence token included.
    """
    training = model.training
    model.eval()
    ordered = sorted(items, key=lambda item: len(item[0]) + len(item[1]))
    total, count = 0.0, 0
    for start in range(0, len(ordered), size):
        batch = batches.to(collate(ordered[start : start + size], pad), batches.device_of(model))
        logits, labels = model(**batch).logits, batch["labels"]
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total += float(loss)
        count += int((labels != IGNORED).sum())
    model.train(training)
    return total / max(count, 1)


@torch.no_grad()
def write(
    model: Any, items: Encoded, tokenizer: Any, *, longest: int = 48, size: int = 100
) -> list[str]:
    """Let the model write the target of each source, greedily.

    Args:
        model: the encoder-decoder; its train flag is put back.
        items: the sequences; their targets are not looked at.
        tokenizer: of the model.
        longest: in tokens.
        size: of a batch.

    Returns:
        One text a source.
    """
    training = model.training
    model.eval()
    texts: list[str] = []
    for start in range(0, len(items), size):
        batch = collate(items[start : start + size], tokenizer.pad_token_id)
        device = batches.device_of(model)
        ids = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=longest,
            num_beams=1,
            do_sample=False,
        )
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    model.train(training)
    return [text.strip() for text in texts]


def text_scores(written: Sequence[str], wanted: Sequence[str]) -> Mapping[str, float]:
    """Score texts by ROUGE (F measure, stemmed) and BLEU's n-gram precisions, in per cent.

    The paper's BLEU columns are precisions, neither cumulative nor with a brevity penalty.

    Args:
        written: by the model.
        wanted: the references, one each.

    Returns:
        ``rouge1, rouge2, rougeL`` and ``bleu1, bleu2, bleu3``.

    Raises:
        UsageError: the lists differ in length, or are empty.
    """
    if len(written) != len(wanted) or not written:
        raise UsageError(f"{len(written)} texts cannot be scored against {len(wanted)} references")
    scorer = need("rouge_score.rouge_scorer", extra="text")
    metrics = need("sacrebleu.metrics", extra="text")
    kinds = ["rouge1", "rouge2", "rougeL"]
    rouge = scorer.RougeScorer(kinds, use_stemmer=True)
    found = [rouge.score(reference, text) for text, reference in zip(written, wanted, strict=True)]
    scores = {k: 100.0 * sum(f[k].fmeasure for f in found) / len(found) for k in kinds}
    precisions = metrics.BLEU(smooth_method="none").corpus_score(list(written), [list(wanted)])
    return scores | {f"bleu{n + 1}": precisions.precisions[n] for n in range(3)}
