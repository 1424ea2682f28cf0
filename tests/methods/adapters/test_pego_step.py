"""PEGO on the step: its gradient, what is left alone, a plain loop, resume."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import SelectionError, UsageError
from guywire.methods.adapters._lora import sites

_spec = importlib.util.spec_from_file_location(
    "pego_by_hand", Path(__file__).with_name("pego_by_hand.py")
)
hand = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hand)
normal = hand.normal
dense_preserve = hand.dense_preserve
dense_diversify = hand.dense_diversify
tower = hand.tower
stirred = hand.stirred
by_layer = hand.by_layer
by_hand = hand.by_hand
factors = hand.factors

F64 = torch.float64
BOTH = pytest.mark.parametrize("norm", ["l1", "fro2"])
SIDES = pytest.mark.parametrize("side", ["input", "output"])


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


# What is refused.


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


def test_an_adapter_whose_update_is_no_product_of_its_factors_is_refused():
    config = peft.LoraConfig(r=2, target_modules=["q"], use_dora=True)
    model = peft.get_peft_model(tower(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(SelectionError, match="variant of LoRA"):
        gw.attach(model, optimizer, gw.PEGO())


def test_before_attach_there_is_no_penalty_and_a_copy_keeps_the_options():
    pego = gw.PEGO(0.5, side="output")
    assert pego.penalty() is None
    assert repr(copy.copy(pego)) == "PEGO(strength=0.5, side='output')"
