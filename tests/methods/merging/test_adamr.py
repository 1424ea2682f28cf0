"""AdamR against the sheet's recurrence written out, plain Adam, and the Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import AttachError, CheckpointError, UsageError
from guywire.methods.merging import global_rms

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def net(seed=0, dtype=torch.float64):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (16,), generator=generator)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x, y = data(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def by_hand(model, anchors, lr, strength, kind, steps, held):
    """The sheet's algorithm, with whole copies of everything."""
    params = dict(model.named_parameters())
    m = {n: torch.zeros_like(p) for n, p in params.items()}
    v = {n: torch.zeros_like(p) for n, p in params.items()}
    for t in range(1, steps + 1):
        x, y = data(t - 1)
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(params.values()))
        with torch.no_grad():
            for (n, _), g in zip(params.items(), grads, strict=True):
                m[n] = BETA1 * m[n] + (1 - BETA1) * g
                v[n] = BETA2 * v[n] + (1 - BETA2) * g**2
            hats = {n: v[n] / (1 - BETA2**t) for n in v}
            s = float(torch.cat([h.flatten() for h in hats.values()]).mean().sqrt()) or 1.0
            for n, p in params.items():
                if n in held:
                    d = p - anchors[n]
                    rate = lr * strength / s
                    p -= rate * d if kind == "l2" else d.clamp(-rate, rate)
                p -= lr * (m[n] / (1 - BETA1**t)) / (hats[n].sqrt() + EPS)


@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_equals_the_recurrence_written_out(kind, options):
    anchors = {n: p.detach() for n, p in net(1).named_parameters()}
    hand, held = net(), net()
    names = {n for n in anchors if not n.startswith("2.")}
    optimizer = torch.optim.Adam(held.parameters(), lr=0.01, **options)
    with gw.attach(held, optimizer, gw.AdamR(0.05, kind=kind, anchor=anchors, select="!2.*")):
        train(held, optimizer, 12)
    by_hand(hand, anchors, 0.01, 0.05, kind, 12, names)
    for (n, a), (_, b) in zip(hand.named_parameters(), held.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")
    free = net()
    train(free, torch.optim.Adam(free.parameters(), lr=0.01), 12)
    assert float((free[0].weight - held[0].weight).detach().abs().max()) > 1e-3


def test_check_6_strength_zero_equals_adam_over_50_steps():
    plain, held = net(), net()
    train(plain, torch.optim.Adam(plain.parameters(), lr=0.01), 50)
    optimizer = torch.optim.Adam(held.parameters(), lr=0.01)
    with gw.attach(held, optimizer, gw.AdamR(0.0)):
        train(held, optimizer, 50)
    for a, b in zip(plain.parameters(), held.parameters(), strict=True):
        assert torch.equal(a, b)


def test_check_6_first_step_by_hand():
    # Constant gradient g: s = |g|, so the decay is lr * strength * (theta - anchor) / |g|.
    g, lr, strength = -3.0, 0.1, 0.5
    p = nn.ParameterDict({"w": nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))})
    anchor = {"w": torch.tensor([0.5, 0.5], dtype=torch.float64)}
    optimizer = torch.optim.Adam(p.parameters(), lr=lr, eps=EPS)
    regularizer = gw.AdamR(strength, anchor=anchor)
    with gw.attach(p, optimizer, regularizer):
        p["w"].grad = torch.full_like(p["w"], g)
        optimizer.step()
    start = torch.tensor([2.0, -1.0], dtype=torch.float64)
    wanted = start - lr * strength * (start - anchor["w"]) / abs(g) - lr * g / (abs(g) + EPS)
    torch.testing.assert_close(p["w"].detach(), wanted, rtol=1e-12, atol=0)
    assert regularizer.rms_ == pytest.approx(3.0, rel=1e-12)


def test_check_6_zero_gradients_shrink_the_distance_by_one_minus_lr_strength():
    # s is 1 where all moments are zero.
    p = nn.ParameterDict({"w": nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))})
    anchor = {"w": torch.tensor([0.5, 0.25], dtype=torch.float64)}
    optimizer = torch.optim.Adam(p.parameters(), lr=0.1)
    distance = p["w"].detach() - anchor["w"]
    with gw.attach(p, optimizer, gw.AdamR(0.5, anchor=anchor)):
        for step in range(1, 6):
            p["w"].grad = torch.zeros_like(p["w"])
            optimizer.step()
            torch.testing.assert_close(
                p["w"].detach() - anchor["w"], distance * 0.95**step, rtol=1e-13, atol=0
            )


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_check_6_from_the_anchor_the_first_step_is_adams(kind):
    plain, held = net(), net()
    train(plain, torch.optim.Adam(plain.parameters(), lr=0.01), 1)
    optimizer = torch.optim.Adam(held.parameters(), lr=0.01)
    with gw.attach(held, optimizer, gw.AdamR(0.5, kind=kind)):
        train(held, optimizer, 1)
        for a, b in zip(plain.parameters(), held.parameters(), strict=True):
            assert torch.equal(a, b)
        train(held, optimizer, 1, 1)
    train(plain, torch.optim.Adam(plain.parameters(), lr=0.01), 1, 1)
    assert not torch.equal(plain[0].weight, held[0].weight)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"weight_decay": 0.3}),
        (torch.optim.AdamW, {"weight_decay": 0.3}),
        (torch.optim.AdamW, {"weight_decay": 0.3, "fused": True}),
        (torch.optim.NAdam, {}),
    ],
)
def test_the_divisor_is_that_of_the_step_that_is_about_to_happen(kind, options):
    model = net()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    for step in range(3):
        x, y = data(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before = global_rms(optimizer)
        optimizer.step()
        hats = [
            optimizer.state[p]["exp_avg_sq"] / (1 - BETA2 ** float(optimizer.state[p]["step"]))
            for p in model.parameters()
        ]
        after = torch.cat([h.flatten() for h in hats]).mean().sqrt()
        assert before == pytest.approx(float(after), rel=1e-12)


def test_the_divisor_takes_an_amp_scale_off_and_counts_only_what_has_a_gradient():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = data(0)
    nn.functional.cross_entropy(model(x), y).backward()
    plain = global_rms(optimizer)
    for p in model.parameters():
        p.grad *= 1024.0
    assert global_rms(optimizer, 1024.0) == pytest.approx(plain, rel=1e-12)
    squares = model[2].weight.grad.square().mean() / 1024.0**2
    for p in (model[0].weight, model[0].bias, model[2].bias):
        p.grad = None
    assert global_rms(optimizer, 1024.0) == pytest.approx(float(squares.sqrt()), rel=1e-12)


def test_l1_takes_steps_of_one_size_and_stops_at_the_anchor():
    p = nn.ParameterDict({"w": nn.Parameter(torch.tensor([2.0, -1.0, 0.46], dtype=torch.float64))})
    anchor = {"w": torch.full((3,), 0.5, dtype=torch.float64)}
    optimizer = torch.optim.Adam(p.parameters(), lr=0.1)
    with gw.attach(p, optimizer, gw.AdamR(1.0, kind="l1", anchor=anchor)):
        for step in range(1, 21):
            p["w"].grad = torch.zeros_like(p["w"])
            optimizer.step()
            left = (torch.tensor([1.5, 1.5, 0.04], dtype=torch.float64) - 0.1 * step).clamp(min=0)
            torch.testing.assert_close((p["w"].detach() - 0.5).abs(), left, rtol=0, atol=1e-12)
    assert torch.equal(p["w"].detach(), anchor["w"])  # and no swinging around it


def test_the_penalty_is_that_of_the_last_decay():
    model = net()
    anchors = {n: p.detach() for n, p in net(1).named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = gw.AdamR(0.4, anchor=anchors)
    with gw.attach(model, optimizer, regularizer) as wires:
        assert regularizer.penalty() is None
        train(model, optimizer, 3)
        squares = sum(
            float((p.detach() - anchors[n]).square().sum()) for n, p in model.named_parameters()
        )
        wanted = 0.4 / regularizer.rms_ * squares / 2
        assert float(wires.penalty()) == pytest.approx(wanted, rel=1e-12)


def test_a_schedule_sets_the_strength_at_each_step():
    asked = []

    def schedule(number):
        asked.append(number)
        return 0.0

    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with gw.attach(model, optimizer, gw.AdamR(schedule)):
        train(model, optimizer, 3)
    assert asked[-3:] == [0, 1, 2]


def test_checkpoint_and_resume_bit_for_bit(tmp_path):
    whole = net()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01)
    wires = gw.attach(whole, optimizer, gw.AdamR(0.1))
    train(whole, optimizer, 5)
    tree = copy.deepcopy(
        {"model": whole.state_dict(), "optimizer": optimizer.state_dict(),
         "wires": wires.state_dict()}
    )  # fmt: skip
    checkpoint.save(tmp_path / "state.safetensors", tree)
    train(whole, optimizer, 5, 5)

    tree = checkpoint.load(tmp_path / "state.safetensors")
    again = net(7)
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.01)
    again.load_state_dict(tree["model"])
    wires = gw.attach(again, optimizer, gw.AdamR(0.1))
    optimizer.load_state_dict(tree["optimizer"])
    wires.load_state_dict(tree["wires"])
    train(again, optimizer, 5, 5)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_anchor_stays_through_tasks_and_a_new_head_is_free():
    body = net()
    regularizer = gw.AdamR(0.1)
    optimizer = torch.optim.Adam(body.parameters(), lr=0.01)
    with gw.attach(body, optimizer, regularizer) as wires:
        train(body, optimizer, 3)
        wires.consolidate(None)
    first = {n: a.clone() for n, a in regularizer.anchors_.items()}
    body.append(nn.Linear(3, 3).double())
    optimizer = torch.optim.Adam(body.parameters(), lr=0.01)
    with gw.attach(body, optimizer, regularizer):
        train(body, optimizer, 3)
    assert regularizer.anchors_.keys() == first.keys()
    assert all(torch.equal(a, first[n]) for n, a in regularizer.anchors_.items())


def test_what_cannot_be_is_refused_with_the_remedy():
    model = net()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(AttachError, match="SGD keeps none under 'exp_avg_sq': use Adam"):
        gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), gw.AdamR())
    with pytest.raises(UsageError, match="neither 'l2' nor 'l1'"):
        gw.attach(model, adam, gw.AdamR(kind="l3"))
    with pytest.raises(UsageError, match=r"names 'nobody'"):
        gw.attach(model, adam, gw.AdamR(anchor={"nobody": torch.zeros(1)}))
    with pytest.raises(UsageError, match=r"'0.weight' has the shape \(2,\)"):
        gw.attach(model, adam, gw.AdamR(anchor={"0.weight": torch.zeros(2)}))
    with pytest.raises(UsageError, match="none of the 2 selected"):
        gw.attach(model, adam, gw.AdamR(select="0.*", anchor={"2.bias": torch.zeros(3)}))
    # Adamax has betas, but another kind of moment.
    adamax = torch.optim.Adamax(model.parameters())
    with (
        pytest.raises(AttachError, match="Adamax keeps none"),
        gw.attach(model, adamax, gw.AdamR()),
    ):
        train(model, adamax, 2)
    with gw.attach(model, adam, gw.AdamR()) as wires:
        state = wires.state_dict()
        state["regularizers"][0]["state"]["anchors"] = {"0.weight": torch.zeros(2, 2)}
        with pytest.raises(CheckpointError, match=r"'0.weight' has the shape"):
            wires.load_state_dict(state)


def test_anchors_in_bfloat16_hold_a_float32_model():
    model = net(dtype=torch.float32)
    regularizer = gw.AdamR(0.1, anchor_dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with gw.attach(model, optimizer, regularizer):
        train(model, optimizer, 3)
    assert {a.dtype for a in regularizer.anchors_.values()} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in model.parameters())
