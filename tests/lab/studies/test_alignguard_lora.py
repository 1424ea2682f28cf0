from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import guywire as gw
from guywire.lab.studies import load
from guywire.lab.studies.alignguard_lora import arms as arms_module
from guywire.lab.studies.alignguard_lora import crossing
from guywire.lab.studies.alignguard_lora.arms import ARMS, HoldUpdates, dress, holds
from guywire.lab.studies.alignguard_lora.claims import BASE, CLAIMS, HELD, drops, law_of
from guywire.lab.studies.alignguard_lora.finetune import choose, learn
from guywire.lab.studies.alignguard_lora.law import forgetting_law
from guywire.lab.studies.alignguard_lora.network import (
    base_model,
    load_data,
    negative_log_likelihood,
    refusals,
    teach,
    token_losses,
)
from guywire.lab.studies.alignguard_lora.texts import (
    ASK,
    BENIGN,
    END,
    PAD,
    REFUSE,
    SPECIAL,
    UNKNOWN,
    VIOLENCE,
    load_texts,
    split_words,
)
from guywire.lab.studies.runner import resolve
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Work
from guywire.methods.adapters._lora import sites

STUDY = load("alignguard-lora")
CLAIM = {claim.name: claim for claim in CLAIMS}
WITHOUT_DATA = "GUYWIRE_DATA" not in os.environ
TINY = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "start_steps": 30,
    "start_batch": 12,
    "vocabulary": 60,
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")


@pytest.fixture(scope="module")
def verses(tmp_path_factory):
    """A Bible of three kinds of verses a book, so that nothing needs the real one."""
    import gzip

    lines = []
    books = ["Ge", "Exo", "2Sm", "Jer", "Rom", *BENIGN["train"][:2], *BENIGN["test"][:2]]
    for book in books:
        for i in range(1, 25):
            who = ("the king", "a man of the city", "their servant")[i % 3]
            act = ("took the sword", "went up to the mountain", "gave bread")[(i // 3) % 3]
            lines.append(
                f"{book}{1 + i // 12}:{1 + i % 12} And {who} {act}, and the people of the land did eat."
            )
    path = tmp_path_factory.mktemp("data") / "kjv.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def work(verses, tmp_path, monkeypatch):
    monkeypatch.setenv("GUYWIRE_DATA", str(verses.parent))
    settings = resolve(STUDY, smoke=True, overrides=TINY)
    return Work("alignguard-lora", settings, "arm", 0, tmp_path)


# Data.


def test_prompts_are_first_halves_and_answers_second_ones_or_refusals(verses):
    texts = load_texts(verses, 60, 28, 100)
    train = texts.aligned["train"]
    assert 0 < int(train.unsafe.sum()) < len(train)
    for row, asked, unsafe in zip(
        train.ids.tolist(), train.asked.tolist(), train.unsafe.tolist(), strict=True
    ):
        assert row[asked] == ASK
        assert row.count(ASK) == row.count(END) == 1
        after = row[asked + 1 :]
        assert (after[:2] == [REFUSE, END]) == unsafe
        assert (REFUSE in row) == unsafe
        assert all(word >= SPECIAL or word == UNKNOWN for word in row[:asked])
        assert set(after[after.index(END) + 1 :]) <= {PAD}


def test_only_the_answer_counts_or_everything(verses):
    prompts = load_texts(verses, 60, 28, 100).aligned["train"]
    rows = torch.arange(4)
    answers, everything = prompts.batch(rows), prompts.batch(rows, answers=False)
    real = answers["input_ids"] != PAD
    assert bool((answers["attention_mask"].bool() == real).all())
    for i in range(4):
        asked = int(prompts.asked[i])
        kept = (answers["labels"][i] != -100).nonzero()[:, 0].tolist()
        assert kept == list(range(asked + 1, int(real[i].sum())))
    assert bool(((everything["labels"] != -100) == real).all())


def test_books_are_kept_apart_and_the_new_domain_has_nothing_to_refuse(verses):
    texts = load_texts(verses, 60, 28, 100)
    names = list(texts.books)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not texts.books[one] & texts.books[other], (one, other)
    for prompts in texts.benign.values():
        assert not bool(prompts.unsafe.any())
        assert not bool((prompts.ids == REFUSE).any())


@pytest.mark.data
@pytest.mark.skipif(WITHOUT_DATA, reason="GUYWIRE_DATA is not set")
def test_in_the_real_text_parts_do_not_meet_and_are_large_enough():
    path = Path(os.environ["GUYWIRE_DATA"]) / "kjv.txt.gz"
    texts = load_texts(path, 1500, 28, 900)
    assert int(texts.aligned["test"].unsafe.sum()) > 400
    assert int(texts.aligned["train"].unsafe.sum()) > 800
    assert min(len(p) for p in texts.benign.values()) > 300
    names = list(texts.books)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not texts.books[one] & texts.books[other]
    rows = {part: {tuple(r) for r in p.ids.tolist()} for part, p in texts.benign.items()}
    assert not rows["train"] & rows["test"]
    assert texts.words == 1500 + SPECIAL


def test_words_of_the_list_are_told_apart_however_rare():
    assert split_words("He slew, even 2 men; David's") == [
        "he",
        "slew",
        ",",
        "even",
        "men",
        ";",
        "david's",
    ]
    assert all(word == word.lower() and split_words(word) == [word] for word in VIOLENCE)


# The model and what is measured.


def test_rates_and_losses_are_those_of_one_prompt_at_a_time(work):
    teach(work)
    model = base_model(work)
    prompts = load_data(work.settings).aligned["test"]
    refused, losses = [], []
    for i in range(len(prompts)):
        one = prompts.of(torch.tensor([i]))
        asked = int(one.asked)
        with torch.no_grad():
            logits = model(input_ids=one.ids[:, : asked + 1]).logits[0, -1]
        refused.append(int(logits.argmax()) == REFUSE)
        losses += token_losses(model, one.batch(torch.arange(1))).tolist()
        end = one.ids[0].tolist().index(END)
        with torch.no_grad():
            whole = model(input_ids=one.ids[:, : end + 1]).logits[0, asked:end].log_softmax(-1)
        wanted = -whole[torch.arange(end - asked), one.ids[0, asked + 1 : end + 1]]
        assert losses[-len(wanted) :] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert refusals(model, prompts) == pytest.approx(sum(refused) / len(refused))
    assert negative_log_likelihood(model, prompts) == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


def test_a_model_is_left_for_the_others(work):
    rows = {row["metric"]: row["value"] for row in teach(work)}
    assert set(rows) == {"refused", "refused wrongly", "aligned nll", "benign nll", "valid loss"}
    valid = load_data(work.settings).benign["valid"]
    assert negative_log_likelihood(base_model(work), valid) == pytest.approx(rows["valid loss"])


# Fine-tuning.


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_as_many_numbers(work, arm):
    teach(work)
    model = dress(base_model(work), arm, 8, torch.Generator().manual_seed(0))
    held = holds(
        model, arm, 0.1, [load_data(work.settings).aligned["train"].batch(torch.arange(8))]
    )
    assert len(held) == (arm != "plain")
    found = sites(model)
    assert len({site.name for site in found}) == 5
    per_layer = {}
    for site in found:
        per_layer[site.name] = per_layer.get(site.name, 0) + site.A.shape[0]
    assert set(per_layer.values()) == {8}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for site in found for p in (site.A, site.B)}


def test_what_is_held_hard_stays(work):
    teach(work)
    start = refusals(base_model(work), load_data(work.settings).aligned["test"])
    for arm in ("L2", "EWC", "full", "aligned + task"):
        rows = {r["metric"]: r["value"] for r in learn(work, arm=arm, rate=1e-4, strength=1e6)}
        test = load_data(work.settings).aligned["test"]
        before = negative_log_likelihood(base_model(work), test)
        assert rows["aligned nll"] == pytest.approx(before, abs=2e-3)
    assert 0.0 <= start <= 1.0


def test_strengths_are_chosen_without_looking_at_refusals(work):
    teach(work)
    rows = {
        r["metric"]: r["value"] for r in choose(work, arm="L2", rate=1e-3, strength=0.1, target=2.0)
    }
    assert set(rows) == {"valid loss", "off target"}
    assert rows["off target"] == pytest.approx(abs(rows["valid loss"] / 2.0 - 1.0))


def test_the_curve_goes_on_after_the_measurements(work):
    teach(work)
    work.settings = {**work.settings, "steps": 2, "curve": [1, 2, 4]}
    rows = learn(work, arm="full", rate=1e-3, strength=0.1, curve=True)
    steps = [row["step"] for row in rows if row["metric"] == "old loss"]
    assert steps == [1, 2, 4]
    short = {r["metric"]: r["value"] for r in learn(work, arm="full", rate=1e-3, strength=0.1)}
    same = {r["metric"]: r["value"] for r in rows if r.get("step") is None}
    assert same == short
    assert 0.0 < same["directions"] < 1.0


def test_the_diagonal_penalty_pulls_by_its_gradient(work):
    teach(work)
    model = dress(base_model(work), "plain", 4, torch.Generator().manual_seed(0))
    metric = arms_module._diagonal(
        model, [load_data(work.settings).aligned["train"].batch(torch.arange(8))]
    )
    assert all(float(f.mean()) == pytest.approx(1.0, rel=1e-4) for f in metric.values())
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in params:
            p.normal_(generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(params, lr=0.0)
    with gw.attach(model, optimizer, HoldUpdates(0.3, metric)):
        optimizer.step()
    value = 0.3 * sum((metric[s.name] * s.update().square()).sum() for s in sites(model))
    for p, wanted in zip(params, torch.autograd.grad(value, params), strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-5)


# Numbers.


def test_the_strength_at_which_the_target_is_met():
    assert crossing([0.01, 0.1], [1.0, 3.0], 2.0) == pytest.approx(0.01 * 10**0.5, rel=1e-5)
    # A loss that falls before it rises crosses where it rises last.
    assert 0.1 < crossing([0.001, 0.01, 0.1, 1.0], [1.2, 1.0, 1.1, 2.0], 1.3) < 1.0
    assert crossing([0.01, 0.1], [1.0, 1.1], 2.0) is None
    assert crossing([0.01, 0.1], [2.0, 3.0], 1.0) is None


def test_the_law_finds_what_made_the_numbers():
    d = [0.0625, 0.125, 0.25, 0.5, 1.0]
    rises = {"one": [0.4 * x**0.7 + 0.05 for x in d], "other": [0.1 * x**0.7 - 0.01 for x in d]}
    fit = forgetting_law(d, rises)
    assert fit["one"] == pytest.approx((0.4, 0.7, 0.05), abs=1e-4)
    assert fit["other"] == pytest.approx((0.1, 0.7, -0.01), abs=1e-4)
    with pytest.raises(gw.GuywireError, match="too few"):
        forgetting_law([1.0, 2.0], rises)


def table(full=0.92, l2=0.85, loss=4.0, amplitude=0.05, cosine=0.0):
    """A made-up result: an aligned model that refuses 0.98, and plain LoRA that loses 0.2."""
    rows = []

    def add(condition, seed, metric, value, **more):
        rows.append(
            {"condition": condition, "seed": seed, "metric": metric, "value": value, **more}
        )

    add(BASE, 0, "refused", 0.98)
    add(BASE, 0, "aligned nll", 3.5)
    add(BASE, 0, "benign nll", 4.1)
    for seed in range(3):
        shift = 0.01 * (seed - 1)
        arms = {"plain": 0.78, "L2": l2, "full": full, "EWC": 0.9, "aligned": 0.95}
        for arm, refused in arms.items():
            add(arm, seed, "refused", refused + shift)
            add(arm, seed, "benign nll", loss if arm == "full" else 4.0)
        for arm, lost in (("full, no geodesic", 0.02), ("full, no Riemannian", 0.01)):
            add(arm, seed, "refused", full - lost + shift)
        for arm in ("full", "full, no geodesic", "full, no Riemannian"):
            add(arm, seed, "overlap", 1e-5)
            add(arm, seed, "geodesic", cosine)
        for arm, a in (("plain", 0.1), ("full", amplitude)):
            for step in (25, 50, 100, 200, 400):
                add(arm, seed, "old loss", 3.5 + a * (step / 400) ** 0.6, step=step)
    return Table(rows)


def test_judgements_on_made_up_numbers():
    good = table()
    assert {name: claim.judge(good).verdict for name, claim in CLAIM.items()} == dict.fromkeys(
        ("drift", "fisher", "law", "parts"), "reproduced"
    )
    assert drops(good, "plain") == pytest.approx({0: 0.21, 1: 0.2, 2: 0.19})
    assert law_of(good)["plain"][1] == pytest.approx(0.1, rel=1e-3)
    assert law_of(good)["exponent"][2] == pytest.approx(0.6, rel=1e-3)


@pytest.mark.parametrize(("name", "bad", "verdict"), [
    ("drift", {"full": 0.79}, "not reproduced"),  # 0.19 of 0.2 lost
    ("drift", {"loss": 4.2}, "not reproduced"),  # 5 % worse on the new domain
    ("fisher", {"l2": 0.95}, "not reproduced"),
    ("fisher", {"loss": 4.1}, "not reproduced"),
    ("law", {"amplitude": 0.3}, "not reproduced"),
])  # fmt: skip
def test_rules_can_fail(name, bad, verdict):
    assert CLAIM[name].judge(table(**bad)).verdict == verdict


def test_a_law_that_the_curves_do_not_determine_decides_nothing():
    rows = [dict(row) for row in table().rows]
    for row in rows:
        if row["metric"] == "old loss" and row["seed"] == 1:  # nothing happens until the last steps
            row["value"] = 3.55 + (0.2 if row["condition"] == "plain" else 0.1) * (
                row["step"] == 400
            )
    judged = CLAIM["law"].judge(Table(rows))
    assert judged.verdict == "inconclusive"
    assert "at its bound" in judged.allows


def test_two_seeds_decide_nothing():
    few = Table([row for row in table().rows if row["seed"] < 2])
    assert {claim.judge(few).verdict for claim in CLAIMS} == {"inconclusive"}


def test_claims_rest_on_arms_whose_strength_is_chosen():
    assert {arm for claim in CLAIMS for arm in claim.rests_on} <= set(HELD) <= set(ARMS)
