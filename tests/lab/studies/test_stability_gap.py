from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw
from guywire.diagnostics import GradientSplit
from guywire.lab import streams
from guywire.lab.streams import Split
from guywire.lab.studies import load
from guywire.lab.studies.runner import resolve, run_study
from guywire.lab.studies.stability_gap import loop as loop_module
from guywire.lab.studies.stability_gap import series as series_module
from guywire.lab.studies.stability_gap.claims import CLAIMS, by_seed
from guywire.lab.studies.stability_gap.loop import ARMS, _Run, learn, network, tune, within_task
from guywire.lab.studies.stability_gap.measure import fall, share_at_start, switch_means
from guywire.lab.studies.stability_gap.series import turned
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Work

STUDY = load("stability-gap")
CLAIM = {claim.name: claim for claim in CLAIMS}
WITHOUT_DATA = "GUYWIRE_DATA" not in os.environ


@pytest.fixture(scope="module")
def data():
    config = streams.StreamConfig(
        data="digits", tasks=3, classes=6, class_order="given", max_per_class=60, valid_fraction=0.2
    )
    return streams.load(config)


@pytest.fixture
def work(tmp_path):
    small = {"updates": 12, "batch": 16, "memory": 24, "near": 8, "evaluated": 20}
    settings = resolve(STUDY, smoke=False, overrides=small)
    return Work("stability-gap", settings, "arm", 0, tmp_path)


@pytest.fixture
def on_digits(data, monkeypatch):
    monkeypatch.setattr(loop_module, "series", lambda *args, **more: data)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Numbers from curves.


def test_the_fall_of_a_curve_drawn_by_hand():
    curve = {0: 0.1, 4: 0.9, 5: 0.4, 6: 0.3, 7: 0.5, 8: 0.8, 9: 0.7, 10: 0.6, 11: 0.5, 12: 0.7}
    found = fall(curve, [4, 8], 4, 3)
    # Falls of 0.6 (to 0.3, then up to 0.8) and 0.3 (to 0.5, then up to 0.7).
    assert found.drop == pytest.approx(0.45)
    assert found.regained == pytest.approx(0.7 / 0.9)
    assert found.lowest_after == 2.5
    # 0.6 is passed after 4 updates, 0.65 after 4.
    assert found.half_after == 4.0


def test_a_low_beyond_the_steps_searched_does_not_count():
    curve = {2: 0.9, 3: 0.8, 4: 0.7, 5: 0.1, 6: 0.2}
    assert fall(curve, [2], 4, 2).drop == pytest.approx(0.2)
    assert fall(curve, [2], 4, 4).drop == pytest.approx(0.8)


def test_a_rising_curve_has_no_fall():
    found = fall({1: 0.5, 2: 0.6, 3: 0.7}, [1], 2, 2)
    assert found.drop == 0.0
    assert math.isnan(found.regained)


def test_the_start_is_three_steps_and_the_peak_lies_in_the_next_fifty():
    norms = dict.fromkeys(range(60), 2.0) | {0: 1.0, 1: 2.0, 2: 6.0, 52: 9.0, 53: 100.0}
    found = share_at_start({n: GradientSplit(0.0, v, 0.0) for n, v in norms.items()})
    assert found == (3.0, 9.0)


def test_norms_are_averaged_over_switches_where_all_were_seen():
    one = {0: GradientSplit(1.0, 2.0, 0.0), 1: GradientSplit(1.0, 1.0, 0.0)}
    other = {0: GradientSplit(3.0, 6.0, 0.0)}
    assert switch_means([one, other]) == {0: (2.0, 4.0)}


# Streams.


def test_turning_by_quarters_is_an_exact_rearrangement():
    image = torch.randint(0, 256, (3, 1, 6, 6), generator=torch.Generator().manual_seed(0)).byte()
    split = Split(image, torch.arange(3))
    for quarters in range(4):
        made = turned(split, 90.0 * quarters).inputs
        assert torch.equal(made, image.rot90(quarters, (2, 3)))


def test_turning_there_and_back_keeps_a_smooth_image():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    image = (220 * torch.exp(-6 * ((x - 0.2) ** 2 + (y + 0.3) ** 2))).byte()[None, None]
    split = Split(image, torch.zeros(1, dtype=torch.long))
    away = turned(split, 35.0)
    back = turned(away, -35.0).inputs
    assert (back.int() - image.int()).abs().max() <= 12  # two interpolations of 220 levels
    assert (away.inputs.int() - image.int()).abs().max() > 60


# Losses and arms.


def test_the_loss_within_a_task_looks_at_no_other_column():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    loss = within_task(2)(logits, labels)
    by_hand = torch.stack(
        [
            F.cross_entropy(logits[i : i + 1, i // 2 * 2 :][:, :2], labels[i : i + 1] % 2)
            for i in range(6)
        ]
    ).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    for i in range(6):
        outside = [c for c in range(6) if c // 2 != i // 2]
        assert (gradient[i, outside] == 0).all()


def test_the_network_is_the_papers_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    model = network((1, 28, 28), 10, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [
        (400, 784),
        (400, 400),
        (10, 400),
    ]
    assert isinstance(model[-2], nn.ReLU)


def test_replay_is_weighted_as_in_the_paper(work, data):
    run = _Run(work, data, "digits", "ER", 1.0)
    mine = network(data.shape, 6, work.generator("network"))
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.01, momentum=0.9)
    shuffling = work.generator("shuffle")
    memory = gw.Replay(24, buffer="balanced", seed=work.number("memory") % 2**31)
    memory.setup(mine)
    for index, task in enumerate(data.tasks[:2]):
        run.learn(task.train, watch=False, last=False)
        done = 0
        while done < 12:
            for x, y in data.batches(task.train, 16, shuffling):
                if done == 12:
                    break
                loss = 0.3 * F.cross_entropy(mine(x), y)
                if index:
                    drawn = memory.buffer_.draw(len(y), memory._generator)
                    assert len(drawn[1]) == len(y)
                    loss = loss + 0.7 * F.cross_entropy(mine(drawn[0]), drawn[1])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
        memory.consolidate(mine, data.loader(task.train, 16))
        torch.testing.assert_close(weights(run.model), weights(mine), rtol=1e-5, atol=1e-7)


def test_all_kept_means_all(work, data):
    run = _Run(work, data, "digits", "ER, all kept", 1.0)
    for task in data.tasks[:2]:
        run.learn(task.train, watch=False, last=False)
    assert len(run.regularizer.buffer_) == sum(len(task.train) for task in data.tasks[:2])


@pytest.mark.parametrize("arm", ARMS)
def test_watching_gradients_changes_no_parameter(work, data, arm):
    seen, blind = (_Run(work, data, "digits", arm, 10.0) for _ in range(2))
    for index, task in enumerate(data.tasks[:2]):
        found = seen.learn(task.train, watch=index > 0, last=index == 1)
        blind.learn(task.train, watch=False, last=index == 1)
    assert torch.equal(weights(seen.model), weights(blind.model))
    assert list(found) == [0, 1, 2, 3, 4, 5, 6, 9]
    assert all(split.plasticity > 0 for split in found.values())


@pytest.mark.parametrize("arm", ["EWC", "LwF", "finetune"])
def test_nothing_pulls_at_the_first_switch(work, data, arm):
    run = _Run(work, data, "digits", arm, 10.0)
    run.learn(data.tasks[0].train, watch=False, last=False)
    found = run.learn(data.tasks[1].train, watch=True, last=True)
    assert found[0].stability < 1e-6
    if arm != "finetune":
        assert found[9].stability > 1e-4


def test_ewcs_term_is_unscaled(work, data):
    run = _Run(work, data, "digits", "EWC", 10.0)
    run.learn(data.tasks[0].train, watch=False, last=False)
    held = run.regularizer
    name = "1.weight"
    with torch.no_grad():
        dict(run.model.named_parameters())[name].add_(0.01)
    x, y = next(iter(data.loader(data.tasks[1].train, 16)))
    expected = 2 * 0.01 * held.precision_[name].norm()
    assert run._split(x, y).stability == pytest.approx(float(expected), rel=1e-3)


def test_a_strength_that_diverges_is_nan_and_not_an_error(work, on_digits):
    (good,) = tune(work, stream="digits", arm="EWC", strength=1.0)
    (bad,) = tune(work, stream="digits", arm="EWC", strength=1e9)
    assert 0.0 <= good["value"] <= 1.0
    assert math.isnan(bad["value"])


@pytest.mark.parametrize("arm", ["ER", "GEM"])
def test_rows_agree_with_each_other(work, on_digits, arm):
    rows = learn(work, stream="digits", arm=arm)
    found = {r["metric"]: r["value"] for r in rows if "step" not in r}
    curve = {r["step"]: r["value"] for r in rows if r["metric"] == "first_task"}
    assert sorted(curve) == list(range(37))
    assert found["gap"] == pytest.approx(found["average_accuracy"] - found["wc_acc"])
    assert found["gap"] >= 0.0
    drops = [max(0.0, curve[e] - min(curve[n] for n in range(e + 1, e + 9))) for e in (12, 24)]
    assert found["drop"] == pytest.approx(sum(drops) / 2)
    assert found["stability_start"] >= 0.0
    # The first task's own window: its largest fall among ten evaluations, by brute force.
    worst = max(curve[a] - curve[b] for a in curve for b in range(a, min(a + 10, 37)))
    assert found["wf100"] >= worst / 3 - 1e-9


# Rules.


def table(values):
    return Table(
        {"condition": c, "seed": seed, "metric": m, "value": v}
        for (c, m), by in values.items()
        for seed, v in enumerate(by)
    )


def test_a_rule_for_every_seed():
    assert by_seed(dict.fromkeys(range(3), True)) == "reproduced"
    assert by_seed(dict.fromkeys(range(3), False)) == "not reproduced"
    assert by_seed({0: True, 1: False, 2: True}) == "inconclusive"
    assert by_seed({0: True, 1: True}) == "inconclusive"


@pytest.mark.parametrize(
    ("gap", "wf", "forgetting", "verdict"),
    [
        ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4), (0.2, 0.1, 0.1), "reproduced"),
        ((0.09, 0.2, 0.3), (0.4, 0.4, 0.4), (0.2, 0.1, 0.1), "inconclusive"),
        ((0.2, 0.2, 0.2), (0.4, 0.4, 0.4), (0.21, 0.3, 0.3), "not reproduced"),
    ],
)
def test_gap(gap, wf, forgetting, verdict):
    names = {"gap": gap, "wf10": wf, "forgetting": forgetting}
    judged = CLAIM["gap"].judge(table({("digits: ER", m): v for m, v in names.items()}))
    assert judged.verdict == verdict


@pytest.mark.parametrize("stream", ["digits", "garments"])
@pytest.mark.parametrize(
    ("drop", "regained", "verdict"),
    [
        ((0.1, 0.2, 0.3), (0.5, 0.9, 1.2), "reproduced"),
        ((0.1, 0.2, 0.3), (0.4, 0.9, 0.9), "inconclusive"),
        ((0.01, 0.0, 0.09), (0.9, math.nan, 0.9), "not reproduced"),
    ],
)
def test_drop_and_recovery(stream, drop, regained, verdict):
    names = {"drop": drop, "regained": regained, "wf10": (0.2,) * 3}
    names |= {"lowest_after": (3,) * 3, "half_after": (9,) * 3}
    judged = CLAIM[f"drop and recovery, {stream}"].judge(
        table({(f"{stream}: ER", m): v for m, v in names.items()})
    )
    assert judged.verdict == verdict


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        ((0.1, 0.2, 0.33), "reproduced"),
        ((0.1, 0.2, 0.34), "inconclusive"),
        ((0.4, 0.5, math.nan), "not reproduced"),
    ],
)
def test_gradients(share, verdict):
    names = {"share": share, "start": (1.0,) * 3, "peak": (4.0,) * 3}
    judged = CLAIM["gradients, digits"].judge(
        table({("digits: ER", f"stability_{m}"): v for m, v in names.items()})
    )
    assert judged.verdict == verdict


def turns(lows, ends):
    values = {}
    for angle, low, end in zip((80, 10, 60, 30), lows, ends, strict=True):
        values[f"turned by {angle}", "min_acc"] = [low] * 3
        values[f"turned by {angle}", "average_accuracy"] = [end] * 3
        values[f"turned by {angle}", "gap"] = [end - low] * 3
    return CLAIM["dissimilar tasks"].judge(table(values)).verdict


def test_dissimilar_tasks():
    # In the order 80, 10, 60, 30 degrees: conditions are sorted by their angle.
    assert turns((0.6, 0.9, 0.7, 0.8), (0.85, 0.95, 0.9, 0.9)) == "reproduced"
    assert turns((0.6, 0.9, 0.909, 0.9), (0.85, 0.95, 0.9, 0.9)) == "reproduced"  # within a point
    assert turns((0.6, 0.9, 0.92, 0.8), (0.85, 0.95, 0.9, 0.9)) == "not reproduced"
    assert turns((0.6, 0.9, 0.7, 0.8), (0.84, 0.95, 0.9, 0.9)) == "not reproduced"  # 30 < 3 x 11
    assert turns((0.9, 0.9, 0.9, 0.9), (0.9, 0.9, 0.9, 0.9)) == "not reproduced"


def test_everything_kept():
    def verdict(*gap):
        return (
            CLAIM["everything kept"]
            .judge(table({("digits: ER, all kept", "gap"): gap, ("digits: ER", "gap"): gap}))
            .verdict
        )

    assert verdict(0.03, 0.04, 0.05) == "reproduced"
    assert verdict(0.01, 0.02, 0.02) == "not reproduced"
    assert verdict(0.01, 0.02, 0.04) == "inconclusive"


# With data.


@pytest.mark.data
@pytest.mark.skipif(WITHOUT_DATA, reason="needs $GUYWIRE_DATA")
def test_every_stream_is_what_its_name_says():
    settings = resolve(STUDY, smoke=True, overrides={})
    by = {name: series_module.series(name, settings, angle=30.0) for name in series_module.SERIES}
    assert [by[n].scenario for n in by] == ["class", "class", "task", "domain", "domain"]
    assert [t.classes for t in by["digits"].tasks] == [(0, 1), (2, 3)]
    assert len(by["digits"].tasks[0].train) == 400
    assert [len(t.test) for t in by["garments"].tasks] == [80, 80]
    assert [t.name for t in by["turned"].tasks] == ["0 degrees", "30 degrees"]
    assert len(by["styles"].tasks) == 4
    assert all(len(stream.tasks[0].valid) == 0 for stream in by.values())
    assert len(series_module.series("digits", settings, tune=True).tasks[0].valid) == 80


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(WITHOUT_DATA, reason="needs $GUYWIRE_DATA")
def test_the_smoke_run_holds_every_check(tmp_path):
    result = run_study("stability-gap", tmp_path, smoke=True, workers=1, cache=tmp_path / "cache")
    assert all(check["holds"] for check in result["checks"])
