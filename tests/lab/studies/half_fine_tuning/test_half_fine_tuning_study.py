"""The study of half fine-tuning: its texts do not leak, its arms do what they say, its rules."""

from __future__ import annotations

import math
import os

import pytest
import torch

from guywire.lab.studies import load
from guywire.lab.studies.half_fine_tuning import claims, loop, texts
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Work

pytest.importorskip("transformers")
needs_data = pytest.mark.skipif("GUYWIRE_DATA" not in os.environ, reason="needs GUYWIRE_DATA")
STUDY = load("half-fine-tuning")
SETTINGS = {**STUDY.settings, **STUDY.smoke}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    rows = loop.pretrain(Work("half-fine-tuning", SETTINGS, "base", 0, folder))
    assert {row["metric"] for row in rows} == {"base_bits", "base_accuracy"}
    return folder


def learnt(folder, arm, **words):
    work = Work("half-fine-tuning", SETTINGS, arm, 0, folder)
    rows = loop.learn(work, arm=arm, **{"rate": 3e-3} | words)
    return {row["metric"]: row["value"] for row in rows if "step" not in row}, rows


@needs_data
@pytest.mark.data
def test_no_chapter_is_in_two_parts():
    for parts in texts.chapters().values():
        sets = [set(parts[p]) for p in ("train", "valid", "test")]
        assert all(sets)
        assert not sets[0] & sets[1]
        assert not sets[0] & sets[2]
        assert not sets[1] & sets[2]
    everything = [set().union(*map(set, p.values())) for p in texts.chapters().values()]
    assert not set.intersection(*everything)


@needs_data
@pytest.mark.data
def test_rows_predict_each_token_once():
    tokenizer = texts.tokenizer_of(["in the beginning"] * 5, 300)
    rows = texts._rows(tokenizer, ["in the beginning was the word"] * 4, 8)
    ids = [
        i
        for code in tokenizer.encode_batch(["in the beginning was the word"] * 4)
        for i in code.ids
    ]
    assert rows[:, 1:].flatten().tolist() == ids[1 : 1 + rows[:, 1:].numel()]
    assert torch.equal(rows[1:, 0], rows[:-1, -1])


@needs_data
@pytest.mark.data
def test_an_untrained_model_has_the_loss_of_guessing():
    model = loop.network(SETTINGS, torch.Generator().manual_seed(0))
    rows = torch.randint(512, (8, 65))
    corpus = texts.Corpus(rows, rows, rows, bytes_a_token=2.0)
    bits, accuracy = loop.evaluate(model, corpus, rows)
    assert bits == pytest.approx(math.log2(512) / 2.0, rel=0.03)
    assert accuracy < 0.05


@needs_data
@pytest.mark.data
def test_half_of_the_memory_and_the_same_start(folder):
    full, rows = learnt(folder, "FFT")
    half, other = learnt(folder, "HFT")
    lora, _ = learnt(folder, "LoRA")
    assert lora["held_mb"] < half["held_mb"] < full["held_mb"]
    first = [next(r["value"] for r in side if r.get("step") == 0) for side in (rows, other)]
    assert first[0] == first[1]
    again, _ = learnt(folder, "HFT")
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in half.items() if "seconds" not in k
    }
    reset = loop.reset(Work("half-fine-tuning", SETTINGS, "Half-Reset", 0, folder))
    found = {row["metric"]: row["value"] for row in reset}
    assert set(found) == {"forgotten", "last_gain"}
    assert found["last_gain"] != full["last_gain"]


@needs_data
@pytest.mark.data
def test_tuning_looks_at_validation_chapters_only(folder, monkeypatch):
    seen = []
    evaluate = loop.evaluate

    def watched(model, corpus, rows):
        seen.append("test" if rows.data_ptr() == corpus.test.data_ptr() else "valid")
        return evaluate(model, corpus, rows)

    monkeypatch.setattr(loop, "evaluate", watched)
    found, rows = learnt(folder, "L2", strength=0.1, tune=True)
    assert set(found) == {"valid_bits", "valid_both"}
    assert len(rows) == 2
    # What is looked at before, for the stream's gains, is of the start and not of a choice.
    assert seen[-2:] == ["valid", "valid"]


def table(**values):
    """Return a table of three seeds from ``metric -> condition -> three values``."""
    rows = [
        {"condition": condition, "seed": seed, "metric": metric, "value": value}
        for metric, conditions in values.items()
        for condition, triple in conditions.items()
        for seed, value in enumerate(triple)
    ]
    return Table(rows)


def judged(name, made):
    return next(c for c in claims.CLAIMS if c.name == name).judge(made).verdict


def test_the_rule_of_forgetting():
    for half, verdict in (
        ([0.07, 0.07, 0.07], "reproduced"),
        ([0.07, 0.07, 0.079], "inconclusive"),  # one seed beyond 0.75
        ([0.09, 0.1, 0.12], "not reproduced"),
    ):
        made = table(forgotten={"FFT": [0.1, 0.1, 0.1], "HFT": half})
        assert judged("forgets less", made) == verdict


def test_the_rule_of_backward_transfer():
    full = {"FFT": [-0.1, -0.1, -0.1]}
    good = table(backward_transfer={**full, "HFT": [-0.05, -0.06, -0.07]})
    bad = table(backward_transfer={**full, "HFT": [-0.09, -0.1, -0.1]})
    assert judged("less backward transfer", good) == "reproduced"
    assert judged("less backward transfer", bad) == "not reproduced"


def test_the_rules_of_learning_and_of_half_reset():
    near = table(learnt_accuracy={"FFT": [0.4, 0.4, 0.4], "HFT": [0.396, 0.397, 0.398]})
    far = table(learnt_accuracy={"FFT": [0.4, 0.4, 0.4], "HFT": [0.38, 0.39, 0.39]})
    assert judged("learns as much", near) == "reproduced"
    assert judged("learns as much", far) == "not reproduced"
    for forgotten, gain, verdict in (
        (0.06, 0.12, "reproduced"), (0.08, 0.12, "not reproduced"), (0.06, 0.05, "not reproduced"),
    ):  # fmt: skip
        made = table(
            forgotten={"FFT": [0.1] * 3, "Half-Reset": [forgotten] * 3},
            last_gain={"FFT": [0.2] * 3, "Half-Reset": [gain] * 3},
        )
        assert judged("Half-Reset", made) == verdict


def test_the_rules_of_balance_and_cost():
    arms = ("HFT", "HFT, layers", "HFT, model")
    rising = table(forgotten=dict(zip(arms, ([0.1] * 3, [0.2] * 3, [0.3] * 3), strict=True)))
    falling = table(forgotten=dict(zip(arms, ([0.3] * 3, [0.2] * 3, [0.1] * 3), strict=True)))
    assert judged("balance matters", rising) == "reproduced"
    assert judged("balance matters", falling) == "not reproduced"
    cheap = table(
        seconds_a_step={"FFT": [1.0] * 3, "HFT": [0.9] * 3},
        held_mb={"FFT": [4.0] * 3, "HFT": [2.4] * 3},
    )
    assert judged("it is cheaper", cheap) == "reproduced"


def test_equal_loss_is_interpolated_along_the_way():
    rows = []
    # Full: the domain falls 3, 2, 1 while the base rises 0, 1, 2. Half: 3, 2.5, 2 and 0, 0.2, 0.4.
    for condition, domain, base in (
        ("FFT", (3.0, 2.0, 1.0), (0.0, 1.0, 2.0)), ("HFT", (3.0, 2.5, 2.0), (0.0, 0.2, 0.4)),
    ):  # fmt: skip
        for seed in range(3):
            for step in range(3):
                for metric, values in (("way_domain", domain), ("way_base", base)):
                    rows.append(
                        {"condition": condition, "seed": seed, "metric": metric,
                         "value": values[step], "step": step}
                    )  # fmt: skip
    made = Table(rows)
    more = claims.way_at_equal_loss(made, "FFT", "HFT")
    assert more.mean == pytest.approx(1.0 - 0.4)  # at the loss of 2, where half fine-tuning ends
    assert judged("not only a smaller step", made) == "reproduced"
