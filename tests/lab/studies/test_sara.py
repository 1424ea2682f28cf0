"""The study of SaRA: its units on made-up drawings, its data, its rules on made-up tables."""

from __future__ import annotations

import os

import pytest
import torch

from guywire.lab import streams
from guywire.lab.studies import load
from guywire.lab.studies.runner import resolve
from guywire.lab.studies.sara import arms as arms_module
from guywire.lab.studies.sara import network
from guywire.lab.studies.sara.arms import ARMS, fine_tune
from guywire.lab.studies.sara.claims import CLAIMS, harmony
from guywire.lab.studies.sara.page import CHECKS
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Work
from guywire.lab.studies.verdict import worst

pytest.importorskip("diffusers")

STUDY = load("sara")
CLAIM = {claim.name: claim.judge for claim in CLAIMS}
SMALL = {
    "side": 8,
    "channels": [8, 16, 16],
    "evaluated": 6,
    "start_steps": 4,
    "start_batch": 4,
    "batch": 2,
    "steps": 4,
    "rank_above": 8,
}


def drawings(parts=("train", "valid", "test")):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{style} {part}": torch.randint(256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
        for style in ("source", "target")
        for part in parts
    }


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder in which pretraining is done, and its rows."""
    folder = tmp_path_factory.mktemp("sara")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "_drawings", lambda settings: drawings())
        rows = network.pretrain(work_in(folder, "pretraining"))
    return folder, rows


def work_in(folder, condition, seed=0):
    settings = resolve(STUDY, smoke=False, overrides=SMALL)
    return Work("sara", settings, condition, seed, folder)


def metrics(rows):
    return {row["metric"]: row["value"] for row in rows}


def test_pretraining_leaves_what_the_arms_start_from(begun):
    folder, rows = begun
    found = metrics(rows)
    assert found["last_loss"] < found["first_loss"]
    model, parts = network.start(work_in(folder, "any"))
    again, _ = network.start(work_in(folder, "any"))
    assert found["weights"] == sum(p.numel() for p in model.parameters())
    assert parts.keys() == drawings().keys()
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


def test_every_arm_trains_what_it_says(begun):
    folder, rows = begun
    everything = list(rows)
    for arm in ARMS:
        made = fine_tune(work_in(folder, arm), arm=arm, rate=1e-2, strength=1e-2)
        everything += made
        found = metrics(made)
        masked = arm not in ("LoRA", "full")
        assert ("moved_outside" in found) is masked
        assert found["source_error"] > 0.0
        assert "balance" not in found
    everything += network.take_away(work_in(folder, "frozen"))
    table = Table(everything)
    share = STUDY.settings["share"] * table.mean("pretraining", "weights").mean
    for arm in ("SaRA", "largest", "random"):
        assert table.mean(arm, "trained").mean == pytest.approx(share, rel=0.01)
    assert table.mean("full", "trained").mean == table.mean("pretraining", "weights").mean
    checks = {check.says: check.holds for check in CHECKS}
    assert checks["no weight outside the mask moves"](table)
    assert table.mean("largest", "still_small").mean == 0.0
    assert table.mean("SaRA", "still_small").mean <= 1.0
    # Of a U-Net so small, LoRA of rank 1 has more numbers than 5%.
    assert table.mean("LoRA", "trained").mean > 0


def test_the_same_seed_gives_the_same_rows(begun):
    folder, _ = begun
    one, two, other = (
        fine_tune(work_in(folder, "random", seed), arm="random", rate=1e-2) for seed in (0, 0, 1)
    )
    assert one == two
    assert metrics(one)["target_error"] != metrics(other)["target_error"]


@pytest.mark.parametrize(("tune", "kept"), [(True, "valid"), (False, "test")])
def test_strengths_are_chosen_without_test_drawings(begun, monkeypatch, tune, kept):
    folder, _ = begun
    real = network.start

    def start(work):
        return real(work)[0], drawings(("train", kept))  # anything else is a KeyError

    monkeypatch.setattr(arms_module, "start", start)
    found = metrics(fine_tune(work_in(folder, "SaRA"), arm="SaRA", rate=1e-2, tune=tune))
    assert ("balance" in found) is tune
    if tune:
        changes = 1.0 + found["source_rise"] + 1.0 - found["target_fall"]
        assert found["balance"] == pytest.approx(changes)


def test_taking_weights_away_zeroes_their_share(begun):
    folder, _ = begun
    model, _ = network.start(work_in(folder, "any"))
    params = dict(model.named_parameters())
    masks = network.random_masks(params, 0.3, torch.Generator().manual_seed(0))
    chosen = sum(int(m.sum()) for m in masks.values())
    assert chosen == pytest.approx(0.3 * sum(p.numel() for p in params.values()), rel=0.01)
    found = metrics(network.take_away(work_in(folder, "frozen")))
    assert set(found) == {
        "source_error", "target_error", "rise_without_smallest", "rise_without_random",
    }  # fmt: skip
    assert abs(found["rise_without_smallest"]) < abs(found["rise_without_random"])


def test_unseen_drops_what_was_there_before():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1)
    found = network.unseen(images, [images[1:2], images[4:]])
    assert found.flatten().tolist() == [0, 2, 3]
    assert torch.equal(network.unseen(images, []), images)


@pytest.mark.data
@pytest.mark.skipif("GUYWIRE_DATA" not in os.environ, reason="needs renditions.parquet")
def test_emoji_and_their_drawings_are_on_one_side_in_every_style(monkeypatch):
    made = []
    real = streams.load

    def kept(config):
        made.append(real(config))
        return made[-1]

    monkeypatch.setattr(network.streams, "load", kept)
    parts = network._drawings(dict(STUDY.settings) | {"side": 12})
    (stream,) = made
    for part in ("train", "valid", "test"):
        labels = [getattr(task, part).labels for task in stream.tasks]
        assert all(torch.equal(labels[0], other) for other in labels[1:])
    assert {task.name for task in stream.tasks} > {network.SOURCE, network.TARGET}
    for style in ("source", "target"):
        train, test = (
            {i.numpy().tobytes() for i in parts[f"{style} {p}"]} for p in ("train", "test")
        )
        assert len(test) > 200
        assert not train & test


# Rules.


def table(values, seeds=(0, 1, 2), step=0.001):
    """Rows ``condition, metric -> value``, a little different in each seed."""
    return Table(
        {"condition": c, "seed": s, "metric": m, "value": v + step * s}
        for (c, m), v in values.items()
        for s in seeds
    )


def test_ineffective_weights():
    def verdict(small, random, **more):
        rows = {
            ("frozen", "rise_without_smallest"): small,
            ("frozen", "rise_without_random"): random,
        }
        return CLAIM["ineffective weights"](table(rows, **more)).verdict

    assert verdict(0.001, 0.05) == "reproduced"
    assert verdict(-0.002, 0.05, step=0.0) == "reproduced"
    assert verdict(0.02, 0.5) == "not reproduced"
    assert verdict(0.004, 0.006) == "not reproduced"
    assert verdict(0.001, 0.05, seeds=(0, 1)) == "inconclusive"


def test_learns_and_keeps():
    def rows(mine, largest, fall):
        values = {(arm, "source_rise"): mine for arm in ARMS} | {
            (arm, "target_fall"): fall for arm in ARMS
        }
        return table(values | {("largest", "source_rise"): largest})

    assert CLAIM["learns the task"](rows(0.1, 0.2, 0.3)).verdict == "reproduced"
    assert CLAIM["learns the task"](rows(0.1, 0.2, 0.1)).verdict == "not reproduced"
    assert CLAIM["keeps the prior"](rows(0.1, 0.2, 0.3)).verdict == "reproduced"
    assert CLAIM["keeps the prior"](rows(0.19, 0.2, 0.3)).verdict == "not reproduced"


def test_rank_loss_needs_both_parts():
    def verdict(rise, norm):
        rows = {
            ("no rank loss", "source_rise"): 0.2,
            ("no rank loss", "nuclear_norm"): 9.0,
            ("SaRA", "source_rise"): rise,
            ("SaRA", "nuclear_norm"): norm,
        }
        return CLAIM["rank loss"](table(rows)).verdict

    assert verdict(0.1, 8.0) == "reproduced"
    assert verdict(0.3, 8.0) == "not reproduced"
    assert verdict(0.1, 9.5) == "not reproduced"


def test_second_choice():
    def verdict(mine):
        rows = {("SaRA", "still_small"): mine, ("no adjustment", "still_small"): 0.4}
        return CLAIM["second choice"](table(rows)).verdict

    assert verdict(0.1) == "reproduced"
    assert verdict(0.3) == "not reproduced"


def test_harmony():
    def rows(scores):
        errors = {(arm, "target_error"): e for arm, (e, _) in scores.items()}
        return table(errors | {(arm, "source_rise"): r for arm, (_, r) in scores.items()}, step=0.0)

    scores = dict.fromkeys(ARMS, (0.3, 0.3)) | {"full": (0.1, 0.5), "SaRA": (0.2, 0.1)}
    index = harmony(rows(scores))
    assert index["full"].mean == pytest.approx(1.0)
    assert index["SaRA"].mean == pytest.approx(1.5)
    assert index["random"].mean == pytest.approx(0.5)
    assert CLAIM["harmony"](rows(scores)).verdict == "reproduced"
    scores["SaRA"] = (0.3, 0.5)
    assert CLAIM["harmony"](rows(scores)).verdict == "not reproduced"


def test_the_worst_part_decides():
    assert worst(["reproduced", "not reproduced", "inconclusive"]) == "not reproduced"
