"""Penalties: the step hook against autograd of the pure function, and the sheets' exact checks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import (
    AttachError,
    CheckpointError,
    NonFiniteError,
    SelectionError,
    UsageError,
)
from guywire.methods.penalties.ewc import collapse

OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01),
}


class Mixed(nn.Module):
    """Layers of several kinds, a 0-d parameter, channels_last weights."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 3)
        self.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def forward(self, x):
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(self.gain * mixed.mean(1))


def tensors_like(model, seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    made = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in model.named_parameters()
    }
    return {n: t.abs() for n, t in made.items()} if positive else made


def batch(seed=0, n=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 4, 4, generator=generator, dtype=dtype)
    return x, torch.randint(3, (n,), generator=generator)


def known_ewc(model, tasks, **options):
    """EWC that was told means and importances of tasks, as consolidate would have."""
    ewc = gw.EWC(**options)
    for anchors, importances in tasks:
        for name in anchors:
            ewc._add(name, importances[name].clone(), anchors[name].clone())
        ewc.tasks_ += 1
    return ewc


def pull_of(model, regularizer):
    """What attaching adds to zero gradients, seen by an optimiser that does not move."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gw.attach(model, optimizer, regularizer) as wires:
        optimizer.zero_grad()
        optimizer.step()
        value = wires.penalty()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found, value


def against_autograd(model, regularizer, pure):
    params = dict(model.named_parameters())
    wanted_value = pure(params)
    wanted = torch.autograd.grad(wanted_value, list(params.values()))
    found, value = pull_of(model, regularizer)
    torch.testing.assert_close(value, wanted_value.detach(), rtol=1e-12, atol=0)
    flat = torch.cat([found[n].flatten() for n in params])
    want = torch.cat([g.flatten() for g in wanted])
    assert float((flat - want).norm() / want.norm()) < 1e-10


# --- the fast path equals autograd ---


@pytest.mark.parametrize("anchor", ["given", "zero"])
@pytest.mark.parametrize(("kind", "pure"), [(gw.L2, gw.l2_penalty), (gw.L1, gw.l1_penalty)])
def test_l1_and_l2_equal_autograd(kind, pure, anchor):
    model = Mixed()
    anchors = tensors_like(model, 1) if anchor == "given" else None
    against_autograd(
        model, kind(0.37, anchor=anchors or "zero"), lambda params: 0.37 * pure(params, anchors)
    )


def test_ewc_equals_autograd():
    model = Mixed()
    anchors, importances = tensors_like(model, 1), tensors_like(model, 2, positive=True)
    against_autograd(
        model,
        known_ewc(model, [(anchors, importances)], strength=3.0),
        lambda params: 3.0 * gw.ewc_penalty(params, anchors, importances),
    )


def test_three_tasks_collapsed_equal_three_penalties():
    model = Mixed()
    tasks = [(tensors_like(model, s), tensors_like(model, s + 9, positive=True)) for s in (1, 2, 3)]
    for _, importances in tasks:  # weights of which some tasks know nothing
        importances["conv.weight"][0] = 0.0
    tasks[0][1]["head.weight"].zero_()
    params = dict(model.named_parameters())
    found, value = pull_of(model, known_ewc(model, tasks, strength=2.0))
    separate = sum(2.0 * gw.ewc_penalty(params, a, f) for a, f in tasks)
    wanted = torch.autograd.grad(separate, list(params.values()))
    flat = torch.cat([found[n].flatten() for n in params])
    want = torch.cat([g.flatten() for g in wanted])
    assert float((flat - want).norm() / want.norm()) < 1e-10

    # The values differ by a constant that does not depend on the parameters.
    other = Mixed(seed=5)
    other_params = dict(other.named_parameters())
    _, other_value = pull_of(other, known_ewc(other, tasks, strength=2.0))
    other_separate = sum(2.0 * gw.ewc_penalty(other_params, a, f) for a, f in tasks)
    torch.testing.assert_close(
        (separate - value).detach(), (other_separate - other_value).detach(), rtol=1e-10, atol=1e-10
    )


weight = st.floats(0, 1e6, allow_subnormal=False)
place = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(weight, place), min_size=2, max_size=5), place)
def test_collapse_is_the_sum_of_quadratics(tasks, theta):
    p, m = (torch.tensor([v], dtype=torch.float64) for v in tasks[0])
    for f, a in tasks[1:]:
        p, m = collapse(p, m, *(torch.tensor([v], dtype=torch.float64) for v in (f, a)))
    wanted = sum(f * (theta - a) for f, a in tasks)
    scale = sum(f * (abs(theta) + abs(a)) for f, a in tasks)
    assert abs(float(p * (theta - m)) - wanted) <= 1e-12 * scale + 1e-300
    assert bool(torch.isfinite(m).all())


def test_online_decay():
    model = Mixed()
    tasks = [(tensors_like(model, s), tensors_like(model, s + 9, positive=True)) for s in (1, 2, 3)]
    ewc = known_ewc(model, tasks, strength=1.0, decay=0.5)
    precision = {
        n: 0.25 * tasks[0][1][n] + 0.5 * tasks[1][1][n] + tasks[2][1][n] for n in tasks[0][0]
    }
    against_autograd(model, ewc, lambda params: gw.ewc_penalty(params, tasks[2][0], precision))


def test_the_pure_functions_pass_gradcheck():
    p = {"a": torch.randn(3, 2, dtype=torch.float64, requires_grad=True)}
    a, f = {"a": torch.randn(3, 2).double()}, {"a": torch.rand(3, 2).double()}
    assert torch.autograd.gradcheck(lambda x: gw.l2_penalty({"a": x}, a), p["a"])
    assert torch.autograd.gradcheck(lambda x: gw.l1_penalty({"a": x}, a), p["a"])
    assert torch.autograd.gradcheck(lambda x: gw.ewc_penalty({"a": x}, a, f), p["a"])


# --- rehearsal-free-cl, check by check ---


def test_1_ewc_with_ones_is_l2_bit_for_bit():
    model = Mixed(dtype=torch.float32)
    anchors = tensors_like(model, 1)
    ones = {n: torch.ones_like(t) for n, t in anchors.items()}
    by_ewc, ewc_value = pull_of(model, known_ewc(model, [(anchors, ones)], strength=0.3))
    by_l2, l2_value = pull_of(model, gw.L2(0.3, anchor=anchors))
    assert torch.equal(ewc_value, l2_value)
    for name, p in model.named_parameters():
        assert torch.equal(by_ewc[name], by_l2[name])
        torch.testing.assert_close(by_l2[name], 2 * 0.3 * (p - anchors[name]).detach())


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("kind", ["L2", "L1", "EWC", "L2 decoupled"])
def test_2_strength_zero_is_plain_training_bit_for_bit(kind, optimizer):
    plain, held = Mixed(dtype=torch.float32), Mixed(dtype=torch.float32)
    anchors = tensors_like(held, 1)
    importances = tensors_like(held, 2, positive=True)
    regularizer = {
        "L2": lambda: gw.L2(0.0, anchor=anchors),
        "L1": lambda: gw.L1(0.0, anchor=anchors),
        "EWC": lambda: known_ewc(held, [(anchors, importances)], strength=0.0),
        "L2 decoupled": lambda: gw.L2(0.0, anchor=anchors, decoupled=True),
    }[kind]()
    optimisers = [OPTIMISERS[optimizer](m.parameters()) for m in (plain, held)]
    gw.attach(held, optimisers[1], regularizer)
    for step in range(20):
        x, y = batch(step, dtype=torch.float32)
        for model, optimiser in zip((plain, held), optimisers, strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    for a, b in zip(plain.state_dict().values(), held.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def quadratic(dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dimension, generator=generator, dtype=torch.float64)


class Vector(nn.Module):
    def __init__(self, dimension=5):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))


def minimise(model, loss, regularizer, lr, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with gw.attach(model, optimizer, regularizer):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model.w).backward()
            optimizer.step()
    return model.w.detach()


@pytest.mark.parametrize("c", [0.1, 1.0, 1e6])
def test_3_closed_form_of_ridge_towards_an_anchor(c):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(40, generator=generator, dtype=torch.float64)
    w0 = quadratic(5, 1)
    eye = torch.eye(5, dtype=torch.float64)
    wanted = torch.linalg.solve(x.T @ x / 40 + 2 * c * eye, x.T @ y / 40 + 2 * c * w0)
    model = Vector()
    found = minimise(
        model,
        lambda w: (x @ w - y).square().sum() / 80,
        gw.L2(c, anchor={"w": w0}),
        lr=1 / (3 + 2 * c),
        steps=500,
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    if c == 1e6:
        torch.testing.assert_close(found, w0, rtol=0, atol=1e-5)


def test_4_ewc_reaches_the_joint_optimum_and_l2_does_not():
    h1, h2 = quadratic(5, 1).abs() + 0.1, quadratic(5, 2).abs() + 0.1
    w1, w2 = quadratic(5, 3), quadratic(5, 4)
    joint = (h1 * w1 + h2 * w2) / (h1 + h2)

    def second(w):
        return 0.5 * (h2 * (w - w2).square()).sum()

    model = Vector()
    ewc = known_ewc(model, [({"w": w1}, {"w": h1})], strength=0.5)
    found = minimise(model, second, ewc, lr=0.3, steps=500)
    torch.testing.assert_close(found, joint, rtol=0, atol=1e-10)
    flat = minimise(Vector(), second, gw.L2(0.5, anchor={"w": w1}), lr=0.3, steps=300)
    assert float((flat - joint).abs().max()) > 1e-2


def test_8_what_is_not_selected_stays_bit_for_bit():
    model = Mixed(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    model.requires_grad_(False)
    model.attention.in_proj_weight.requires_grad_(True)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    gw.attach(model, optimizer, gw.L2(0.1, select="*.in_proj_weight"))
    for step in range(5):
        optimizer.zero_grad()
        x, y = batch(step, dtype=torch.float32)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "attention.in_proj_weight")


def test_8_the_papers_parameter_counts():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.ViTConfig(num_labels=200)
        model = transformers.ViTForImageClassification(config)
    qkv = gw.select(
        model, ["*.query.*", "*.key.*", "*.value.*", "*q_proj*", "*k_proj*", "*v_proj*"]
    )
    assert sum(p.numel() for p in qkv.values()) == 21_261_312
    assert sum(p.numel() for p in gw.select(model, "classifier.*").values()) == 153_800


@pytest.mark.parametrize("kind", [gw.L2, gw.L1])
def test_9_consolidate_moves_the_anchor_and_shares_no_memory(kind):
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = kind(0.5)
    with gw.attach(model, optimizer, regularizer) as wires:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        assert float(wires.penalty()) > 0
        old = regularizer.anchors_
        old_values = {n: t.clone() for n, t in old.items()}
        wires.consolidate()
        assert float(wires.penalty()) == 0.0
        new = regularizer.anchors_
        kept = {n: t.clone() for n, t in new.items()}
        storages = {t.untyped_storage().data_ptr() for t in new.values()}
        assert not storages & {t.untyped_storage().data_ptr() for t in old.values()}
        assert not storages & {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-3.0)
        assert all(torch.equal(new[n], kept[n]) for n in kept)
        assert all(torch.equal(old[n], old_values[n]) for n in old)


def test_9_ewc_likewise():
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc = gw.EWC(1.0)
    with gw.attach(model, optimizer, ewc) as wires:
        wires.consolidate([batch()])
        assert float(wires.penalty()) == 0.0
        kept = {n: t.clone() for n, t in ewc.mean_.items()}
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-3.0)
        assert all(torch.equal(ewc.mean_[n], kept[n]) for n in kept)
        assert float(wires.penalty()) > 0


# --- fisher-sequential-transfer ---


def test_fst_4_by_hand():
    model = Vector(3)
    anchors = torch.tensor([1.0, -2.0, 0.5]).double()
    importances = torch.tensor([2.0, 0.0, 4.0]).double()
    ewc = known_ewc(model, [({"w": anchors}, {"w": importances})], strength=0.5)
    with torch.no_grad():
        model.w.copy_(torch.tensor([3.0, 7.0, 0.0]))
    found, value = pull_of(model, ewc)
    assert float(value) == 0.5 * (2 * 4 + 0 + 4 * 0.25)
    assert found["w"].tolist() == [2.0 * 2.0, 0.0, 4.0 * -0.5]
    with torch.no_grad():
        model.w.copy_(anchors)
    ewc2 = known_ewc(model, [({"w": anchors}, {"w": importances})], strength=0.5)
    found, value = pull_of(model, ewc2)
    assert float(value) == 0.0
    assert found["w"].tolist() == [0.0, 0.0, 0.0]


def test_fst_5_the_schedule_reaches_the_pull():
    # The released script computed the schedule and then multiplied by a constant.
    falling = gw.schedules.Falling(0.9, 0.2, epochs=20, steps_per_epoch=1)
    model = Vector(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wires = gw.attach(model, optimizer, gw.L2(falling, anchor={"w": torch.ones(1).double()}))
    pulls, values = [], []
    for _ in range(21):
        optimizer.zero_grad()
        optimizer.step()
        pulls.append(float(model.w.grad) / -2)
        values.append(float(wires.penalty()))
    wanted = [max(0.2, 0.9 * (1 - e / 20)) for e in range(21)]
    assert pulls == pytest.approx(wanted, abs=1e-12)
    assert values == pytest.approx(wanted, abs=1e-12)
    assert pulls[5] == pytest.approx(0.675)


def test_fst_6_joint_optimum_of_a_chain_of_three():
    h = [quadratic(5, s).abs() + 0.1 for s in range(3)]
    w = [quadratic(5, 10 + s) for s in range(3)]
    model = Vector()
    ewc = known_ewc(model, [({"w": w[0]}, {"w": h[0]}), ({"w": w[1]}, {"w": h[1]})], strength=0.5)
    found = minimise(
        model, lambda x: 0.5 * (h[2] * (x - w[2]).square()).sum(), ewc, lr=0.2, steps=800
    )
    joint = sum(a * b for a, b in zip(h, w, strict=True)) / sum(h)
    torch.testing.assert_close(found, joint, rtol=0, atol=1e-9)


# --- decoupled ---


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}], ids=str)
def test_decoupled_l2_towards_zero_is_adamws_decay_bit_for_bit(options):
    decayed, held = Mixed(dtype=torch.float32), Mixed(dtype=torch.float32)
    one = torch.optim.AdamW(decayed.parameters(), lr=0.01, weight_decay=0.2, **options)
    two = torch.optim.AdamW(held.parameters(), lr=0.01, weight_decay=0.0, **options)
    gw.attach(held, two, gw.L2(0.1, anchor="zero", decoupled=True))
    for step in range(20):
        x, y = batch(step, dtype=torch.float32)
        for model, optimiser in ((decayed, one), (held, two)):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    for a, b in zip(decayed.parameters(), held.parameters(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=6),
    st.floats(0.01, 3),
    st.floats(0.01, 1),
)
def test_decoupled_l1_is_the_proximal_step(pairs, strength, lr):
    start, anchor = (torch.tensor(v, dtype=torch.float64) for v in zip(*pairs, strict=True))
    model = Vector(len(start))
    with torch.no_grad():
        model.w.copy_(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with gw.attach(model, optimizer, gw.L1(strength, anchor={"w": anchor}, decoupled=True)):
        optimizer.step()

    # The minimiser of |x - start|^2 / 2 + lr * strength * |x - anchor|: no point does better.
    def objective(x):
        return 0.5 * (x - start).square() + lr * strength * (x - anchor).abs()

    best = objective(model.w.detach())
    for other in (start, anchor, model.w.detach() + 1e-3, model.w.detach() - 1e-3):
        assert bool((best <= objective(other) + 1e-12).all())


def test_decoupled_ewc_moves_by_rate_times_pull():
    model = Mixed()
    anchors, importances = tensors_like(model, 1), tensors_like(model, 2, positive=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc = known_ewc(model, [(anchors, importances)], strength=0.3, decoupled=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with gw.attach(model, optimizer, ewc):
        optimizer.step()
    for name, p in model.named_parameters():
        wanted = before[name] - 0.01 * 2 * 0.3 * importances[name] * (before[name] - anchors[name])
        torch.testing.assert_close(p.detach(), wanted)
        assert p.grad is None


# --- strengths and selections ---


def test_strengths_by_glob_and_schedule():
    model = Mixed()
    anchors = tensors_like(model, 1)
    strengths = {"conv.bias": 5.0, "conv.*": lambda step: 1.0 + step, "*.bias": 0.0, "gain": 2.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    l2 = gw.L2(strengths, anchor=anchors)
    wires = gw.attach(model, optimizer, l2)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step()
        held = {"conv.bias": 5.0, "conv.weight": 1.0 + step, "gain": 2.0}
        for name, p in model.named_parameters():
            if name in held:
                wanted = 2 * held[name] * (p - anchors[name]).detach()
                torch.testing.assert_close(p.grad, wanted)
            else:
                assert p.grad is None
        value = sum(
            s * (model.get_parameter(n) - anchors[n]).square().sum() for n, s in held.items()
        )
        torch.testing.assert_close(wires.penalty(), value.detach())


def test_strengths_outside_the_selection_or_out_of_range():
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SelectionError, match=r"strength for 'head\.\*' lies outside"):
        gw.attach(model, optimizer, gw.L2({"head.*": 1.0}, select="conv.*"))
    with pytest.raises(SelectionError, match="matches none"):
        gw.attach(model, optimizer, gw.L2({"haed.*": 1.0}))
    for bad in (-1.0, float("nan"), {"conv.*": -2.0}, lambda step: -1.0):
        with pytest.raises(UsageError, match="strength is"):
            gw.attach(model, optimizer, gw.L2(bad))


# --- anchors ---


def test_anchor_rules():
    model = Vector(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wanted = {"previous": 4.0, "initial": 9.0, "zero": 9.0}
    for rule, value in wanted.items():
        with torch.no_grad():
            model.w.fill_(0.0 if rule != "zero" else 7.0)
        with gw.attach(model, optimizer, gw.L2(1.0, anchor=rule)) as wires:
            with torch.no_grad():
                model.w.fill_(1.0)
            wires.consolidate()
            with torch.no_grad():
                model.w.fill_(3.0)
            assert float(wires.penalty()) == value


def test_bad_anchors():
    model = Vector(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(UsageError, match="anchor='last' is none of"):
        gw.attach(model, optimizer, gw.L2(anchor="last"))
    with pytest.raises(UsageError, match="names none of them"):
        gw.attach(model, optimizer, gw.L2(anchor={}))
    with pytest.raises(UsageError, match="names 'v', which the model lacks"):
        gw.attach(model, optimizer, gw.L2(anchor={"v": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"given anchor of 'w' has the shape \(3,\)"):
        gw.attach(model, optimizer, gw.L2(anchor={"w": torch.zeros(3)}))
    with gw.attach(model, optimizer, l2 := gw.L2()):
        pass
    other = nn.Linear(2, 2)
    with pytest.raises(AttachError, match="learnt from another model"):
        gw.attach(other, torch.optim.SGD(other.parameters()), l2)
    larger = Vector(3)
    with pytest.raises(CheckpointError, match=r"anchor of 'w' has the shape \(2,\)"):
        gw.attach(larger, torch.optim.SGD(larger.parameters()), l2)


def test_given_anchors_are_copied():
    model = Vector(2)
    mine = torch.ones(2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gw.attach(model, optimizer, gw.L2(1.0, anchor={"w": mine})) as wires:
        mine.zero_()
        assert float(wires.penalty()) == 2.0


@pytest.mark.parametrize("kind", [gw.L2, gw.L1, gw.EWC])
def test_float32_anchors_under_bfloat16_parameters(kind):
    model = Mixed(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    regularizer = kind(1.0, anchor_dtype=torch.float32)
    with gw.attach(model, optimizer, regularizer) as wires:
        wires.consolidate([batch(dtype=torch.bfloat16)])
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(step, dtype=torch.bfloat16)
            nn.functional.cross_entropy(model(x).float(), y).backward()
            optimizer.step()
        assert torch.isfinite(wires.penalty())
        assert wires.penalty().dtype == torch.float32
    held = regularizer.mean_ if kind is gw.EWC else regularizer.anchors_
    assert {t.dtype for t in held.values()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- state ---


@pytest.mark.parametrize("make", [
    lambda: gw.L2(0.5), lambda: gw.L1(0.5), lambda: gw.EWC(5.0), lambda: gw.EWC(5.0, decay=0.9),
])  # fmt: skip
def test_state_goes_through_a_file_and_training_continues_the_same(make, tmp_path):
    from guywire.core import checkpoint

    def train(model, optimizer, wires, steps):
        losses = []
        for step in steps:
            optimizer.zero_grad()
            x, y = batch(step, dtype=torch.float32)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append((float(loss.detach()), float(wires.penalty())))
        return losses

    model = Mixed(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wires = gw.attach(model, optimizer, make())
    train(model, optimizer, wires, range(2))
    wires.consolidate([batch(9, dtype=torch.float32)])
    train(model, optimizer, wires, range(2, 4))
    state = {"model": model.state_dict(), "wires": wires.state_dict()}
    checkpoint.save(tmp_path / "state.safetensors", state)
    wanted = train(model, optimizer, wires, range(4, 9))

    again = Mixed(seed=3, dtype=torch.float32)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.05)
    wires = gw.attach(again, optimizer, make())
    loaded = checkpoint.load(tmp_path / "state.safetensors")
    again.load_state_dict(loaded["model"])
    wires.load_state_dict(loaded["wires"])
    assert train(again, optimizer, wires, range(4, 9)) == wanted


def test_state_that_does_not_fit():
    model = Vector(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong = {"w": torch.zeros(3)}
    right = {"w": torch.zeros(2)}
    with gw.attach(model, optimizer, l2 := gw.L2()), pytest.raises(CheckpointError, match="shape"):
        l2.load_state_dict({"anchors": wrong})
    with gw.attach(model, optimizer, ewc := gw.EWC()):
        with pytest.raises(CheckpointError, match="saved anchor"):
            ewc.load_state_dict({"mean": wrong, "precision": right, "tasks": 1})
        with pytest.raises(CheckpointError, match="saved importance"):
            ewc.load_state_dict({"mean": right, "precision": wrong, "tasks": 1})
        assert ewc.mean_ == {}


# --- EWC's own ---


def test_ewc_estimates_what_diagonal_fisher_says():
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc = gw.EWC(1.0, labels="true", select="head.*")
    data = [batch(1), batch(2)]
    with gw.attach(model, optimizer, ewc) as wires:
        wires.consolidate(data)
    wanted = gw.curvature.diagonal_fisher(model, data, labels="true", select="head.*")
    assert ewc.precision_.keys() == wanted.keys()
    for name, f in wanted.items():
        torch.testing.assert_close(ewc.precision_[name], f)
        torch.testing.assert_close(ewc.mean_[name], model.get_parameter(name).detach())


def test_normalise_scales_to_mean_one():
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc = gw.EWC(1.0, normalise="mean")
    with gw.attach(model, optimizer, ewc) as wires:
        wires.consolidate([batch(1)])
    everything = torch.cat([f.flatten() for f in ewc.precision_.values()])
    assert float(everything.mean()) == pytest.approx(1.0)


def test_sampled_labels_are_the_same_each_time_and_leave_the_random_state():
    found = []
    for _ in range(2):
        model = Mixed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = torch.get_rng_state()
        with gw.attach(model, optimizer, ewc := gw.EWC(1.0, labels="sampled", seed=4)) as wires:
            wires.consolidate([batch(1)])
        assert torch.equal(torch.get_rng_state(), state)
        found.append(ewc.precision_["head.weight"])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": 1.5}, r"decay=1\.5 must lie in \[0, 1\]"),
        ({"labels": "batch"}, "labels='batch' is none of"),
        ({"normalise": "max"}, "normalise='max'"),
    ],
)
def test_bad_options(options, words):
    model = Vector()
    with pytest.raises(UsageError, match=words):
        gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), gw.EWC(**options))


def test_ewc_needs_data_and_a_finite_loss():
    model = Mixed(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewc = gw.EWC(1.0)
    with gw.attach(model, optimizer, ewc) as wires:
        with pytest.raises(UsageError, match="EWC estimates importances from data"):
            wires.consolidate()
        x, y = batch(dtype=torch.float32)
        with pytest.raises(NonFiniteError):
            wires.consolidate([(x * float("nan"), y)])
        assert ewc.tasks_ == 0
        assert ewc.precision_ == {}
        assert float(wires.penalty()) == 0.0


def test_a_new_block_is_free_until_consolidated():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "one": nn.Linear(3, 2)})
    regularizer = gw.L2(0.5)
    with gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), regularizer) as wires:
        wires.consolidate()
    model["two"] = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gw.attach(model, optimizer, regularizer) as wires:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        optimizer.step()
        assert model["two"].weight.grad is None
        torch.testing.assert_close(model["one"].weight.grad, torch.ones(2, 3))
        wires.consolidate()
        assert "two.weight" in regularizer.anchors_


def test_learnt_anchors_follow_a_model_to_another_device():
    model = Vector(2)
    l2 = gw.L2(0.5)
    gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), l2).detach()
    moved = Vector(2).to("meta")
    with gw.attach(moved, torch.optim.SGD(moved.parameters(), lr=0.1), l2):
        assert l2.anchors_["w"].device.type == "meta"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: gw.L2(), "L2()"),
        (lambda: gw.L1(0.5, anchor="zero"), "L1(strength=0.5, anchor='zero')"),
        (lambda: gw.EWC(7.0, decay=0.9), "EWC(strength=7.0, decay=0.9)"),
    ],
)
def test_repr_names_what_differs_from_the_defaults(made, words):
    assert repr(made()) == words
