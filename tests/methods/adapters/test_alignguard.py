"""AlignGuard-LoRA on models: the sheet's checks that need one, state, loops, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import (
    AttachError,
    CheckpointError,
    NonFiniteError,
    SelectionError,
    UsageError,
)
from guywire.core.regularizer import Step
from guywire.curvature import output_gram
from guywire.methods.adapters._lora import sites
from guywire.methods.adapters.alignguard_terms import fisher_norm, geodesic_overlap, split_update

peft = pytest.importorskip("peft")


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def two(dtype=torch.float64, n=2):
    return gw.lora_group(net(dtype), n, 2, target_modules=["0", "2"]).to(dtype)


def data(seed=1, n=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=g)


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model, regularizer, steps=6, batch=None):
    """Fine-tune from alignment data on; return the losses."""
    optimizer = adam(model)
    x, y = batch or data(2)
    losses = []
    wires = gw.attach(model, optimizer, regularizer) if regularizer else None
    if wires is not None:
        wires.consolidate([data()])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if wires is not None:
        wires.detach()
    return losses


@pytest.mark.parametrize("mode", ["two_branch", "projected"])
def test_check_1_without_weights_it_is_plain_lora(mode):
    """lambda_A = lambda_T = lambda_NC = 0: losses and factors bit for bit."""
    plain, held = two(), two()
    off = gw.AlignGuardLoRA(aligned=0.0, task=0.0, collision=0.0, mode=mode)
    assert train(plain, None) == train(held, off)
    for a, b in zip(plain.parameters(), held.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["two_branch", "projected"])
def test_check_2_nothing_pulls_at_the_start(mode):
    model = two()
    regularizer = gw.AlignGuardLoRA(5.0, mode=mode)
    optimizer = adam(model)
    with gw.attach(model, optimizer, regularizer) as wires:
        assert regularizer.penalty() is None
        assert regularizer.terms() == {}
        wires.consolidate([data()])
        assert float(wires.penalty()) == 0.0
        assert set(regularizer.terms().values()) == {0.0}
        optimizer.step()
        for p in model.parameters():
            assert p.grad is None or not bool(p.grad.any())


def test_the_penalty_from_dense_updates_and_the_definition_of_f():
    """The whole of it, by hand: F from autograd on one sample at a time, dense products."""
    model = two()
    plain = net()
    regularizer = gw.AlignGuardLoRA(0.7, aligned=0.3, task=0.2, collision=0.4, overlap=0.25)
    x, y = data()
    optimizer = adam(model)
    wires = gw.attach(model, optimizer, regularizer)
    wires.consolidate([(x[:5], y[:5]), (x[5:], y[5:])])
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    wanted = 0.0
    found = {"aligned": 0.0, "task": 0.0, "overlap": 0.0, "geodesic": 0.0}
    for at in (0, 2):
        weight = plain[at].weight
        f = torch.zeros(len(weight), len(weight), dtype=torch.float64)
        for i in range(len(x)):
            loss = F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1])
            (grad,) = torch.autograd.grad(loss, weight)
            f += grad @ grad.T / len(x)
        assert abs(regularizer.trace_[str(at)] - float(f.trace())) < 1e-10
        f = f / f.trace() * len(f)
        values, vectors = torch.linalg.eigh(f)
        m = next(m for m in range(len(f) + 1) if values.flip(0)[:m].sum() >= 0.9 * len(f))
        basis, values = vectors.flip(1)[:, :m], values.flip(0)[:m]
        task, aligned = (s.update().detach() for s in sites(model) if s.name == str(at))
        eta = 1 + 4 * torch.sigmoid((aligned + task).abs() - 0.01)
        terms = {
            "aligned": fisher_norm(aligned, basis, values) + fisher_norm(task, basis, values),
            "task": task.square().sum() + split_update(aligned, basis)[1].square().sum(),
            "overlap": (eta * (aligned * task).abs()).mean(),
            "geodesic": geodesic_overlap(aligned, task),
        }
        for name, value in terms.items():
            found[name] += float(value)
        wanted += 0.3 * terms["aligned"] + 0.2 * terms["task"]
        wanted += 0.4 * (0.25 * terms["overlap"] + 0.75 * terms["geodesic"])
    torch.testing.assert_close(wires.penalty(), 0.7 * wanted.detach(), rtol=1e-9, atol=0)
    assert regularizer.terms() == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("options", [
    {"mode": "two_branch"}, {"mode": "projected"}, {"large": "weight", "reduce": "sum"},
    {"normalise": "top"}, {"normalise": None}, {"energy": 0.0}, {"collision": 0.0},
])  # fmt: skip
def test_the_pull_is_the_gradient_of_the_penalty(options):
    model = two()
    regularizer = gw.AlignGuardLoRA(2.0, **options)
    train(model, regularizer)
    params = [p for p in model.parameters() if p.requires_grad]
    frozen = torch.optim.SGD(params, lr=0.0)
    with gw.attach(model, frozen, regularizer) as wires:
        frozen.zero_grad()
        frozen.step()
        for p in params:
            at = tuple(s - 1 for s in p.shape)
            ends = []
            for sign in (1.0, -2.0, 1.0):
                with torch.no_grad():
                    p[at] += sign * 1e-6
                ends.append(float(wires.penalty()))
            slope = (ends[0] - ends[1]) / 2e-6
            assert abs(float(p.grad[at]) - slope) < 1e-7 * max(1.0, abs(slope))


def test_the_scale_of_amp_is_honoured():
    grads = []
    for scale in (1.0, 8.0):
        model = two()
        regularizer = gw.AlignGuardLoRA()
        train(model, regularizer)
        optimizer = adam(model)
        with gw.attach(model, optimizer, regularizer):
            optimizer.zero_grad()
            regularizer.before_step(Step(optimizer, scale=scale))
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, eight in zip(*grads, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(8.0 * one, eight)


def test_check_8_no_direction_held_leaves_the_task_term():
    model = two()
    regularizer = gw.AlignGuardLoRA(energy=0.0, mode="projected")
    train(model, regularizer)
    with gw.attach(model, adam(model), regularizer):
        terms = regularizer.terms()
        assert (terms["aligned"], terms["overlap"], terms["geodesic"]) == (0.0, 0.0, 0.0)
        assert terms["task"] > 0.0


def test_projected_mode_reports_a_geodesic_overlap_of_nothing():
    model = two()
    regularizer = gw.AlignGuardLoRA(mode="projected")
    train(model, regularizer)
    with gw.attach(model, adam(model), regularizer):
        assert regularizer.terms()["geodesic"] < 1e-20
        assert regularizer.terms()["overlap"] > 0.0


def test_check_9_through_the_step_hook():
    """Full-rank LoRA on a quadratic task ends where the closed form says."""
    torch.manual_seed(0)
    out, inside = 5, 4
    model = nn.Sequential(nn.Linear(inside, out, bias=False)).double()
    start = model[0].weight.detach().clone()
    target = start + torch.randn(out, inside, dtype=torch.float64)
    model = gw.lora_group(model, 1, 4, target_modules=["0"]).double()
    regularizer = gw.AlignGuardLoRA(mode="projected", collision=0.0)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1)
    (site,) = sites(model)
    with gw.attach(model, optimizer, regularizer) as wires:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(40, inside, generator=g, dtype=torch.float64)
        wires.consolidate([(x, torch.randint(out, (40,), generator=g))])
        for _ in range(2500):
            optimizer.zero_grad()
            (0.5 * (start + site.update() - target).square().sum()).backward()
            optimizer.step()
        basis, values = regularizer.basis_["0"], regularizer.values_["0"]
    assert 0 < basis.shape[1] < out
    shrunk = (basis.T @ (target - start)) / (1 + 2 * 0.25 * values)[:, None]
    wanted = basis @ shrunk + split_update(target - start, basis)[1] / (1 + 2 * 0.5)
    assert float((site.update().detach() - wanted).abs().max()) < 1e-6


def test_check_10_merged_it_computes_the_same():
    model = two()
    train(model, gw.AlignGuardLoRA())
    x, _ = data(7)
    dense = net()
    with torch.no_grad():
        for site in sites(model):
            dense.get_submodule(site.name).weight += site.update()
    branched = model(x).detach()
    assert float((branched - net()(x).detach()).abs().max()) > 1e-3
    torch.testing.assert_close(dense(x).detach(), branched, rtol=0, atol=1e-5)
    torch.testing.assert_close(gw.merge_lora_group(model)(x), branched, rtol=0, atol=1e-5)


def test_held_harder_it_moves_less_where_alignment_is_sensitive():
    moved = []
    for strength in (0.0, 1.0, 100.0):
        model = two()
        train(model, gw.AlignGuardLoRA(strength), steps=40)
        f = output_gram(net(), [data()])
        total = sum(
            (f[f"{name}.weight"] @ update).mul(update).sum()
            for name in ("0", "2")
            for update in [sum(s.update().detach() for s in sites(model) if s.name == name)]
        )
        moved.append(float(total))
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_a_metric_for_the_task_term():
    model = two()
    ones = {"0": torch.ones(8, 6), "2": torch.ones(3, 8)}
    regularizers = [gw.AlignGuardLoRA(), gw.AlignGuardLoRA(task_metric=ones)]
    results = [train(copy.deepcopy(model), r) for r in regularizers]
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    threes = {name: 3 * metric for name, metric in ones.items()}
    held = copy.deepcopy(model)
    regularizer = gw.AlignGuardLoRA(task_metric=threes, mode="projected")
    train(held, regularizer)
    with gw.attach(held, adam(held), regularizer):
        thrice = regularizer.terms()["task"]
        regularizer.task_metric = None
        assert thrice == pytest.approx(3 * regularizer.terms()["task"])


def test_named_adapters_say_which_branch_is_which():
    model = gw.add_branch(gw.lora_group(net(), 1, 2, target_modules=["0"]), "safety")
    model = model.double()
    one, other = gw.AlignGuardLoRA(), gw.AlignGuardLoRA(adapters=["safety", "group_0"])
    optimizer = adam(model)
    for regularizer in (one, other):
        with gw.attach(model, optimizer, regularizer) as wires:
            wires.consolidate([data()])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(0.1)
        model[0].lora_B["safety"].weight.fill_(0.0)
    values = []
    for regularizer in (one, other):
        with gw.attach(model, optimizer, regularizer):
            values.append(regularizer.terms())
    assert values[0]["task"] > values[1]["task"] > 0.0  # all of group_0, or its part outside P
    assert values[0]["aligned"] == pytest.approx(values[1]["aligned"])


def test_inactive_adapters_are_left_out():
    model = two()
    model[0].set_adapter(["group_0"])
    model[2].set_adapter(["group_1"])
    regularizer = gw.AlignGuardLoRA(mode="projected")
    with gw.attach(model, adam(model), regularizer):
        assert [[s.adapter for s in group] for group in regularizer._layers.values()] == [
            ["group_0"],
            ["group_1"],
        ]


def test_state_through_a_file_continues_bit_for_bit(tmp_path):
    model = two(torch.float32)
    optimizer = adam(model)
    wires = gw.attach(model, optimizer, gw.AlignGuardLoRA(3.0))
    wires.consolidate([data(dtype=torch.float32)])
    x, y = data(2, dtype=torch.float32)

    def run(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    run(model, optimizer, 3)
    checkpoint.save(tmp_path / "wires.safetensors", wires.state_dict())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    wanted = run(model, optimizer, 5)
    again = two(torch.float32)
    again.load_state_dict(saved[0])
    fresh = adam(again)
    fresh.load_state_dict(saved[1])
    wires = gw.attach(again, fresh, gw.AlignGuardLoRA(3.0))
    wires.load_state_dict(checkpoint.load(tmp_path / "wires.safetensors"))
    assert run(again, fresh, 5) == wanted


def test_bfloat16_factors_are_computed_in_float32():
    model = two(torch.bfloat16)
    regularizer = gw.AlignGuardLoRA(1.0)
    optimizer = adam(model)
    x, y = data(dtype=torch.bfloat16)
    with gw.attach(model, optimizer, regularizer) as wires:
        wires.consolidate([(x, y)])
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x).float(), y).backward()
            optimizer.step()
        assert wires.penalty().dtype == torch.float32
        assert float(wires.penalty()) > 0.0
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in model.parameters())


def test_fit_is_consolidate_before_anything_is_attached():
    model = two()
    one, other = gw.AlignGuardLoRA(), gw.AlignGuardLoRA()
    one.fit(model, [data()])
    wires = gw.attach(model, adam(model), other)
    wires.consolidate([data()])
    for held in ("basis_", "values_"):
        for name, value in getattr(one, held).items():
            assert torch.equal(value, getattr(other, held)[name])
    with pytest.raises(AttachError, match="is attached"):
        other.fit(model, [data()])


@pytest.mark.parametrize("how", ["wrapped", "injected"])
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_add_branch(how):
    torch.manual_seed(0)
    plain = net()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    start = copy.deepcopy(plain)
    if how == "wrapped":
        model = peft.get_peft_model(plain, config)
    else:
        model = peft.inject_adapter_in_model(config, plain)
    plain[2].requires_grad_(True)  # a new head
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model.double()(x).detach()
    random = torch.get_rng_state()
    model = gw.add_branch(model, generator=torch.Generator().manual_seed(3)).double()
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for site in sites(model, ["aligned"]):
            site.B.zero_()  # init_lora_weights=False draws it, for tests
    torch.testing.assert_close(model(x), before)
    assert [s.adapter for s in sites(model)] == ["default", "aligned"]
    assert plain[2].weight.requires_grad
    trained = [p for s in sites(model) for p in (s.A, s.B)]
    assert all(p.requires_grad for p in trained)
    with torch.no_grad():
        for p in trained:
            p.fill_(0.2)
        for site in sites(model):
            start[0].weight += site.update()
    torch.testing.assert_close(model(x), start(x))  # both are active


def test_what_add_branch_refuses():
    with pytest.raises(SelectionError, match="no adapter to put a branch beside"):
        gw.add_branch(net())
    with pytest.raises(UsageError, match="name one by like"):
        gw.add_branch(two())
    with pytest.raises(SelectionError, match="no adapter 'other'"):
        gw.add_branch(two(), like="other")
    with pytest.raises(UsageError, match="'group_1' already"):
        gw.add_branch(two(), "group_1", like="group_0")


@pytest.mark.parametrize(("options", "said"), [
    ({"mode": "three"}, "mode='three'"), ({"reduce": "max"}, "reduce='max'"),
    ({"large": "gradient"}, "large='gradient'"), ({"normalise": "mean"}, "normalise='mean'"),
    ({"aligned": -1.0}, r"aligned=-1\.0"), ({"overlap": 1.5}, r"overlap=1\.5"),
    ({"energy": -0.1}, r"energy=-0\.1"), ({"strength": float("nan")}, "strength is nan"),
    ({"task_metric": {"0": torch.ones(8, 6)}}, "task_metric needs a tensor"),
])  # fmt: skip
def test_values_that_make_no_sense(options, said):
    model = two()
    with pytest.raises(UsageError, match=said):
        gw.attach(model, adam(model), gw.AlignGuardLoRA(**options))


def test_models_that_do_not_fit():
    model = net()
    with pytest.raises(SelectionError, match="no LoRA layers"):
        gw.attach(model, adam(model), gw.AlignGuardLoRA())
    one = two(n=1)
    with pytest.raises(UsageError, match="needs two adapters on '0', which has group_0"):
        gw.attach(one, adam(one), gw.AlignGuardLoRA())
    with gw.attach(one, adam(one), gw.AlignGuardLoRA(mode="projected")) as wires:
        with pytest.raises(UsageError, match="alignment data"):
            wires.consolidate()
        state = {"basis": {"9": torch.zeros(4, 1)}, "values": {}, "trace": {}}
        with pytest.raises(CheckpointError, match="no such layer"):
            wires.regularizers[0].load_state_dict(state)
        x, y = data()
        with pytest.raises(NonFiniteError, match="nothing was changed"):
            wires.consolidate([(x * float("inf"), y)])
        assert wires.regularizers[0].basis_ == {}
