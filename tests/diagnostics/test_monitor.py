"""Exact checks 8 and 9 of the stability-gap sheet, and the monitor in all kinds of loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from guywire.core import checkpoint
from guywire.core.errors import CheckpointError, DataError, UsageError
from guywire.diagnostics import ContinualMonitor
from guywire.diagnostics._schedule import Budget


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 4)
    )


def make_sets(samples=60):
    generator = torch.Generator().manual_seed(7)
    sets = {}
    for task in range(3):
        x = torch.randn(samples, 6, generator=generator) + task
        sets[f"t{task}"] = (x, (x.sum(1) > 6 * task).long() + task)
    return sets


def train(model, sets, monitor=None, steps=12, *, tasks=3, start=(0, 0), stop=None, loader=None):
    """A loop with dropout, BatchNorm and a shuffling loader that draws from the global state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if monitor is not None:
        monitor.attach(model, optimizer)
    for task in range(start[0], tasks):
        x, y = sets[f"t{task}"]
        data = torch.utils.data.TensorDataset(x, y)
        loader = torch.utils.data.DataLoader(data, batch_size=20, shuffle=True)
        if monitor is not None and monitor.task is None:
            monitor.begin_task(f"t{task}")
        done = 0
        while done < steps:
            for bx, by in loader:
                model.train()
                model[1].eval() if task == 2 else None  # a frozen norm in the last task
                optimizer.zero_grad()
                F.cross_entropy(model(bx), by).backward()
                optimizer.step()
                done += 1
        if monitor is not None:
            monitor.end_task()
    return optimizer


def test_training_with_the_monitor_is_bit_identical_to_training_without():
    sets = make_sets()
    plain, watched = make_model(), make_model()
    torch.manual_seed(3)
    train(plain, sets)
    end = torch.rand(4)
    torch.manual_seed(3)
    monitor = ContinualMonitor(make_sets(), subset=40)
    train(watched, sets, monitor)
    assert torch.equal(torch.rand(4), end)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [m.training for m in plain.modules()] == [m.training for m in watched.modules()]
    assert len(monitor.curves()) == 13 + (1 + 2 * 12) + (1 + 3 * 12)


def test_a_shuffling_loader_as_evaluation_data_draws_nothing_from_the_global_state():
    sets = make_sets()
    loaders = {
        name: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*pair), batch_size=16, shuffle=True
        )
        for name, pair in sets.items()
    }
    state = torch.get_rng_state()
    monitor = ContinualMonitor(loaders, subset=None)
    assert torch.equal(torch.get_rng_state(), state)
    model = make_model().eval()
    monitor.begin_task("t0", model)
    expected = (model(sets["t0"][0]).argmax(1) == sets["t0"][1]).float().mean()
    assert monitor.curves()[0].value == pytest.approx(float(expected))


def test_values_are_accuracies_of_the_model_in_eval_mode():
    sets, model = make_sets(), make_model()
    seen = []
    monitor = ContinualMonitor(sets, subset=None, batch_size=37)  # pieces that cross tasks

    def note(optimizer, args, kwargs):
        frozen = copy.deepcopy(model).eval()
        with torch.no_grad():
            seen.append(
                {n: float((frozen(x).argmax(1) == y).double().mean()) for n, (x, y) in sets.items()}
            )

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor.attach(model, optimizer)
    optimizer.register_step_post_hook(note)
    for task in ("t0", "t1", "t2"):
        monitor.begin_task(task)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(sets[task][0]), sets[task][1]).backward()
            optimizer.step()
        monitor.end_task()
    rows = [row for row in monitor.curves() if row.step > 0]
    for row in rows:
        if row.task == row.evaluated and row.step % 4 == 0 and row.step // 4 == int(row.task[1]):
            continue  # before the first update of a task: the step belongs to the last one
        assert row.value == pytest.approx(seen[row.step - 1][row.evaluated], abs=1e-12)


@pytest.mark.parametrize("schedule", [{"every": 1}, {"every": 5}, {"budget": 0.3, "dense": 3}])
@pytest.mark.parametrize("cut", [0, 3, 12, 17, 24, 30])
def test_saved_in_the_middle_of_a_task_and_resumed_everything_is_identical(tmp_path, schedule, cut):
    if "budget" in schedule:
        schedule = {**schedule, "train_batch_size": 20}

    def run(monitor, model, optimizer, begin, end):
        sets = make_sets()
        for update in range(begin, end):
            task = update // 12
            if update % 12 == 0:
                monitor.begin_task(f"t{task}", model)
            x, y = sets[f"t{task}"]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step(model)
            if update % 12 == 11:
                monitor.end_task(model)

    def fresh():
        model = make_model()
        model[3] = nn.Identity()
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    whole = ContinualMonitor(make_sets(), subset=30, **schedule)
    run(whole, *fresh(), 0, 36)
    first = ContinualMonitor(make_sets(), subset=30, **schedule)
    model, optimizer = fresh()
    run(first, model, optimizer, 0, cut)
    checkpoint.save(tmp_path / "monitor.safetensors", first.state_dict())
    second = ContinualMonitor(make_sets(), subset=30, **schedule)
    second.load_state_dict(checkpoint.load(tmp_path / "monitor.safetensors"))
    run(second, model, optimizer, cut, 36)
    assert second.curves() == whole.curves()
    assert repr(second.metrics()) == repr(whole.metrics())
    checkpoint.save(tmp_path / "a.safetensors", second.state_dict())
    checkpoint.save(tmp_path / "b.safetensors", whole.state_dict())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_last_update_of_a_task_is_always_evaluated_and_never_twice():
    monitor = ContinualMonitor(make_sets(), every=7)
    train(make_model(), make_sets(), monitor)
    for row in monitor.curves():
        assert row.step % 7 == 0 or row.step % 12 == 0
    points = [(row.step, row.evaluated) for row in monitor.curves()]
    assert len(points) == len(set(points))
    assert {(12, "t0"), (12, "t1"), (24, "t1"), (36, "t0"), (36, "t2")} <= set(points)


def test_the_subset_is_chosen_once_and_by_the_seed():
    sets = make_sets(200)
    kept = [
        ContinualMonitor(sets, subset=50, seed=seed)._sets._sets["t1"][0][0] for seed in (0, 0, 1)
    ]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    rows = {tuple(row) for row in sets["t1"][0].tolist()}
    assert len(kept[0]) == 50
    assert {tuple(row) for row in kept[0].tolist()} <= rows
    monitor = ContinualMonitor(sets, subset=50)
    assert monitor.standard_error("t1", 0.5) == pytest.approx(0.5 / math.sqrt(50))


def test_a_growing_head_and_classes_of_a_task():
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    sets = {"a": (x, (x[:, 0] > 0).long()), "b": (x, (x[:, 1] > 0).long() + 2)}

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 2)])

        def forward(self, inputs):
            return torch.cat([block(inputs) for block in self.blocks], 1)

    model = Head()
    whole = ContinualMonitor(sets)
    given = ContinualMonitor(sets, classes={"a": [0, 1], "b": [2, 3]})
    for monitor in (whole, given):
        monitor.begin_task("a", model)
        monitor.end_task(model)
    model.blocks.append(nn.Linear(3, 2))
    with torch.no_grad():
        model.blocks[1].bias.fill_(100.0)  # the new classes shout down the old ones
    for monitor in (whole, given):
        monitor.begin_task("b", model)
        monitor.step(model)
        monitor.end_task(model)
    last = {row.evaluated: row.value for row in whole.curves()}
    local = {row.evaluated: row.value for row in given.curves()}
    assert last["a"] == 0.0
    assert local["a"] == whole.curves()[0].value
    assert local["b"] == last["b"]


def test_dicts_of_tokens_with_a_negative_loss():
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 5)

        def forward(self, input_ids, attention_mask):
            return {"logits": self.table(input_ids)}

    def make(length, ignored):
        ids = torch.randint(11, (6, length))
        labels = torch.randint(5, (6, length))
        labels[:, :ignored] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    model, sets = Tagger(), {"a": [make(4, 1), make(7, 2)], "b": make(4, 0)}
    monitor = ContinualMonitor(sets, score="negative_loss")
    monitor.begin_task("a", model)
    expected = []
    for part in sets["a"]:
        logits = model(part["input_ids"], None)["logits"]
        for i in range(6):
            expected.append(-float(F.cross_entropy(logits[i].detach(), part["labels"][i])))
    assert monitor.curves()[0].value == pytest.approx(sum(expected) / 12, rel=1e-6)
    monitor.end_task(model)
    monitor.begin_task("b", model)
    monitor.step(model)
    assert {row.evaluated for row in monitor.curves() if row.step == 1} == {"a", "b"}


def test_a_forward_and_a_score_of_ones_own():
    images = (torch.rand(8, 6) * 255).to(torch.uint8), torch.arange(8) % 4
    model = make_model()
    monitor = ContinualMonitor(
        {"a": images},
        forward=lambda m, batch: m(batch[0].float() / 255),
        score=lambda logits, labels: logits.gather(1, labels[:, None]).squeeze(1),
    )
    monitor.begin_task("a", model)
    logits = model.eval()(images[0].float() / 255)
    expected = float(logits.gather(1, images[1][:, None]).mean().detach())
    assert monitor.curves()[0].value == pytest.approx(expected, rel=1e-6)


def test_wrapped_and_compiled_models_are_evaluated_inside():
    model = make_model()
    monitor = ContinualMonitor(make_sets())
    monitor.begin_task("t0", torch.compile(nn.DataParallel(model), backend="eager"))
    assert monitor.curves()[0].value >= 0.0
    assert model.training


def test_a_budget_is_dense_after_a_switch_then_sparse_and_keeps_to_its_share():
    samples, batch, share, dense = 600, 100, 0.2, 20
    cost = samples / (3 * batch)
    budget = Budget(share, dense, 1.25)
    due = [step for step in range(1, 3001) if budget.due(step, cost)]
    assert due[:dense] == list(range(1, dense + 1))
    gaps = [b - a for a, b in zip(due[dense:], due[dense + 1 :], strict=False)]
    assert max(gaps) <= 0.25 * 3000
    spent = len(due) * cost
    assert spent / (spent + 3000) == pytest.approx(share, abs=0.02)
    budget.begin(3000)
    assert all(budget.due(step, cost) for step in range(3001, 3001 + dense))


def test_a_budget_in_a_loop_reports_what_it_cost():
    monitor = ContinualMonitor(
        make_sets(), budget=0.2, train_batch_size=20, dense=5, subset=40, growth=1.5
    )
    train(make_model(), make_sets(), monitor, steps=30)
    steps = sorted({row.step for row in monitor.curves()})
    assert set(range(6)) <= set(steps)
    assert set(range(30, 36)) <= set(steps)
    cost = monitor.cost()
    assert cost["max_gap"] > 1
    assert 0 < cost["share"] < 1
    assert cost["seconds"] > 0
    assert cost["evaluations"] >= len(steps)


def test_attaching_again_goes_on_and_detaching_ends_it():
    model, sets = make_model(), make_sets()
    monitor = ContinualMonitor(sets)
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    new = torch.optim.Adam(model.parameters(), lr=0.1)
    monitor.attach(model, old)
    with monitor.attach(model, new):
        monitor.begin_task("t0")
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        old.step()
        assert monitor.updates == 0
        new.step()
        assert monitor.updates == 1
    new.step()
    assert monitor.updates == 1
    with pytest.raises(UsageError, match="no model to evaluate"):
        monitor.step()


def test_wrong_words():
    sets, model = make_sets(), make_model()
    with pytest.raises(UsageError, match="evals is empty"):
        ContinualMonitor({})
    with pytest.raises(UsageError, match="every=0"):
        ContinualMonitor(sets, every=0)
    with pytest.raises(UsageError, match="subset=0"):
        ContinualMonitor(sets, subset=0)
    with pytest.raises(UsageError, match="batch_size=0"):
        ContinualMonitor(sets, batch_size=0)
    with pytest.raises(UsageError, match="train_batch_size"):
        ContinualMonitor(sets, budget=0.1)
    with pytest.raises(UsageError, match=r"budget=1\.5"):
        ContinualMonitor(sets, budget=1.5, train_batch_size=1)
    with pytest.raises(UsageError, match=r"growth=1\.0"):
        ContinualMonitor(sets, budget=0.5, train_batch_size=1, growth=1.0)
    with pytest.raises(UsageError, match="score='f1'"):
        ContinualMonitor(sets, score="f1")
    with pytest.raises(UsageError, match="at least 2"):
        ContinualMonitor(sets, windows=(1,))
    with pytest.raises(DataError, match="task 'a' is empty"):
        ContinualMonitor({"a": []})
    with pytest.raises(DataError, match="task 'a' is a int"):
        ContinualMonitor({"a": 3})
    with pytest.raises(DataError, match="no 'labels'"):
        ContinualMonitor({"a": {"x": torch.ones(3)}})
    monitor = ContinualMonitor(sets)
    with pytest.raises(UsageError, match="no evaluation set for task 't9'"):
        monitor.begin_task("t9", model)
    with pytest.raises(UsageError, match="no model"):
        monitor.begin_task("t0")
    with pytest.raises(UsageError, match="outside any task"):
        monitor.step(model)
    with pytest.raises(UsageError, match="no task to end"):
        monitor.end_task(model)
    with pytest.raises(UsageError, match=r"not a torch\.optim"):
        monitor.attach(model, object())
    with pytest.raises(CheckpointError, match="same arguments"):
        ContinualMonitor(sets, every=2).load_state_dict(monitor.state_dict())
