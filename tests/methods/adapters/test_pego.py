"""PEGO: the sheet's exact checks, the step-side gradient, and training for real."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import SelectionError, UsageError
from guywire.methods.adapters import pego as pego_module
from guywire.methods.adapters._lora import sites

F64 = torch.float64
BOTH = pytest.mark.parametrize("norm", ["l1", "fro2"])
SIDES = pytest.mark.parametrize("side", ["input", "output"])


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def group(n=3, r=4, out=32, wide=32, seed=0):
    As = [normal(r, wide, seed=10 * seed + 2 * i + 1) for i in range(n)]
    Bs = [normal(out, r, seed=10 * seed + 2 * i + 2) for i in range(n)]
    return As, Bs


def entries(matrix, norm):
    return matrix.abs().sum() if norm == "l1" else matrix.square().sum()


def dense_preserve(base, As, Bs, norm="l1", side="input"):
    updates = [b @ a for a, b in zip(As, Bs, strict=True)]
    return sum(entries(base @ d.T if side == "input" else base.T @ d, norm) for d in updates)


def dense_diversify(As, Bs, norm="l1", side="input"):
    updates = [b @ a for a, b in zip(As, Bs, strict=True)]
    total = torch.zeros((), dtype=As[0].dtype)
    for i in range(len(updates)):
        for j in range(i + 1, len(updates)):
            one, two = updates[i], updates[j]
            total = total + entries(one @ two.T if side == "input" else one.T @ two, norm)
    return total


def gradients(function, As, Bs):
    leaves = [t.clone().requires_grad_() for t in (*As, *Bs)]
    value = function(leaves[: len(As)], leaves[len(As) :])
    return value.detach(), torch.autograd.grad(value, leaves)


# The numbered checks of the sheet, but for 1 and 8 on what a group is (test_groups.py).


def test_check_1_at_the_start_the_penalty_and_its_gradient_are_zero():
    model = gw.lora_group(tower(), 3, 2, target_modules=["q", "v"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with gw.attach(model, optimizer, gw.PEGO(10.0)) as wires:
        assert float(wires.penalty()) == 0.0
        optimizer.step()
        for site in sites(model):
            assert not site.A.grad.any()
            assert not site.B.grad.any()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@BOTH
@SIDES
@pytest.mark.parametrize("out", [32, 20])
def test_check_2_the_factored_form_is_the_dense_one(norm, side, out):
    base = normal(out, 32)
    As, Bs = group(out=out)
    pairs = [
        (
            lambda a, b: gw.preserve_loss(base, a, b, norm=norm, side=side),
            lambda a, b: dense_preserve(base, a, b, norm, side),
        ),
        (
            lambda a, b: gw.diversify_loss(a, b, norm=norm, side=side),
            lambda a, b: dense_diversify(a, b, norm, side),
        ),
    ]
    for factored, dense in pairs:
        value, found = gradients(factored, As, Bs)
        wanted_value, wanted = gradients(dense, As, Bs)
        torch.testing.assert_close(value, wanted_value, rtol=1e-10, atol=0)
        torch.testing.assert_close(factored(As, Bs), wanted_value, rtol=1e-10, atol=0)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_check_2_in_pieces_of_rows_and_with_other_ranks(monkeypatch):
    base = normal(23, 17)
    As = [normal(r, 17, seed=r) for r in (1, 3, 4)]
    Bs = [normal(23, r, seed=r + 9) for r in (1, 3, 4)]

    def both(a, b):
        return gw.preserve_loss(base, a, b) + gw.diversify_loss(a, b)

    value, wanted = gradients(both, As, Bs)
    monkeypatch.setattr(pego_module, "_ROWS", 5)
    again, found = gradients(both, As, Bs)
    torch.testing.assert_close(again, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(both(As, Bs), value, rtol=1e-12, atol=0)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_check_3_identity_zero_and_zero_rows():
    As, Bs = group()
    sums = sum((b @ a).abs().sum() for a, b in zip(As, Bs, strict=True))
    torch.testing.assert_close(gw.preserve_loss(torch.eye(32, dtype=F64), As, Bs), sums)
    zero = torch.zeros(32, 32, dtype=F64)
    value, grads = gradients(lambda a, b: gw.preserve_loss(zero, a, b), As, Bs)
    assert float(value) == 0.0
    assert not any(g.any() for g in grads)
    rows = zero.clone()
    rows[[3, 8]] = normal(2, 32, seed=5)
    wanted = sum((rows[[3, 8]] @ (b @ a).T).abs().sum() for a, b in zip(As, Bs, strict=True))
    torch.testing.assert_close(gw.preserve_loss(rows, As, Bs), wanted)


@BOTH
def test_check_4_the_null_space_and_disjoint_supports(norm):
    u, s, vt = torch.linalg.svd(normal(32, 32))
    base = (u[:, :28] * s[:28]) @ vt[:28]
    As, Bs = group()
    inside = [normal(4, 4, seed=i + 50) @ vt[28:] for i in range(3)]
    assert float(gw.preserve_loss(base, inside, Bs, norm=norm)) < 1e-8
    assert min(float((b @ a).norm()) for a, b in zip(inside, Bs, strict=True)) > 1.0
    assert float(gw.preserve_loss(base, As, Bs, norm=norm)) > 1.0
    apart = [torch.zeros_like(a) for a in As]
    for i, a in enumerate(apart):
        a[:, 8 * i : 8 * i + 8] = As[i][:, :8]
    assert float(gw.diversify_loss(apart, Bs, norm=norm)) == 0.0
    # On the output side it is the rows of B that must not meet.
    rows = [torch.zeros_like(b) for b in Bs]
    for i, b in enumerate(rows):
        b[8 * i : 8 * i + 8] = Bs[i][:8]
    assert float(gw.diversify_loss(As, rows, norm=norm, side="output")) == 0.0
    assert float(gw.diversify_loss(As, rows, norm=norm)) > 1.0


@settings(max_examples=25, deadline=None)
@given(
    c=st.floats(-4, 4).filter(lambda c: abs(c) > 1e-3),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    power=st.sampled_from([("l1", 1), ("fro2", 2)]),
    side=st.sampled_from(["input", "output"]),
)
def test_check_5_scale_sign_and_order(c, signs, order, power, side):
    norm, degree = power
    base = normal(9, 7)
    As, Bs = group(r=2, out=9, wide=7)
    kind = {"norm": norm, "side": side}
    one, two = gw.preserve_loss(base, As, Bs, **kind), gw.diversify_loss(As, Bs, **kind)
    scaled = [c * b for b in Bs]
    torch.testing.assert_close(gw.preserve_loss(base, As, scaled, **kind), abs(c) ** degree * one)
    torch.testing.assert_close(gw.diversify_loss(As, scaled, **kind), abs(c) ** (2 * degree) * two)
    turned = [s * b for s, b in zip(signs, Bs, strict=True)]
    mixed_a, mixed_b = [As[i] for i in order], [turned[i] for i in order]
    torch.testing.assert_close(gw.preserve_loss(base, mixed_a, mixed_b, **kind), one)
    torch.testing.assert_close(gw.diversify_loss(mixed_a, mixed_b, **kind), two)


def test_check_6_rotation_changes_absolute_values_but_not_squares():
    base = normal(32, 32)
    turn = torch.linalg.qr(normal(32, 32, seed=99)).Q
    As, Bs = group()
    squares = [gw.preserve_loss(w, As, Bs, norm="fro2") for w in (base, turn @ base)]
    torch.testing.assert_close(*squares, rtol=1e-12, atol=0)
    absolute = [float(gw.preserve_loss(w, As, Bs)) for w in (base, turn @ base)]
    assert abs(absolute[0] / absolute[1] - 1) > 1e-3


def test_check_7_the_gradient_of_the_update_by_autograd_and_finite_differences():
    base = normal(16, 12)
    As, Bs = group(n=1, out=16, wide=12)
    update = Bs[0] @ As[0]
    # With A = I the factor B is the update itself.
    _, (_, found) = gradients(
        lambda a, b: gw.preserve_loss(base, a, b), [torch.eye(12, dtype=F64)], [update]
    )
    torch.testing.assert_close(found, torch.sign(base @ update.T).T @ base)
    leaf = update.clone().requires_grad_()
    (base @ leaf.T).abs().sum().backward()
    torch.testing.assert_close(found, leaf.grad)

    def both(a, b):
        return gw.preserve_loss(base, a, b) + gw.diversify_loss([a, As[0] + 1], [b, Bs[0] - 1])

    leaves = As[0].clone().requires_grad_(), Bs[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(both, leaves, eps=1e-7, atol=1e-5)


class Tower(nn.Module):
    """Two blocks with queries and values of their own, small and in float64."""

    def __init__(self, width=12, classes=3):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, width)})
            for _ in range(2)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["v"](torch.tanh(block["q"](x)))
        return self.head(x)


def tower(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Tower().double()


def stirred(n=3, r=2, scale=0.3, **more):
    model = gw.lora_group(tower(), n, r, target_modules=["q", "v"], **more).double()
    with torch.no_grad():
        for i, site in enumerate(sites(model)):
            site.B.copy_(scale * normal(*site.B.shape, seed=i + 30))
    return model


def by_layer(model):
    layers = {}
    for site in sites(model):
        layers.setdefault(site.name, []).append(site)
    return list(layers.values())


def by_hand(model, norm="l1", side="input", preserve=1.0, diversify=1.0):
    total = 0.0
    for found in by_layer(model):
        base, As = found[0].base, [s.A for s in found]
        Bs = [s.scaling * s.B for s in found]
        total = total + preserve * dense_preserve(base, As, Bs, norm, side)
        total = total + diversify * dense_diversify(As, Bs, norm, side)
    return total


def factors(model):
    return [p for s in sites(model) for p in (s.A, s.B)]


def test_check_9_descent_on_the_penalty_alone_shrinks_what_it_measures():
    model = stirred(scale=0.05)
    optimizer = torch.optim.SGD(factors(model), lr=1e-4)
    values = []
    with gw.attach(model, optimizer, gw.PEGO(1.0, diversify=0.0)):
        for _ in range(60):
            values.append(float(by_hand(model, diversify=0.0).detach()))
            optimizer.zero_grad()
            optimizer.step()
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.95 * values[0]


def energy_above(model):
    """Share of the updates' energy in the directions to which W0 is most sensitive."""
    shares = []
    for found in by_layer(model):
        update = sum(s.update() for s in found).detach()
        directions = torch.linalg.svd(found[0].base).Vh
        inside = (update @ directions[: len(directions) // 2].T).square().sum()
        shares.append(float(inside / update.square().sum()))
    return np.mean(shares)


def test_check_9_what_is_learnt_under_the_penalty_avoids_the_large_singular_directions():
    x, y = normal(64, 12, seed=3), torch.arange(64) % 3
    shares, losses = {}, {}
    for strength in (0.0, 1e-2):
        model = gw.lora_group(tower(), 2, 2, target_modules=["q", "v"]).double()
        # A spread of singular values, as trained weights have.
        with torch.no_grad():
            for found in by_layer(model):
                u, _, vt = torch.linalg.svd(found[0].base)
                weight = found[0].layer.get_base_layer().weight
                weight.copy_((u * torch.logspace(0.5, -1.5, 12, dtype=F64)) @ vt)
        optimizer = torch.optim.Adam(factors(model), lr=0.01)
        with gw.attach(model, optimizer, gw.PEGO(strength)):
            for _ in range(150):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
        shares[strength], losses[strength] = energy_above(model), float(loss.detach())
    assert shares[1e-2] < 0.8 * shares[0.0]
    assert losses[1e-2] < 1.05  # it has learnt something: log 3 is 1.10


# On the step.


@BOTH
@SIDES
def test_the_step_gets_the_gradient_of_the_whole_penalty(norm, side):
    model = stirred()
    more = {"norm": norm, "side": side, "preserve": 0.5, "diversify": 2.0}
    wanted = torch.autograd.grad(0.1 * by_hand(model, **more), factors(model))
    optimizer = torch.optim.SGD(factors(model), lr=0.0)
    loss_grads = [torch.full_like(p, 0.25) for p in factors(model)]
    for p, g in zip(factors(model), loss_grads, strict=True):
        p.grad = g.clone()
    with gw.attach(model, optimizer, gw.PEGO(0.1, **more)) as wires:
        optimizer.step()
        torch.testing.assert_close(wires.penalty(), 0.1 * by_hand(model, **more).detach())
    for p, g, w in zip(factors(model), loss_grads, wanted, strict=True):
        torch.testing.assert_close(p.grad, g + w, rtol=1e-9, atol=1e-9)


def test_the_scaling_of_the_adapters_counts():
    model = peft.get_peft_model(
        tower(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q"], init_lora_weights=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gw.attach(model, optimizer, gw.PEGO(1.0)) as wires:
        wanted = sum((s.base @ (3.0 * s.B @ s.A).T).abs().sum() for s in sites(model)).detach()
        torch.testing.assert_close(wires.penalty(), wanted, rtol=1e-5, atol=0, check_dtype=False)


def test_amp_scale_schedule_and_skipped_steps():
    model = stirred()
    wanted = torch.autograd.grad(by_hand(model), factors(model))
    pego = gw.PEGO(lambda step: 0.1 * step)
    optimizer = torch.optim.SGD(factors(model), lr=0.0)
    pego.setup(model)

    def pulled(**step):
        for p in factors(model):
            p.grad = None
        with torch.no_grad():
            pego.before_step(gw.core.regularizer.Step(optimizer, **step))
        return [p.grad for p in factors(model)]

    for found, w in zip(pulled(number=2, scale=8.0), wanted, strict=True):
        torch.testing.assert_close(found, 8.0 * 0.2 * w)
    assert all(g is None for g in pulled(number=2, skipped=True))
    assert all(g is None for g in pulled(number=0))


def test_only_what_the_optimiser_owns_and_may_move_is_pulled():
    model = stirred(n=2)
    first, second = sites(model)[:2]
    second.A.requires_grad_(False)
    optimizer = torch.optim.SGD([first.A, second.A, second.B], lr=0.0)
    with gw.attach(model, optimizer, gw.PEGO(1.0)):
        optimizer.step()
    assert first.A.grad.any()
    assert second.B.grad.any()
    pulled = {id(p) for p in model.parameters() if p.grad is not None}
    assert pulled == {id(first.A), id(second.B)}


def test_the_group_can_be_named():
    model = stirred(n=3)
    optimizer = torch.optim.SGD(factors(model), lr=0.0)
    with gw.attach(model, optimizer, gw.PEGO(1.0, adapters=["group_0", "group_2"])) as wires:
        optimizer.step()
        wanted = 0.0
        for found in by_layer(model):
            some = [found[0], found[2]]
            As, Bs = [s.A for s in some], [s.B for s in some]
            wanted = wanted + dense_preserve(found[0].base, As, Bs) + dense_diversify(As, Bs)
        torch.testing.assert_close(wires.penalty(), wanted.detach())
    assert all(s.A.grad is None for s in sites(model, ["group_1"]))


@SIDES
def test_normalise_makes_a_sum_as_if_the_width_were_768(side):
    layer = nn.Linear(24, 48, bias=False).double()
    model = gw.lora_group(nn.Sequential(layer), 2, 2, target_modules=["0"]).double()
    with torch.no_grad():
        for i, site in enumerate(sites(model)):
            site.B.copy_(normal(*site.B.shape, seed=i))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    values = {}
    for normalise in (False, True):
        regularizer = gw.PEGO(1.0, side=side, normalise=normalise)
        with gw.attach(model, optimizer, regularizer) as wires:
            values[normalise] = float(wires.penalty())
    wide = 48 if side == "input" else 24
    assert values[True] == pytest.approx(values[False] * (768 / wide) ** 2)


def train(model, regularizers, steps=8, accumulate=1, seed=0):
    x, y = normal(24, 12, seed=seed), torch.arange(24) % 3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with gw.attach(model, optimizer, regularizers):
        for _ in range(steps):
            optimizer.zero_grad()
            for part, labels in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
                loss = nn.functional.cross_entropy(model(part), labels)
                (loss / accumulate).backward()
            optimizer.step()
    return model


def test_a_plain_loop_with_accumulation_is_the_loss_with_the_dense_penalty():
    held = train(stirred(), gw.PEGO(1e-2), accumulate=4)
    wanted = stirred()
    x, y = normal(24, 12), torch.arange(24) % 3
    optimizer = torch.optim.Adam([p for p in wanted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(wanted(x), y) + 1e-2 * by_hand(wanted)).backward()
        optimizer.step()
    for a, b in zip(factors(held), factors(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    free = train(stirred(), gw.PEGO(0.0))
    assert max(float((a - b).detach().abs().max()) for a, b in zip(
        factors(held), factors(free), strict=True)) > 1e-3  # fmt: skip


@pytest.mark.parametrize("wrap", [False, True])
def test_check_1_strength_zero_is_a_plain_group_bit_for_bit(wrap):
    held = train(stirred(wrap=wrap), gw.PEGO(0.0))
    plain = train(stirred(wrap=wrap), [])
    for a, b in zip(factors(held), factors(plain), strict=True):
        assert torch.equal(a, b)


def test_training_resumes_bit_for_bit_from_a_file(tmp_path):
    model = gw.lora_group(tower(), 2, 2, target_modules=["q", "v"]).double()
    x, y = normal(24, 12), torch.arange(24) % 3

    def go(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    schedule = lambda step: 1e-3 * step  # noqa: E731
    optimizer = torch.optim.Adam(factors(model), lr=0.01)
    wires = gw.attach(model, optimizer, gw.PEGO(schedule))
    go(model, optimizer, 4)
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "wires": wires.state_dict()
    }  # fmt: skip
    checkpoint.save(tmp_path / "state.safetensors", state)
    go(model, optimizer, 4)
    again = gw.lora_group(tower(1), 2, 2, target_modules=["q", "v"]).double()
    state = checkpoint.load(tmp_path / "state.safetensors")
    again.load_state_dict(state["model"])
    other = torch.optim.Adam(factors(again), lr=0.01)
    other.load_state_dict(state["optimizer"])
    more = gw.attach(again, other, gw.PEGO(schedule))
    more.load_state_dict(state["wires"])
    go(again, other, 4)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# Half precision, size, speed.


@BOTH
def test_half_precision_is_summed_in_single(norm):
    base = normal(600, 300, dtype=torch.float32)
    As, Bs = ([t.float() for t in side] for side in group(n=2, out=600, wide=300))
    half = [t.half() for t in (base, *As, *Bs)]
    wanted = dense_preserve(half[0].float(), [t.float() for t in half[1:3]],
                            [t.float() for t in half[3:]], norm)  # fmt: skip
    value, grads = gradients(
        lambda a, b: gw.preserve_loss(half[0], a, b, norm=norm), half[1:3], half[3:]
    )
    assert value.dtype == torch.float32
    assert float(value) > 65504  # more than float16 can hold
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=0)
    assert all(g.dtype == torch.float16 for g in grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gw.preserve_loss(base, As, Bs, norm=norm)
    torch.testing.assert_close(inside, gw.preserve_loss(base, As, Bs, norm=norm))


def test_no_tensor_is_ever_larger_than_some_rows():
    out, wide, r = 2048, 1024, 2
    base = torch.zeros(out, wide, dtype=torch.bfloat16)
    As, Bs = [torch.ones(r, wide)], [torch.ones(out, r)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for t in made if isinstance(made, list | tuple) else [made]:
                # Views of the base are no memory of ours.
                if isinstance(t, torch.Tensor) and t.untyped_storage().size() != 2 * out * wide:
                    largest = max(largest, t.untyped_storage().size())
            return made

    for a in (*As, *Bs):
        a.requires_grad_()
    with Watch():
        for side in ("input", "output"):
            (
                gw.preserve_loss(base, As, Bs, side=side) + gw.diversify_loss(As * 2, Bs * 2)
            ).backward()
    assert largest == pego_module._ROWS * out * 4  # some rows of the product, in float32


def test_the_factored_form_is_faster_than_the_dense_one():
    base = normal(768, 768, dtype=torch.float32)
    As, Bs = ([t.float() for t in side] for side in group(n=2, out=768, wide=768))

    def factored(a, b):
        return gw.preserve_loss(base, a, b) + gw.diversify_loss(a, b)

    def dense(a, b):
        return dense_preserve(base, a, b) + dense_diversify(a, b)

    import time

    best = {factored: 1e9, dense: 1e9}
    for _ in range(5):  # interleaved, and the best of each: the machine is shared
        for function in best:
            start = time.perf_counter()
            gradients(function, As, Bs)
            best[function] = min(best[function], time.perf_counter() - start)
    assert best[dense] > 3 * best[factored], best


# What is refused.


def test_what_does_not_fit_is_refused():
    As, Bs = group(n=2)
    base = normal(32, 32)
    with pytest.raises(UsageError, match="2 factors A and 1 factors B"):
        gw.preserve_loss(base, As, Bs[:1])
    with pytest.raises(UsageError, match="no update of shape"):
        gw.preserve_loss(normal(30, 32), As, Bs)
    with pytest.raises(UsageError, match="no update of shape"):
        gw.diversify_loss(As, [Bs[0], Bs[1].T])
    with pytest.raises(UsageError, match="neither 'l1' nor 'fro2'"):
        gw.diversify_loss(As, Bs, norm="l2")
    with pytest.raises(UsageError, match="neither 'input' nor 'output'"):
        gw.preserve_loss(base, As, Bs, side="rows")


@pytest.mark.parametrize(
    ("keywords", "word"),
    [({"norm": "l2"}, "norm"), ({"side": "x"}, "side"), ({"strength": -1.0}, "strength"),
     ({"preserve": -1.0}, "preserve"), ({"diversify": float("nan")}, "diversify")],
)  # fmt: skip
def test_values_without_sense_are_refused_at_attach(keywords, word):
    model = stirred()
    optimizer = torch.optim.SGD(factors(model), lr=0.0)
    with pytest.raises(UsageError, match=word):
        gw.attach(model, optimizer, gw.PEGO(**keywords))


def test_a_model_without_such_adapters_and_one_with_packed_weights_are_refused():
    plain = tower()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.0)
    with pytest.raises(SelectionError, match="no LoRA layers"):
        gw.attach(plain, optimizer, gw.PEGO())
    model = stirred()
    optimizer = torch.optim.SGD(factors(model), lr=0.0)
    with pytest.raises(SelectionError, match="no adapter 'other'"):
        gw.attach(model, optimizer, gw.PEGO(adapters=["other"]))
    layer = sites(model)[0].layer.get_base_layer()
    layer.weight = nn.Parameter(torch.zeros(72, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SelectionError, match="without quantisation"):
        gw.attach(model, optimizer, gw.PEGO())


def test_before_attach_there_is_no_penalty_and_a_copy_keeps_the_options():
    pego = gw.PEGO(0.5, side="output")
    assert pego.penalty() is None
    assert repr(copy.copy(pego)) == "PEGO(strength=0.5, side='output')"
