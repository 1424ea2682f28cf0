from __future__ import annotations

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core import batches
from guywire.lab import streams
from guywire.lab.models import Classifier
from guywire.lab.streams import Split
from guywire.lab.studies import load
from guywire.lab.studies.rehearsal_free_cl import CAPTIONS, DRAWINGS, GARMENTS
from guywire.lab.studies.rehearsal_free_cl import arms as arms_module
from guywire.lab.studies.rehearsal_free_cl import claims as claims_module
from guywire.lab.studies.rehearsal_free_cl import drawings as drawings_module
from guywire.lab.studies.rehearsal_free_cl import garments as garments_module
from guywire.lab.studies.rehearsal_free_cl import loop as loop_module
from guywire.lab.studies.rehearsal_free_cl.arms import move_only, regularizers
from guywire.lab.studies.rehearsal_free_cl.claims import CLAIMS
from guywire.lab.studies.rehearsal_free_cl.loop import Recipe, learn, linear_cka
from guywire.lab.studies.runner import run_study
from guywire.lab.studies.statistics import Interval, Table
from guywire.lab.studies.study import Work
from guywire.lab.studies.verdict import at_least, worst

STUDY = load("rehearsal-free-cl")
WITHOUT_DATA = "GUYWIRE_DATA" not in os.environ


@pytest.fixture(scope="module")
def stream():
    config = streams.StreamConfig(
        data="digits", tasks=3, classes=6, max_per_class=30, valid_fraction=0.2, seed=3
    )
    return streams.load(config)


@pytest.fixture
def work(tmp_path):
    return Work("rehearsal-free-cl", {}, "arm", 0, tmp_path)


def classifier(stream):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 8))
    return Classifier(body, 8)


def recipe(terms=(), **more):
    usual = {"loss": "masked", "epochs": 2, "batch_size": 8, "rate": 0.01, "head_rate": 0.02}
    return Recipe(terms, **usual | more)


def run(work, stream, terms=(), tasks=3, part="test", **more):
    model = classifier(stream)
    rows = learn(work, stream, model, recipe(terms, **more), tasks=tasks, part=part)
    return model, {r["metric"]: r["value"] for r in rows if "step" not in r}, rows


def apart(one, other):
    return sum(
        float((p - q).detach().square().sum())
        for p, q in zip(one.backbone.parameters(), other.backbone.parameters(), strict=True)
    )


# The loop.


def test_the_loop_is_plain_training_and_its_numbers_those_of_a_loop_by_hand(work, stream):
    model, found, rows = run(work, stream)
    mine = classifier(stream)
    growing, shuffling = work.generator("head"), work.generator("shuffle")
    seen = np.full((3, 3), np.nan)
    given = seen.copy()
    so_far = []
    for t, task in enumerate(stream.tasks):
        mine.grow(2, growing)
        groups = [
            {"params": list(mine.head.parameters()), "lr": 0.02},
            {"params": list(mine.backbone.parameters()), "lr": 0.01},
        ]
        optimizer = torch.optim.Adam(groups, fused=True)
        for _ in range(2):
            for x, y in stream.batches(task.train, 8, shuffling):
                logits = mine(x)[:, 2 * t : 2 * t + 2]
                loss = nn.functional.cross_entropy(logits, y - 2 * t)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        right = total = 0
        for n in range(t + 1):
            ((x, y),) = stream.batches(stream.tasks[n].test, 10_000)
            with torch.no_grad():
                logits = mine(x)
            hits = logits.argmax(1) == y
            seen[t, n] = hits.double().mean()
            given[t, n] = (logits[:, 2 * n : 2 * n + 2].argmax(1) + 2 * n == y).double().mean()
            right, total = right + int(hits.sum()), total + len(y)
        so_far.append(right / total)
    for ours, theirs in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert found["accuracy"] == pytest.approx(so_far[-1])
    curve = [(r["step"], r["value"]) for r in rows if r["metric"] == "accuracy_so_far"]
    assert curve == [(i + 1, pytest.approx(a)) for i, a in enumerate(so_far)]
    drops = [(1 / (i + 1)) * sum(seen[n, n] - seen[i, n] for n in range(i)) for i in (1, 2)]
    assert found["forgetting_global"] == pytest.approx(sum(drops) / 2)
    assert found["forgetting_local"] == pytest.approx(np.mean(np.diag(given)[:2] - given[2, :2]))
    assert found["learning_accuracy"] == pytest.approx(np.diag(given).mean())


def test_strength_zero_is_plain_training_bit_for_bit(work, stream):
    plain, _, _ = run(work, stream)
    for term in (
        gw.L2(0.0),
        gw.EWC(0.0),
        gw.FeatureDistillation(0.0, layer="backbone", at="output"),
    ):
        held, _, _ = run(work, stream, [term])
        for a, b in zip(plain.parameters(), held.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_start_is_an_anchor_only_where_it_is_worth_one(work, stream):
    start = classifier(stream)
    strong = {"decoupled": True}
    # Decoupled at rate 0.01, a strength of 50 takes back the whole distance at every step.
    one, _, _ = run(work, stream, [gw.L2(50.0, select="backbone.*", **strong)], tasks=1)
    for (name, p), q in zip(
        one.backbone.named_parameters(), start.backbone.parameters(), strict=True
    ):
        assert torch.allclose(p, q, atol=0.011), name  # no farther than one step of Adam
    free, _, _ = run(
        work, stream, [gw.L2(50.0, select="backbone.*", **strong)], tasks=1, anchored=False
    )
    plain, _, _ = run(work, stream, tasks=1)
    for a, b in zip(free.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_from_a_random_start_l2_holds_from_the_second_task_on(work, stream):
    _, plain, _ = run(work, stream, tasks=2)
    l2 = gw.L2(10.0)
    held, found, _ = run(work, stream, [l2], tasks=2, anchored=False)
    assert found["moved"] != plain["moved"]
    first, _, _ = run(work, stream, tasks=1)
    free, _, _ = run(work, stream, tasks=2)
    assert apart(held, first) < apart(free, first) / 4
    # The first block of the head is held with the rest, the second was free.
    assert {n for n in l2.anchors_ if n.startswith("head")} == {
        "head.blocks.0.weight",
        "head.blocks.0.bias",
    }


def test_a_new_heads_random_rows_are_never_an_anchor(work, stream):
    l2 = gw.L2(1.0)
    model, rule = classifier(stream), recipe([l2])
    loop_module._anchor(model, rule, 0)
    assert not any(name.startswith("head") for name in l2.anchors_)
    assert set(l2.anchors_) == {f"backbone.{n}" for n, _ in model.backbone.named_parameters()}


def test_a_frozen_backbone_forgets_nothing_of_a_tasks_own(work, stream):
    model = classifier(stream)
    move_only(model, [])
    before = copy.deepcopy(model.backbone.state_dict())
    rows = learn(work, stream, model, recipe(), tasks=3, part="valid")
    found = {r["metric"]: r["value"] for r in rows if "step" not in r}
    assert found["forgetting_local"] == 0.0
    assert found["moved"] == 0.0
    assert found["cka"] == pytest.approx(1.0)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_joint_training_sees_everything_and_has_nothing_to_forget(work, stream):
    model, found, rows = run(work, stream, joint=True, loss="softmax", epochs=20)
    assert model.classes == 6
    assert "forgetting_local" not in found
    assert found["accuracy"] > 0.8
    assert [r["step"] for r in rows if r["metric"] == "accuracy_so_far"] == [3]


def test_sigmoids_push_old_logits_down_unless_distillation_covers_them():
    labels = torch.tensor([2, 3])
    for kind, pushed in (
        ("sigmoid", True),
        ("sigmoid-new", False),
        ("masked", False),
        ("softmax", True),
    ):
        logits = torch.zeros(2, 4, requires_grad=True)
        loop_module._loss(kind, logits, labels, (2, 3)).backward()
        assert bool((logits.grad[:, :2] > 0).all()) is pushed, kind
        assert (
            not pushed
            or kind != "sigmoid"
            or torch.allclose(logits.grad[:, :2], torch.tensor(0.25))
        )  # sigma(0) / B


def test_texts_of_a_length_go_together_and_none_is_lost(stream):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (50,), generator=generator)
    ids = (torch.arange(12) < lengths[:, None]).int() * (1 + torch.arange(50)[:, None]).int()
    texts = replace(stream, kind="text", pad_id=0)
    split = Split(ids, torch.arange(50) % 6)
    made = list(loop_module._batches(texts, split, 8, generator))
    rows = sorted(int(row[0]) for batch in made for row in batch["input_ids"])
    assert rows == list(range(1, 51))
    assert all(batches.size_of(batch) <= 8 for batch in made)
    shuffled = texts.batches(split, 8, torch.Generator().manual_seed(1))
    width = sum(batch["input_ids"].numel() for batch in made)
    assert width < 0.85 * sum(batch["input_ids"].numel() for batch in shuffled)


# Representations.


def test_cka_is_the_normalised_hsic_of_gram_matrices():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.randn(30, 6, generator=generator)
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    k = centre @ x.double() @ x.double().T @ centre
    m = centre @ y.double() @ y.double().T @ centre
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-9)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1.0)
    assert linear_cka(x, torch.ones(30, 2)) == 0.0


# The arms.


def test_arms_by_name():
    made = regularizers("PredKD+EWC", 7.0, held="backbone.*", memory=9, head="sigmoid")
    assert [type(r) for r in made] == [gw.PredictionDistillation, gw.EWC]
    assert (made[0].strength, made[1].strength) == (1.0, 7.0)
    assert (made[0].kind, made[1].labels, made[1].select) == ("sigmoid", "true", "backbone.*")
    (alone,) = regularizers("PredKD", 0.3, held=None, memory=9, head="softmax")
    assert (alone.strength, alone.kind) == (0.3, "softmax")
    (replay,) = regularizers("Replay", 1.0, held=None, memory=9, head="sigmoid")
    assert (replay.capacity, replay.criterion) == (9, gw.sigmoid_cross_entropy)
    assert all(
        regularizers(arm, 1.0, held=None, memory=1, head="softmax") == []
        for arm in arms_module.NONE
    )
    with pytest.raises(KeyError):
        regularizers("Magic", 1.0, held=None, memory=1, head="softmax")


def test_only_queries_keys_and_values_of_the_vision_transformer_move():
    stand_in = streams.load(streams.StreamConfig(data="digits", tasks=2, max_per_class=6))
    model = drawings_module._vit(stand_in_of_64(stand_in), torch.Generator().manual_seed(0))
    move_only(
        model,
        ["backbone.*.query.*", "backbone.*.key.*", "backbone.*.value.*", "backbone.*.[qkv]_proj.*"],
    )
    moving = [n for n, p in model.named_parameters() if p.requires_grad]
    width, layers = drawings_module._WIDTH, drawings_module._LAYERS
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == layers * 3 * (width * width + width)
    assert len(moving) == 6 * layers
    model.grow(3, torch.Generator().manual_seed(1))
    assert all(p.requires_grad for p in model.head.parameters())


def stand_in_of_64(stream):
    return replace(stream, size=64, channels=3)


def test_every_strength_that_a_claim_rests_on_is_chosen():
    chosen = {*CAPTIONS, *GARMENTS, *DRAWINGS}
    for claim in CLAIMS:
        assert set(claim.rests_on) <= chosen, claim.name
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


# Data.


def test_a_turned_digit_is_a_class_of_its_own():
    images = torch.arange(60 * 9.0).view(60, 1, 3, 3)
    turned, labels = garments_module._turned(
        (images, torch.arange(60) % 10), torch.Generator().manual_seed(0)
    )
    assert set((labels // 10).tolist()) == {0, 1, 2, 3}
    for image, original, k in zip(turned, images, labels // 10, strict=True):
        assert torch.equal(image, original.rot90(int(k), (1, 2)))
    assert torch.equal(labels % 10, torch.arange(60) % 10)


def test_shifts_bring_in_what_the_edge_shows():
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    still = drawings_module._shifted(images, torch.Generator().manual_seed(1), most=0)
    mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(still, images, strict=True)])
    assert 5 < int(mirrored.sum()) < 35
    assert torch.equal(still[mirrored], images[mirrored].flip(3))
    blank = torch.full((4, 3, 8, 8), 0.7)
    assert torch.equal(drawings_module._shifted(blank, torch.Generator().manual_seed(1)), blank)


def test_the_streams_classes_are_neither_the_largest_nor_the_smallest():
    sizes = [9, 2, 7, 5, 3, 8, 4, 6, 1]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    whole = Split(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels)
    nothing = whole.subset(torch.arange(0))
    task = streams.Task("all", tuple(range(9)), whole, nothing, nothing)
    kept = drawings_module._middle(task, 3)
    assert sorted(sizes[c] for c in kept) == [5, 6, 7]
    part = drawings_module._of(whole, kept)
    assert len(part) == 18
    assert torch.bincount(part.labels).tolist() == [sizes[c] for c in kept]
    others = drawings_module._of(whole, [c for c in range(9) if c not in kept])
    assert len(part) + len(others) == len(whole)


def test_a_seed_changes_the_order_of_classes_and_not_the_test_data():
    labels = torch.arange(6).repeat_interleave(4)
    images = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1)
    part = {"images": images, "labels": labels}
    start = {
        "names": list("abcdef"),
        "parts": {"train": part, "valid": {k: v[::4] for k, v in part.items()}, "test": part},
        "mean": torch.zeros(1),
        "std": torch.ones(1),
    }
    made = {
        (seed, tune): drawings_module._stream(
            start, 3, torch.Generator().manual_seed(seed), tune=tune
        )
        for seed in (0, 1)
        for tune in (False, True)
    }
    assert made[0, False].class_names != made[1, False].class_names
    for (_, tune), found in made.items():
        assert [len(t.classes) for t in found.tasks] == [2, 2, 2]
        assert sum(len(t.test) for t in found.tasks) == 24
        assert sum(len(t.train) for t in found.tasks) == (24 if tune else 30)
        for task in found.tasks:
            for image, label in zip(task.test.inputs.flatten(), task.test.labels, strict=True):
                assert "abcdef"[int(image) // 4] == found.class_names[int(label)]


@pytest.mark.data
@pytest.mark.skipif(WITHOUT_DATA, reason="GUYWIRE_DATA is not set")
def test_strengths_are_chosen_on_other_orders_and_never_on_test_data():
    def images(seed, tune):
        garments_module._stream.cache_clear()
        return garments_module._stream(14, 40, 0.4, seed, tune)

    test, tuned = images(0, False), images(1000, True)
    assert test.class_names != tuned.class_names

    def keys(stream, *names):
        return {
            bytes(x.numpy().tobytes())
            for task in stream.tasks
            for name in names
            for x in getattr(task, name).inputs
        }

    assert keys(test, "test") == keys(tuned, "test")
    assert not keys(tuned, "train", "valid") & keys(test, "test")
    assert not keys(tuned, "train") & keys(tuned, "valid")
    assert all(len(task.valid) == 0 for task in test.tasks)


# The rules.


def interval(*values):
    table = Table(
        {"condition": "a", "seed": i, "metric": "m", "value": v} for i, v in enumerate(values)
    )
    return table.mean("a", "m")


def test_at_least():
    assert at_least(interval(0.01, 0.0, -0.01)) == "reproduced"
    assert at_least(interval(-0.004, -0.004, -0.004)) == "reproduced"
    assert at_least(interval(-0.02, -0.03, -0.04)) == "not reproduced"
    assert at_least(interval(-0.05, 0.0, 0.01)) == "inconclusive"
    assert at_least(interval(0.1, 0.1)) == "inconclusive"
    assert at_least(Interval(0.1, None, None, {0: 0.1, 1: 0.1, 2: 0.1})) == "inconclusive"


def test_a_claim_is_as_good_as_its_worst_part():
    assert worst(["reproduced", "reproduced"]) == "reproduced"
    assert worst(["inconclusive", "not reproduced", "reproduced"]) == "not reproduced"


def table(accuracy, forgetting=None):
    """Every condition of the study at one accuracy, but for those named; a little noise by seed."""
    names = [*CAPTIONS, *GARMENTS, *DRAWINGS]
    names += [f"captions: {arm}" for arm in ("frozen", "plain")]
    names += [f"drawings: {arm}" for arm in ("frozen", "plain", "plain, all")]
    names += [
        f"garments, {start}: {arm}"
        for start in ("random", "pretrained")
        for arm in ("plain", "PredKD")
    ]
    rows = []
    for name in names:
        for seed in range(3):
            more = {
                "accuracy": accuracy.get(name, 0.2) + 0.001 * seed,
                "forgetting_global": (forgetting or {}).get(name, 0.1),
                "forgetting_local": (forgetting or {}).get(name, 0.1),
            }
            rows += [
                {"condition": name, "seed": seed, "metric": m, "value": v} for m, v in more.items()
            ]
    return Table(rows)


PAPER = {
    **dict.fromkeys(("captions: L2",), 0.30),
    **{f"garments, random: PredKD{more}": 0.30 for more in ("", "+EWC", "+L2")},
    "garments, random: PredKD+FeatKD": 0.28,
    "garments, pretrained: PredKD": 0.31,
    "garments, pretrained: PredKD+L2": 0.40,
    "garments, pretrained: PredKD+EWC": 0.36,
    "drawings: L2": 0.30,
}
PAPER_FORGETTING = {"captions: EWC": 0.01, "garments, random: PredKD+EWC": 0.02}


def judged(table):
    return {claim.name: claim.judge(table) for claim in CLAIMS}


def test_the_papers_numbers_reproduce_every_claim():
    for name, judgement in judged(table(PAPER, PAPER_FORGETTING)).items():
        assert judgement.verdict == "reproduced", (name, judgement)
        assert judgement.allows.endswith(".")


@pytest.mark.parametrize(
    ("claim", "accuracy", "forgetting"),
    [
        ("captions: L2 holds", {"captions: L2": 0.22}, {}),
        ("captions: L2 is enough", {"captions: FeatKD": 0.32}, {}),
        ("captions: worth moving", {"captions: frozen": 0.295}, {}),
        ("captions: forgetting", {}, {"captions: EWC": 0.06, "captions: L2": 0.06}),
        ("garments: alone is not enough", {"garments, random: FeatKD": 0.26}, {}),
        ("garments: parameters from scratch", {"garments, random: PredKD+L2": 0.25}, {}),
        ("garments: parameters from scratch", {}, {"garments, random: PredKD+EWC": 0.2}),
        ("garments: pretraining turns the order", {"garments, pretrained: PredKD+L2": 0.33}, {}),
        ("garments: L2 is enough", {"garments, pretrained: PredKD+EWC": 0.42}, {}),
        ("drawings: self-attention is the place", {"drawings: L2, all": 0.31}, {}),
        ("drawings: self-attention is the place", {"drawings: PredKD": 0.31}, {}),
        ("drawings: L2 holds", {"drawings: plain": 0.28}, {}),
    ],
)
def test_other_numbers_do_not(claim, accuracy, forgetting):
    found = judged(table(PAPER | accuracy, PAPER_FORGETTING | forgetting))[claim]
    assert found.verdict == "not reproduced", found


def test_a_tie_between_l2_here_and_everywhere_is_no_reproduction():
    found = judged(table(PAPER | {"drawings: L2, all": 0.30}, PAPER_FORGETTING))
    assert found["drawings: self-attention is the place"].verdict == "inconclusive"


def test_sentences_name_percentage_points():
    said = claims_module.points(interval(0.031, 0.031, 0.031))
    assert said == "+3.1 [3.1, 3.1] points"


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(WITHOUT_DATA, reason="GUYWIRE_DATA is not set")
def test_the_whole_study_runs_in_smoke_size(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run_study(
        "rehearsal-free-cl", tmp_path, smoke=True, workers=1, cache=tmp_path / "cache"
    )
    assert all(check["holds"] for check in result["checks"])
    assert {claim["verdict"] for claim in result["claims"]} == {"smoke"}
    assert len(result["choices"]) == len({*CAPTIONS, *GARMENTS, *DRAWINGS})
    conditions = {row["condition"] for row in result["statistics"]}
    for plot in STUDY.plots:
        assert set(plot.conditions) <= conditions
