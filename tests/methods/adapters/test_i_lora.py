"""I-LoRA: the numbered exact checks of its sheet (9: tests/diagnostics, 10: beside this)."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy import stats
from torch import nn

import guywire as gw
from guywire.core import checkpoint, losses
from guywire.core.buffers import ReservoirBuffer
from guywire.core.errors import AttachError, DataError, SelectionError, UsageError
from guywire.methods.adapters import _hidden, averaging
from guywire.methods.adapters._lora import sites

pytest.importorskip("peft")


class Stack(nn.Module):
    """Two blocks between an embedding and a head, with or without dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)]
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


class Heads(nn.ModuleList):
    def forward(self, features):
        return torch.cat([head(features) for head in self], dim=1)


def plain(seed=0, dropout=0.0, dtype=torch.float64):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Stack(dropout).to(dtype)


def dressed(seed=0, dropout=0.0, dtype=torch.float64, b=0.0, targets=r"blocks\.\d\.0"):
    model = gw.lora_group(plain(seed, dropout, dtype), 1, 2, target_modules=targets)
    model.head.requires_grad_(True)
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in sites(model):
            site.B.copy_(b * torch.randn(site.B.shape, generator=generator, dtype=torch.float64))
    return model


def task(number, count=5, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(count, size, 6, generator=generator, dtype=torch.float64) + number
    y = torch.randint(2, (count, size), generator=generator) + 2 * (number % 2)
    return [(a.to(dtype), b) for a, b in zip(x, y, strict=True)]


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model, optimizer, wires, data, after=None):
    seen = []
    for x, y in data:
        optimizer.zero_grad()
        outputs = model(x)
        loss = losses.cross_entropy(outputs, y)
        if wires is not None:
            loss = loss + wires.loss((x, y), outputs)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
        if after is not None:
            after()
    return seen


def two_tasks(model, regularizer):
    optimizer = sgd(model)
    seen = []
    with gw.attach(model, optimizer, regularizer) as wires:
        for number in range(2):
            seen += train(model, optimizer, wires, task(number))
            wires.consolidate(task(number))
    return seen


def params(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


# The sheet's checks, by number.


def test_check_1_the_average_of_a_constant_has_a_closed_form():
    slow, fast = {"A": torch.zeros(3)}, {"A": torch.ones(3)}
    for _ in range(5):
        slow = gw.interpolate_adapters(slow, fast, 0.25)
    assert slow["A"].tolist() == [0.9990234375] * 3
    for decay, updates in ((0.9, 7), (0.995, 40)):
        value = {"A": torch.full((2,), 3.0, dtype=torch.float64)}
        target = {"A": torch.full((2,), -1.0, dtype=torch.float64)}
        for _ in range(updates):
            value = gw.interpolate_adapters(value, target, decay)
        wanted = decay**updates * 3.0 - (1 - decay**updates)
        torch.testing.assert_close(value["A"], torch.full_like(value["A"], wanted))


def test_check_1_decay_one_freezes_and_decay_zero_follows_bit_for_bit():
    for decay in (0.0, 1.0):
        model = dressed(b=0.3)
        start = params(model)
        i_lora = gw.ILoRA(decay=decay, warm_up=False, capacity=16)
        two_tasks(model, i_lora)
        now = params(model)
        same(i_lora.slow_, {n: (start if decay else now)[n] for n in i_lora.slow_})
        assert any(not torch.equal(start[n], now[n]) for n in i_lora.slow_)


def test_check_1_with_decay_zero_the_hidden_states_term_is_zero():
    model = dressed(b=0.3)
    optimizer = sgd(model)
    i_lora = gw.ILoRA(strength=5.0, decay=0.0, replay=0.0, capacity=16)
    with gw.attach(model, optimizer, i_lora) as wires:
        wires.consolidate(task(0))
        train(model, optimizer, wires, task(1))
        assert wires.loss(task(1)[0]).item() == 0.0


def test_check_2_the_average_really_moves_and_equals_a_loop_over_the_recorded_fast_values():
    model = dressed(b=0.3)
    optimizer = sgd(model)
    i_lora = gw.ILoRA(decay=0.9, warm_up=False, capacity=16)
    recorded = []
    with gw.attach(model, optimizer, i_lora) as wires:
        start = {n: v.clone() for n, v in i_lora.slow_.items()}
        for number in range(2):
            train(model, optimizer, wires, task(number), lambda: recorded.append(params(model)))
            wires.consolidate(task(number))
    assert len(recorded) == 10
    for name, value in start.items():
        wanted = value
        for fast in recorded:
            wanted = 0.9 * wanted + 0.1 * fast[name]
        torch.testing.assert_close(i_lora.slow_[name], wanted, rtol=0, atol=1e-12)
        assert float((i_lora.slow_[name] - value).norm()) > 0
        assert float((i_lora.slow_[name] - recorded[-1][name]).norm()) > 0


def test_check_2_against_torch_own_averaged_model():
    model = dressed(b=0.3)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    average.update_parameters(model)  # the first call copies
    i_lora = gw.ILoRA(decay=0.9, warm_up=False, capacity=16)
    optimizer = sgd(model)
    with gw.attach(model, optimizer, i_lora) as wires:
        train(model, optimizer, wires, task(0), lambda: average.update_parameters(model))
    wanted = dict(average.module.named_parameters())
    for name, value in i_lora.slow_.items():
        torch.testing.assert_close(value, wanted[name].detach())


def test_check_3_interpolated_factors_are_not_interpolated_updates():
    g = torch.Generator().manual_seed(0)
    one, two = (
        {
            "A": torch.randn(2, 5, generator=g, dtype=torch.float64),
            "B": torch.randn(4, 2, generator=g, dtype=torch.float64),
        }
        for _ in range(2)
    )
    s = 0.3
    between = gw.interpolate_adapters(one, two, s)
    found = s * one["B"] @ one["A"] + (1 - s) * two["B"] @ two["A"] - between["B"] @ between["A"]
    wanted = s * (1 - s) * (one["B"] - two["B"]) @ (one["A"] - two["A"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    assert float(wanted.norm()) > 0.1
    alike = {"A": two["A"], "B": one["B"]}
    between = gw.interpolate_adapters(alike, two, s)
    updates = s * alike["B"] @ alike["A"] + (1 - s) * two["B"] @ two["A"]
    torch.testing.assert_close(between["B"] @ between["A"], updates)


def test_check_4_at_the_start_either_adapter_is_the_base_bit_for_bit():
    model = dressed()
    i_lora = gw.ILoRA()
    x = task(0)[0][0]
    wanted = plain()(x)
    with gw.attach(model, sgd(model), i_lora):
        assert torch.equal(model(x), wanted)
        with i_lora.slow() as slow:
            assert torch.equal(slow(x), wanted)
            assert all(float(site.update().norm()) == 0.0 for site in sites(slow))


def test_check_5_without_the_term_it_is_replay_bit_for_bit():
    ours, theirs = dressed(b=0.3), dressed(b=0.3)
    replay = gw.Replay(16, buffer="balanced", seed=3)
    i_lora = gw.ILoRA(strength=0.0, capacity=16, buffer="balanced", seed=3)
    assert two_tasks(ours, i_lora) == two_tasks(theirs, replay)
    same(params(ours), params(theirs))


def test_check_5_without_the_term_it_is_a_plain_loop_over_a_reservoir_bit_for_bit():
    ours, theirs = dressed(b=0.3), dressed(b=0.3)
    found = two_tasks(ours, gw.ILoRA(strength=0.0, capacity=16, seed=3))
    buffer, generator = ReservoirBuffer(16), torch.Generator().manual_seed(3)
    optimizer = sgd(theirs)
    wanted = []
    for number in range(2):
        for x, y in task(number):
            loss = losses.cross_entropy(theirs(x), y)
            if number:
                old, labels = buffer.draw(len(x), generator)
                loss = loss + losses.cross_entropy(theirs(old), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            wanted.append(loss.item())
        for batch in task(number):
            buffer.add(batch, generator)
    assert found == wanted
    same(params(ours), params(theirs))


def test_check_5_with_an_empty_memory_it_is_plain_lora_bit_for_bit():
    ours, theirs = dressed(b=0.3), dressed(b=0.3)
    optimizer = sgd(ours)
    with gw.attach(ours, optimizer, gw.ILoRA(strength=9.0)) as wires:
        train(ours, optimizer, wires, task(0))
    train(theirs, sgd(theirs), None, task(0))
    same(params(ours), params(theirs))


def held(model, **options):
    """Wires in the second task, the slow adapter behind the fast one."""
    i_lora = gw.ILoRA(**{"strength": 2.0, "decay": 0.9, "capacity": 16, "replay": 0.0} | options)
    optimizer = sgd(model, lr=0.5)
    wires = gw.attach(model, optimizer, i_lora)
    wires.consolidate(task(0))
    train(model, optimizer, wires, task(1))
    optimizer.zero_grad()
    return wires, i_lora


def test_check_6_no_gradient_reaches_the_slow_adapter_or_the_base():
    model = dressed(b=0.3)
    wires, i_lora = held(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    same_objects = {n: id(p) for n, p in model.named_parameters()}
    before = {n: v.clone() for n, v in i_lora.slow_.items()}
    wires.loss(task(1)[0]).backward()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: id(p) for n, p in model.named_parameters()} == same_objects
    for site in sites(model):
        assert site.A.grad is not None
        assert float(site.A.grad.norm()) > 0
        assert site.B.grad is not None
        assert float(site.B.grad.norm()) > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(v.grad is None and not v.requires_grad for v in i_lora.slow_.values())
    same(before, i_lora.slow_)


@pytest.mark.parametrize("consistency", ["mse", "one_sided"])
def test_check_6_finite_differences_of_the_term(consistency):
    model = dressed(b=0.3)
    wires, _ = held(model, consistency=consistency)
    state = copy.deepcopy(wires.state_dict())

    def value():
        wires.load_state_dict(state)  # the same draw each time
        return wires.loss(task(1)[0])

    value().backward()
    site = sites(model)[0]
    for entry in ((0, 0), (3, 1)):
        ends = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                site.B[entry] += sign * 1e-6
            ends.append(value().item())
        assert site.B.grad[entry].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_check_7_one_sided_is_the_distance_to_the_elementwise_maximum():
    g = torch.Generator().manual_seed(0)
    fast, slow = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    wanted = (fast - torch.maximum(fast, slow)).square().mean()
    found = gw.hidden_state_loss(fast, slow, consistency="one_sided")
    assert found.item() == wanted.item()
    assert found < gw.hidden_state_loss(fast, slow)


def test_check_8_the_memory_is_a_uniform_sample_of_at_most_its_size():
    counts = torch.zeros(20)
    data = [(torch.arange(a, a + 4.0)[:, None], torch.arange(a, a + 4)) for a in range(0, 20, 4)]
    contents = []
    for seed in [*range(2000), 0]:
        i_lora = gw.ILoRA(capacity=5, seed=seed)
        i_lora.consolidate(nn.Linear(1, 1), data)
        assert len(i_lora.buffer_) == 5
        held = i_lora.buffer_.draw(5, torch.Generator().manual_seed(0))[1]
        counts[held] += 1
        contents.append(sorted(held.tolist()))
    assert contents[0] == contents[-1]
    counts[contents[-1]] -= 1
    # Five slots of a run exclude each other, so the statistic is that of chi-square times 15/19.
    statistic = float(((counts - 500) ** 2 / 500).sum()) * 19 / 15
    assert 0.001 < stats.chi2(19).sf(statistic) < 0.999


# Beyond the sheet.


def test_the_whole_is_a_multiple_of_the_papers_loss():
    model = dressed(b=0.3)
    wires, i_lora = held(model, strength=0.7, replay=1.0, batch_size=16)
    x, y = task(1)[0]
    new = losses.cross_entropy(model(x), y)
    found = new + wires.loss((x, y))
    old, labels = i_lora.buffer_.draw(16, torch.Generator())
    states = []

    def run():
        kept = []
        with _hidden.listen(i_lora._blocks, lambda name, h: kept.append(h)):
            out = model(old)
        return kept, out

    fast, out = run()
    with i_lora.slow():
        states, _ = run()
    mse = torch.stack([(f - s).square().mean() for f, s in zip(fast, states, strict=True)]).mean()
    paper = 0.5 * (new + losses.cross_entropy(out, labels)) + 0.7 * mse
    torch.testing.assert_close(found, 2.0 * paper)
    assert len(fast) == 2


def test_warm_up_is_a_plain_mean_of_start_and_steps():
    model = dressed(b=0.3)
    recorded = [params(model)]
    i_lora = gw.ILoRA(decay=1.0, capacity=4)
    optimizer = sgd(model)
    with gw.attach(model, optimizer, i_lora) as wires:
        train(model, optimizer, wires, task(0), lambda: recorded.append(params(model)))
    for name, value in i_lora.slow_.items():
        torch.testing.assert_close(value, torch.stack([r[name] for r in recorded]).mean(0))


def test_update_every_counts_steps_over_the_whole_stream_and_sets_the_horizon():
    model = dressed()
    i_lora = gw.ILoRA(decay=0.9, update_every=3, capacity=4)
    assert i_lora.horizon == pytest.approx(30)
    two_tasks(model, i_lora)
    assert i_lora.steps_ == 10
    assert set(i_lora._updates.values()) == {3}


def test_sync_at_task_end_begins_again_at_the_fast_adapter():
    model = dressed(b=0.3)
    i_lora = gw.ILoRA(sync_at_task_end=True, capacity=4)
    two_tasks(model, i_lora)
    now = params(model)
    same(i_lora.slow_, {n: now[n] for n in i_lora.slow_})


def test_fold_writes_what_slow_shows():
    model = dressed(b=0.3)
    i_lora = gw.ILoRA(decay=0.9, capacity=16)
    two_tasks(model, i_lora)
    x = task(0)[0][0]
    fast = model(x)
    with i_lora.slow(model):
        slow = model(x)
        shown = params(model)
    assert torch.equal(model(x), fast)
    i_lora.fold(model)
    assert torch.equal(model(x), slow)
    same(params(model), shown)
    assert not torch.equal(slow, fast)


def test_dropout_is_off_where_two_adapters_are_compared_and_flags_come_back():
    model = dressed(dropout=0.5)
    optimizer = sgd(model)
    i_lora = gw.ILoRA(decay=0.0, replay=0.0, capacity=16)
    with gw.attach(model, optimizer, i_lora) as wires:
        wires.consolidate(task(0))
        model.blocks[1].eval()
        flags = [m.training for m in model.modules()]
        state = torch.get_rng_state()
        assert wires.loss(task(1)[0]).item() == 0.0
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules()] == flags


def test_hooks_of_other_methods_do_not_hear_the_passes_over_the_memory():
    model = dressed(b=0.3)
    feature = gw.FeatureDistillation(1.0)
    alone = dressed(b=0.3)
    with gw.attach(alone, sgd(alone), gw.FeatureDistillation(1.0)) as wires:
        wires.consolidate(task(0))
        with torch.no_grad():
            alone.head.weight.mul_(1.5)
            next(iter(sites(alone))).B.mul_(2.0)
        x, y = task(1)[0]
        wanted = wires.loss((x, y), alone(x))
    i_lora = gw.ILoRA(capacity=16, batch_size=8)
    with gw.attach(model, sgd(model), [i_lora, feature]) as wires:
        wires.consolidate(task(0))
        with torch.no_grad():
            model.head.weight.mul_(1.5)
            next(iter(sites(model))).B.mul_(2.0)
        x, y = task(1)[0]
        state = copy.deepcopy(i_lora.state_dict())
        total = wires.loss((x, y), model(x))
        i_lora.load_state_dict(state)
        assert wanted > 0
        torch.testing.assert_close(total - i_lora.loss((x, y), None), wanted)


def test_resume_is_bit_for_bit_through_a_file(tmp_path):
    def run(interrupt):
        model = dressed(b=0.3)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        i_lora = gw.ILoRA(decay=0.8, capacity=16, update_every=2)
        wires = gw.attach(model, optimizer, i_lora)
        train(model, optimizer, wires, task(0))
        wires.consolidate(task(0))
        train(model, optimizer, wires, task(1)[:3])
        if interrupt:
            tree = {"model": model.state_dict(), "wires": wires.state_dict()}
            tree["optimizer"] = optimizer.state_dict()
            checkpoint.save(tmp_path / "s.safetensors", tree)
            tree = checkpoint.load(tmp_path / "s.safetensors")
            model = dressed(seed=5)
            model.load_state_dict(tree["model"])
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
            optimizer.load_state_dict(tree["optimizer"])
            i_lora = gw.ILoRA(decay=0.8, capacity=16, update_every=2)
            wires = gw.attach(model, optimizer, i_lora)
            wires.load_state_dict(tree["wires"])
        seen = train(model, optimizer, wires, task(1)[3:])
        return seen, params(model), dict(i_lora.slow_)

    whole, resumed = run(False), run(True)
    assert whole[0] == resumed[0]
    same(whole[1], resumed[1])
    same(whole[2], resumed[2])


def test_a_head_that_appears_later_gets_a_slow_copy_of_its_own_with_a_warm_up():
    model = dressed(b=0.3)
    model.head = Heads([model.head])
    i_lora = gw.ILoRA(decay=0.9, capacity=4)
    optimizer = sgd(model)
    with gw.attach(model, optimizer, i_lora) as wires:
        wires.consolidate(task(0))
        train(model, optimizer, wires, task(0))
    model.head.append(nn.Linear(8, 2).double())
    optimizer = sgd(model)
    with gw.attach(model, optimizer, i_lora) as wires:
        torch.testing.assert_close(i_lora.slow_["head.1.weight"], model.head[1].weight.detach())
        train(model, optimizer, wires, task(1)[:1])
    assert i_lora._updates["head.1.weight"] == 1
    assert i_lora._updates["head.0.weight"] == 6


def test_bfloat16_adapters_have_a_float32_average_that_moves_by_small_steps():
    model = dressed(b=0.3, dtype=torch.bfloat16)
    i_lora = gw.ILoRA(decay=0.999, warm_up=False)
    with gw.attach(model, sgd(model), i_lora) as wires:
        site = sites(model)[0]
        name = next(n for n in i_lora.slow_ if n.endswith("lora_B.group_0.weight"))
        start = i_lora.slow_[name].clone()
        with torch.no_grad():
            site.B.add_(0.01)
        wires.optimizer.step()
    assert start.dtype == torch.float32
    gap = site.B.detach().float() - start
    torch.testing.assert_close(i_lora.slow_[name] - start, 0.001 * gap, rtol=1e-2, atol=1e-7)


def test_padding_that_is_not_a_number_reaches_neither_value_nor_gradient():
    fast = torch.ones(1, 2, 3, requires_grad=True)
    poisoned = torch.cat([fast, torch.full((1, 1, 3), torch.nan)], dim=1)
    loss = gw.hidden_state_loss(poisoned, torch.zeros(1, 3, 3), torch.tensor([[1, 1, 0]]))
    loss.backward()
    assert loss.item() == 1.0
    torch.testing.assert_close(fast.grad, torch.full((1, 2, 3), 1 / 3))


def test_blocks_begin_at_the_first_adapted_one_and_can_be_named():
    model = dressed(targets=["blocks.1.0"])
    assert list(_hidden.blocks(model, sites(model))) == ["blocks.1"]
    model = dressed(targets=["blocks.0.0"])
    assert list(_hidden.blocks(model, sites(model))) == ["blocks.0", "blocks.1"]
    assert list(_hidden.blocks(model, sites(model), ["blocks.?", "head"])) == [
        "blocks.0", "blocks.1", "head",
    ]  # fmt: skip
    model = dressed(targets=["embed"])
    assert list(_hidden.blocks(model, sites(model))) == ["embed"]


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(SelectionError, match="no LoRA layers"):
        gw.attach(model := plain(), sgd(model), gw.ILoRA())
    model = dressed()
    for words, options in {
        "decay=1.5": {"decay": 1.5},
        "update_every=0": {"update_every": 0},
        "consistency='l1'": {"consistency": "l1"},
        "buffer='fifo'": {"buffer": "fifo"},
        "replay=-1.0": {"replay": -1.0},
        "batch_size=0": {"batch_size": 0},
        "capacity=0": {"capacity": 0},
        "matches no module": {"layers": ["block.*"]},
    }.items():
        with pytest.raises(UsageError, match=words.replace("*", r"\*")):
            gw.attach(model, sgd(model), gw.ILoRA(**options))
    i_lora = gw.ILoRA()
    with pytest.raises(AttachError, match="attach and train first"), i_lora.slow(model):
        pass
    with gw.attach(model, sgd(model), i_lora) as wires, pytest.raises(UsageError, match="loader"):
        wires.consolidate()
    with pytest.raises(AttachError, match="name the model"):
        i_lora.fold()
    with pytest.raises(AttachError, match="no parameter"):
        i_lora.fold(plain())
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(SelectionError, match="all frozen"):
        i_lora.setup(model)
    with pytest.raises(DataError, match="shapes"):
        gw.hidden_state_loss(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(UsageError, match="different names"):
        gw.interpolate_adapters({"A": torch.zeros(1)}, {"B": torch.zeros(1)}, 0.5)
    other = dressed(targets=["embed"])
    with (
        pytest.raises(AttachError, match=r"no parameter|attach"),
        averaging.swapped(other, i_lora.slow_),
    ):
        pass
