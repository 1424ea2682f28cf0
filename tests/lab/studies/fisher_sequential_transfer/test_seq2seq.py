from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from guywire.core.errors import UsageError
from guywire.lab.studies.fisher_sequential_transfer import seq2seq

TEXTS = ["the lord is my shepherd", "i shall not want", "he leadeth me beside the still waters"] * 4
PREFIX = "summarize: "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    return seq2seq.build_tokenizer("tiny", file, TEXTS, (PREFIX,), vocab=120)


@pytest.fixture
def model(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return seq2seq.build_model("tiny", tokenizer, layers=1, width=16, dropout=0.1)


def encode(tokenizer, pairs):
    return seq2seq.encode(pairs, tokenizer, PREFIX)


def test_prefix_and_sentinels_are_one_token_each_and_texts_survive(tokenizer):
    ((source, target),) = encode(tokenizer, [("<extra_id_0> i shall", "<extra_id_0> not want")])
    words = [token for token in tokenizer.convert_ids_to_tokens(source) if token != "\u2581"]
    assert words[:2] == ["summarize:", "<extra_id_0>"]
    assert tokenizer.convert_ids_to_tokens(source[-1]) == "</s>"
    assert target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(target, skip_special_tokens=True).strip() == "not want"


def test_long_texts_are_cut(tokenizer):
    (pair,) = seq2seq.encode(
        [(" ".join(TEXTS), " ".join(TEXTS))], tokenizer, PREFIX, source_length=9, target_length=7
    )
    assert [len(ids) for ids in pair] == [9, 7]
    assert pair[1][-1] == tokenizer.eos_token_id


def test_padding_is_no_label_and_gets_no_attention():
    batch = seq2seq.collate([([5, 6, 1], [7, 1]), ([5, 1], [7, 8, 9, 1])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100, -100], [7, 8, 9, 1]]


def test_an_epoch_shows_every_sequence_once_in_an_order_of_its_own():
    items = [([i] * (1 + i % 5), [1]) for i in range(2, 100)]

    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            int(row[0])
            for batch in seq2seq.shuffled(items, 8, 0, generator)
            for row in batch["input_ids"]
        ]

    assert sorted(order(0)) == list(range(2, 100))
    assert order(0) == order(0)
    assert order(0) != order(1)


def test_similar_lengths_stand_together():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (256,), generator=generator).tolist()
    items = [([3] * n, [1]) for n in lengths]
    padded = sum(b["input_ids"].numel() for b in seq2seq.shuffled(items, 8, 0, generator))
    assert padded < 1.15 * sum(lengths)


def test_the_loss_is_the_mean_over_tokens_whatever_the_batch(tokenizer, model):
    items = encode(tokenizer, list(itertools.pairwise(TEXTS)))
    model.eval()
    total, count = 0.0, 0
    for source, target in items:  # one unpadded sequence at a time
        with torch.no_grad():
            out = model(input_ids=torch.tensor([source]), labels=torch.tensor([target]))
        total += float(out.loss) * len(target)
        count += len(target)
    model.train()
    for size in (1, 3, 64):
        found = seq2seq.token_loss(model, items, tokenizer.pad_token_id, size=size)
        assert found == pytest.approx(total / count, rel=1e-5)
    assert model.training


def test_writing_gives_one_text_each_and_looks_at_no_target(tokenizer, model):
    items = encode(tokenizer, [(t, t) for t in TEXTS[:3]])
    written = seq2seq.write(model, items, tokenizer, longest=4)
    assert len(written) == 3
    other = [(source, [1]) for source, _ in items]
    assert seq2seq.write(model, other, tokenizer, longest=4) == written


def test_scores_are_the_libraries_own():
    scores = seq2seq.text_scores(["the cats sat", "no"], ["the cat sat", "yes"])
    # stemmed, "cats" is "cat": the first text is right, the second wholly wrong
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(50.0)
    # precisions over the corpus, unstemmed and without brevity penalty: 2 of 4 words, 0 of 2 pairs
    assert scores["bleu1"] == pytest.approx(50.0)
    assert scores["bleu2"] == 0.0
    perfect = seq2seq.text_scores(["a b c d"], ["a b c d"])
    assert all(value == pytest.approx(100.0) for value in perfect.values())
    with pytest.raises(UsageError, match="1 texts cannot be scored against 2"):
        seq2seq.text_scores(["a"], ["a", "b"])


def test_a_local_model_of_the_t5_family(tmp_path, tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = seq2seq.build_tokenizer(f"hf:{tmp_path}", tmp_path / "unused.json")
    assert found.get_vocab() == tokenizer.get_vocab()
    model = seq2seq.build_model(f"hf:{tmp_path}", found, layers=9, width=9, dropout=0.9)
    assert isinstance(model, nn.Module)
    assert model.config.d_model == 16


def test_a_tokenizer_without_sentinels_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no <extra_id_0>"):
        seq2seq.build_tokenizer(f"hf:{tmp_path}", tmp_path / "unused.json")
