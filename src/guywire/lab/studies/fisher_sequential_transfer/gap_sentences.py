"""Gap sentences: hide the sentences that say most of a document, and learn to write them.

For a document of sentences x_1..x_m, a sentence's weight is

    W_i = 2 r b / (r + b),  0 if r + b = 0,

r: the F measure of ROUGE-1 of x_i against a reference; b: the BLEU of x_i against it, in [0, 1]; the
reference is the rest of the document (the paper) or its summary (the released code). The heaviest
sentences are replaced in the text by sentinels ``<extra_id_0>``, ``<extra_id_1>``, ... in text order;
the target lists them in the same order, each behind its sentinel, as T5 was trained. (The released
code numbers the sentinels so too, but lists the target by weight and without sentinels.)

Source: CSTRL, arXiv 2503.05750, section 3; PEGASUS, arXiv 1912.08777. Scores by rouge-score and
sacrebleu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guywire.core.errors import DataError, need

__all__ = ["SENTINEL", "gap_pair", "masked_count", "sentence_weight", "split_sentences", "weigh"]

SENTINEL = "<extra_id_{}>"

Weight = Callable[[str, str], float]


def split_sentences(text: str) -> list[str]:
    """Split a document at full stops followed by a space, as the paper does.

    Args:
        text: the document.

    Returns:
        Its sentences, without the stops at which they were split.

    Example:
        >>> split_sentences("Heart is normal. Lungs are clear.")
        ['Heart is normal', 'Lungs are clear']
    """
    parts = [part.strip() for part in " ".join(text.split()).split(". ")]
    if parts:
        parts[-1] = parts[-1].removesuffix(".").rstrip()
    return [part for part in parts if part]


def masked_count(sentences: int, most: int = 3) -> int:
    """Return how many sentences to hide: ``min(most, m - 2)``, at least one.

    Args:
        sentences: m, the number of sentences.
        most: never more than this.

    Returns:
        The count.

    Example:
        >>> [masked_count(m) for m in (1, 3, 5, 9)]
        [1, 1, 3, 3]
    """
    return max(1, min(most, sentences - 2))


def sentence_weight(*, stem: bool = False) -> Weight:
    """Return the function ``(sentence, reference) -> W``.

    Args:
        stem: whether ROUGE compares stems (slower).

    Returns:
        The function, in [0, 1].

    Raises:
        MissingExtraError: rouge-score or sacrebleu is not installed.
    """
    rouge_scorer = need("rouge_score.rouge_scorer", extra="text")
    metrics = need("sacrebleu.metrics", extra="text")
    rouge = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=stem)
    # Effective order: a sentence of three words has no 4-grams, and is not worthless for that.
    bleu = metrics.BLEU(effective_order=True)

    def weight(sentence: str, reference: str) -> float:
        r = rouge.score(reference, sentence)["rouge1"].fmeasure
        if r == 0.0:
            return 0.0
        b = bleu.sentence_score(sentence, [reference]).score / 100.0
        return 0.0 if b == 0.0 else 2.0 * r * b / (r + b)

    return weight


def weigh(sentences: Sequence[str], weight: Weight, summary: str | None = None) -> list[float]:
    """Return the weight of every sentence of a document.

    Args:
        sentences: the document.
        weight: from :func:`sentence_weight`.
        summary: the reference; ``None`` takes, for each sentence, the rest of the document. With
            a summary use training documents only, or the summaries of test documents leak.

    Returns:
        One weight a sentence.
    """
    if summary is not None:
        return [weight(sentence, summary) for sentence in sentences]
    return [
        weight(sentence, " ".join([*sentences[:i], *sentences[i + 1 :]]))
        for i, sentence in enumerate(sentences)
    ]


def gap_pair(
    sentences: Sequence[str], weights: Sequence[float], *, most: int = 3, stop: str = ". "
) -> tuple[str, str]:
    """Hide the heaviest sentences of a document.

    Args:
        sentences: the document.
        weights: one a sentence; of equal ones the first is heavier.
        most: hide at most this many.
        stop: stands between sentences of the source.

    Returns:
        The source with sentinels, and the target.

    Raises:
        DataError: the document is empty.

    Example:
        >>> gap_pair(["a b", "c d", "e f", "g h"], [0.1, 0.5, 0.2, 0.9], most=2, stop=" ")
        ('a b <extra_id_0> e f <extra_id_1>', '<extra_id_0> c d <extra_id_1> g h')
    """
    if not sentences:
        raise DataError("a document without sentences has nothing to hide")
    ranked = sorted(range(len(sentences)), key=lambda i: (-weights[i], i))
    hidden = sorted(ranked[: masked_count(len(sentences), most)])
    sentinels = {i: SENTINEL.format(k) for k, i in enumerate(hidden)}
    source = stop.join(sentinels.get(i, sentence) for i, sentence in enumerate(sentences))
    target = " ".join(f"{sentinels[i]} {sentences[i]}" for i in hidden)
    return source, target
