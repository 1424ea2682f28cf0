"""The PEGO study: its data, its loop by hand, and a small run of all of it."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.checkpoint import save
from guywire.lab.studies import load
from guywire.lab.studies.pego import SETTINGS, SMOKE, data, finetune, network
from guywire.lab.studies.pego.data import STYLES, Emoji, Parts
from guywire.lab.studies.pego.finetune import ARMS
from guywire.lab.studies.study import Work
from guywire.methods.adapters._lora import sites

STUDY = load("pego")
with_data = pytest.mark.skipif("GUYWIRE_DATA" not in os.environ, reason="needs $GUYWIRE_DATA")
SMALL = {
    **SETTINGS,
    "side": 16,
    "patch": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "steps": 6,
    "batch": 4,
    "start_epochs": 1,
    "start_batch": 8,
    "head_rate": 0.02,
    "most_old": 20,
}


def emoji(count=24, classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, len(STYLES), 3, 16, 16), generator=draw, dtype=torch.uint8)
    return Emoji(images, torch.arange(count) % classes, tuple("abc"[:classes]))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A study on noise: the machinery without the data."""
    cut = Parts(emoji(24), emoji(9, seed=1), emoji(12, seed=2), emoji(24, seed=3), emoji(9, seed=4))
    monkeypatch.setattr(finetune, "parts", lambda settings, seed: cut)
    monkeypatch.setattr(network, "parts", lambda settings, seed: cut)
    work = Work("pego", SMALL, "arm", 0, tmp_path)
    rows = network.pretrain(Work("pego", SMALL, "pretraining", 0, tmp_path))
    assert (tmp_path / network.START).is_file()
    assert [r["metric"] for r in rows][-1] == "pretraining accuracy"
    return work, cut


def tuned(work, cut, arm, left_out="noto", rate=0.01, strength=0.0):
    return finetune._tuned(work, cut.train, arm, left_out, rate, strength)


# The data.


@pytest.mark.data
@with_data
def test_no_drawing_is_on_two_sides_and_pretraining_has_none_of_the_classes():
    cuts = [data.parts(SETTINGS, seed) for seed in (0, 1, 1000)]

    def drawings(part):
        return {image.contiguous().numpy().tobytes() for image in part.images.flatten(0, 1)}

    one, two, tuning = cuts
    assert not set(one.train.names) & set(one.old.names)
    assert len(one.train.names) == 13
    assert len(one.old.names) == 83
    for cut in cuts:
        sides = [drawings(p) for p in (cut.train, cut.valid, cut.test, cut.old, cut.old_test)]
        for i, side in enumerate(sides):
            for other in sides[i + 1 :]:
                assert not side & other
        assert len(drawings(cut.test)) >= len(cut.test) * len(STYLES) - 5  # alike across styles
        for part in (cut.train, cut.valid, cut.test):
            assert set(part.labels.tolist()) == set(range(13))
    # Tests are the same for all seeds, and nothing that strengths are chosen on is tested.
    assert torch.equal(one.test.images, two.test.images)
    assert torch.equal(one.test.images, tuning.test.images)
    assert not torch.equal(one.train.images[:20], two.train.images[:20])


@pytest.mark.data
@with_data
def test_the_settings_of_smoke_leave_something_in_every_part():
    cut = data.parts({**SETTINGS, **SMOKE}, 0)
    assert all(len(p) >= 13 for p in (cut.train, cut.valid, cut.test, cut.old, cut.old_test))


def test_emoji_that_share_a_drawing_are_kept_once():
    made = emoji(4).images
    drawings = {str(i): dict(zip(STYLES, made[i], strict=True)) for i in range(4)}
    drawings["1"]["openmoji-line"] = drawings["0"]["openmoji-line"].clone()
    del drawings["3"]["noto"]
    assert data._distinct(drawings) == ["0", "2"]


def test_augmentation_shifts_whole_images_and_lets_white_in():
    images = torch.full((40, 3, 16, 16), -1.0)
    moved = data.augmented(images, torch.Generator().manual_seed(0), most=3)
    assert set(moved.unique().tolist()) == {-1.0, 0.0}
    kept = (moved == -1.0).double().mean((1, 2, 3))
    assert kept.min() >= (13 / 16) ** 2 - 1e-9
    assert kept.max() == 1.0
    same = data.augmented(images, torch.Generator().manual_seed(0), most=3)
    assert torch.equal(moved, same)
    assert float(data.floats(torch.tensor([255, 0], dtype=torch.uint8)).sum()) == -2.0


# The loop.


def test_the_left_out_style_never_reaches_the_loop(small):
    work, cut = small
    left_out = STYLES.index("openmoji")
    other = Emoji(cut.train.images.clone(), cut.train.labels, cut.train.names)
    other.images[:, left_out] = 255 - other.images[:, left_out]
    one = finetune._tuned(work, cut.train, "full", "openmoji", 0.01, 0.0)
    two = finetune._tuned(work, other, "full", "openmoji", 0.01, 0.0)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    changed = Emoji(cut.valid.images.clone(), cut.valid.labels, cut.valid.names)
    changed.images[:, left_out] = 0
    found = [finetune._validation(one, v, "openmoji") for v in (cut.valid, changed)]
    assert found[0] == found[1]


def test_the_loop_is_what_it_says(small):
    work, cut = small
    found = tuned(work, cut, "PEGO", rate=0.02, strength=0.01)
    model = network.pretrained(work, 3)
    gw.lora_group(model.body, 4, 2, target_modules=["q_proj", "v_proj"],
                  generator=work.generator("adapters"))  # fmt: skip
    body = [p for p in model.body.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([{"params": model.head.parameters(), "lr": 0.02},
                                  {"params": body, "lr": 0.02}])  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    draw = work.generator("batches without noto")
    for _ in range(6):
        at = [torch.randint(24, (4,), generator=draw) for _ in range(3)]
        images = torch.cat([cut.train.images[i, k] for k, i in enumerate(at, start=1)])
        x = data.augmented(data.floats(images), draw)
        loss = nn.functional.cross_entropy(model(x), cut.train.labels[torch.cat(at)])
        layers = {}
        for site in sites(model):
            layers.setdefault(site.name, []).append(site)
        for sharing in layers.values():
            updates = [s.update() for s in sharing]
            for i, d in enumerate(updates):
                loss = loss + 0.01 * (sharing[0].base @ d.T).abs().sum()
                for e in updates[i + 1 :]:
                    loss = loss + 0.01 * (d @ e.T).abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_what_each_arm_may_move(small):
    work, cut = small
    start = dict(network.pretrained(work, 3).named_parameters())
    trainable = {}
    for arm in ARMS:
        model = tuned(work, cut, arm)
        trainable[arm] = sum(p.numel() for p in model.body.parameters() if p.requires_grad)
        still = [
            torch.equal(p, start[name.replace("base_layer.", "")])
            for name, p in model.named_parameters()
            if "body" in name and "lora_" not in name
        ]
        assert all(still) == (arm != "full"), arm
    assert trainable["probe"] == 0
    groups = {trainable[arm] for arm in ARMS[2:]}  # one LoRA of equal size, and the groups
    assert groups == {1 * 2 * 4 * 2 * 16 * 2}


def test_strength_zero_is_the_group(small):
    work, cut = small
    group, held = tuned(work, cut, "group"), tuned(work, cut, "PEGO", strength=0.0)
    for a, b in zip(group.parameters(), held.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_unit_yields_each_row_once_and_the_same_rows_again(small):
    work, _ = small
    arguments = {
        "arm": "PEGO", "rates": dict.fromkeys(STYLES, 0.01), "strengths": dict.fromkeys(STYLES, 0.01)
    }  # fmt: skip
    rows = finetune.learn(work, **arguments)
    assert rows == finetune.learn(work, **arguments)
    values = {r["metric"]: r["value"] for r in rows}
    assert len(values) == len(rows)
    assert values["unseen"] == pytest.approx(sum(values[f"unseen, {s}"] for s in STYLES) / 4)
    assert values["merge error"] < 1e-4
    assert values["preserve"] > 0
    (row,) = finetune.tune(work, arm="full", left_out="noto", rate=0.001)
    assert row["metric"] == "validation loss"


def test_the_old_classifier_tells_features_that_know_the_subgroups(small):
    work, cut = small
    model = network.pretrained(work, 3)

    class Knows(nn.Module):
        """Features that are the subgroup itself."""

        def features(self, images):
            # A class has its own brightness.
            return images.mean((1, 2, 3))[:, None].expand(-1, 4) ** torch.arange(1, 5)

    def bright(part):
        levels = (60 + 60 * part.labels).to(torch.uint8).view(-1, 1, 1, 1, 1)
        return Emoji(levels.expand_as(part.images), part.labels, part.names)

    known = Parts(cut.train, cut.valid, cut.test, bright(cut.old), bright(cut.old_test))
    assert finetune._old(Knows(), known, 20) == 1.0
    assert finetune._old(model, cut, 20) < 0.9  # noise


def test_the_start_is_the_same_for_all_conditions_of_a_seed(small, tmp_path):
    work, _ = small
    other = Work("pego", SMALL, "another arm", 0, tmp_path)
    one, two = network.pretrained(work, 3), network.pretrained(other, 3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    save(tmp_path / network.START, {k: 0 * v for k, v in one.body.state_dict().items()})
    assert not any(p.any() for p in network.pretrained(other, 3).body.parameters())


def test_the_study_says_what_it_needs():
    assert STUDY.slug == "pego"
    assert STUDY.minutes <= 5
    assert set(STUDY.smoke) <= set(STUDY.settings)
    assert [claim.name for claim in STUDY.claims] == [
        "unseen",
        "modules",
        "orthogonal",
        "preserved",
    ]
