"""PEGO: the sheet's exact checks; half precision, size and speed."""

from __future__ import annotations

import importlib.util
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import UsageError
from guywire.methods.adapters import pego as pego_module
from guywire.methods.adapters._lora import sites

_spec = importlib.util.spec_from_file_location(
    "pego_by_hand", Path(__file__).with_name("pego_by_hand.py")
)
hand = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hand)
normal = hand.normal
group = hand.group
dense_preserve = hand.dense_preserve
dense_diversify = hand.dense_diversify
gradients = hand.gradients
tower = hand.tower
stirred = hand.stirred
by_layer = hand.by_layer
by_hand = hand.by_hand
factors = hand.factors

F64 = torch.float64
BOTH = pytest.mark.parametrize("norm", ["l1", "fro2"])
SIDES = pytest.mark.parametrize("side", ["input", "output"])


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
