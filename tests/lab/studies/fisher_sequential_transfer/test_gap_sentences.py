from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guywire.core.errors import DataError
from guywire.lab.studies.fisher_sequential_transfer.gap_sentences import (
    gap_pair,
    masked_count,
    sentence_weight,
    split_sentences,
    weigh,
)

REFERENCE = "the heart is of normal size and the lungs are clear"


@pytest.fixture(scope="module")
def weight():
    return sentence_weight()


def test_a_sentence_that_is_the_reference_weighs_one(weight):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"])
    assert scorer.score(REFERENCE, REFERENCE)["rouge1"].fmeasure == 1.0
    assert weight(REFERENCE, REFERENCE) == pytest.approx(1.0)


def test_nothing_in_common_weighs_zero(weight):
    assert weight("no pleural effusion seen", REFERENCE) == 0.0
    assert weight("", REFERENCE) == 0.0
    assert weight("...", "...") == 0.0  # BLEU is 1 there, but ROUGE finds no word


def test_rouge_without_bleu_weighs_zero(weight):
    # ROUGE does not mind capitals, BLEU does
    assert weight("HEART", "heart") == 0.0


def test_the_weight_is_the_harmonic_mean_of_both(weight):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    sentence = "the lungs are clear"
    r = RougeScorer(["rouge1"]).score(REFERENCE, sentence)["rouge1"].fmeasure
    assert r == pytest.approx(2 * 1.0 * (4 / 11) / (1.0 + 4 / 11))  # by hand: 4 of 4, 4 of 11
    b = BLEU(effective_order=True).sentence_score(sentence, [REFERENCE]).score / 100
    assert b == pytest.approx(2.718281828 ** (1 - 11 / 4), rel=1e-3)  # all n-grams, brevity penalty
    assert weight(sentence, REFERENCE) == pytest.approx(2 * r * b / (r + b))


@pytest.mark.parametrize(("m", "count"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (6, 3), (20, 3)])
def test_how_many_are_hidden(m, count):
    assert masked_count(m) == count
    source, target = gap_pair([f"s{i}" for i in range(m)], [1.0] * m)
    assert source.count("<extra_id_") == target.count("<extra_id_") == count


def test_sentinels_are_numbered_in_text_order_in_source_and_target():
    source, target = gap_pair(list("abcde"), [0.1, 0.3, 0.0, 0.9, 0.2], stop=" ")
    # by weight d, b, e; in the text b, d, e
    assert source == "a <extra_id_0> c <extra_id_1> <extra_id_2>"
    assert target == "<extra_id_0> b <extra_id_1> d <extra_id_2> e"


def test_of_equal_weights_the_first_is_hidden():
    assert gap_pair(list("abc"), [0.5, 0.5, 0.5], stop=" ")[0] == "<extra_id_0> b c"


def test_an_empty_document_is_refused():
    with pytest.raises(DataError, match="without sentences"):
        gap_pair([], [])


def test_the_reference_is_the_rest_or_the_summary():
    seen = []
    weigh(["a", "b", "c"], lambda s, reference: seen.append((s, reference)) or 0.0)
    assert seen == [("a", "b c"), ("b", "a c"), ("c", "a b")]
    seen.clear()
    weigh(["a", "b"], lambda s, reference: seen.append((s, reference)) or 0.0, "z")
    assert seen == [("a", "z"), ("b", "z")]


def test_splitting_at_full_stops():
    text = "The  heart is 3.5 cm.\nNo effusion. Clear"
    assert split_sentences(text) == ["The heart is 3.5 cm", "No effusion", "Clear"]
    assert split_sentences(" . ") == []


@given(
    st.lists(st.text("abc", min_size=1), min_size=1, max_size=9).flatmap(
        lambda s: st.tuples(st.just(s), st.lists(st.floats(0, 1), min_size=len(s), max_size=len(s)))
    ),
    st.integers(1, 5),
)
def test_source_and_target_together_are_the_document(document, most):
    sentences, weights = document
    source, target = gap_pair(sentences, weights, most=most, stop="|")
    hidden = dict(re.findall(r"(<extra_id_\d>) ([abc]+)", target))
    assert [hidden.get(part, part) for part in source.split("|")] == sentences
    assert list(hidden) == [f"<extra_id_{k}>" for k in range(len(hidden))]
