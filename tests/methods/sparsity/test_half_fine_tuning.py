"""Half fine-tuning in loops: what is frozen, what it costs, rounds, and the sheet's exact checks."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import guywire as gw
from guywire.core.errors import AttachError, CheckpointError, UsageError

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)
tiny = tiny_models.tiny
batch_of, train, copies = tiny_models.batch_of, tiny_models.train, tiny_models.copies
frozen_rows = tiny_models.frozen_rows


ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("llama", lambda p: torch.optim.AdamW(p, **ADAMW, foreach=False)),
        ("llama", lambda p: torch.optim.AdamW(p, **ADAMW, foreach=True)),
        ("llama", lambda p: torch.optim.AdamW(p, **ADAMW, fused=True)),
        ("llama", lambda p: torch.optim.Adam(p, **ADAMW, amsgrad=True)),
        ("llama", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
        ("llama", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True)),
        ("llama", lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1)),
        ("gpt2", lambda p: torch.optim.AdamW(p, **ADAMW, foreach=True)),
        ("gpt2", lambda p: torch.optim.AdamW(p, **ADAMW, fused=True)),
        ("gpt2", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
        ("bert", lambda p: torch.optim.AdamW(p, **ADAMW)),
        ("vit", lambda p: torch.optim.AdamW(p, **ADAMW)),
        ("t5", lambda p: torch.optim.AdamW(p, **ADAMW)),
    ],
    ids=[
        "llama-adamw", "llama-foreach", "llama-fused", "llama-amsgrad", "llama-momentum",
        "llama-momentum-foreach", "llama-adafactor", "gpt2-foreach", "gpt2-fused",
        "gpt2-momentum", "bert", "vit", "t5",
    ],
)  # fmt: skip
def test_check_3_the_frozen_half_stays_bit_for_bit(kind, make):
    model = tiny(kind)
    # The optimiser is made before, and has momentum for all parameters already.
    optimizer = make(model.parameters())
    train(model, optimizer, kind, steps=2)
    hft = gw.HalfFineTuning(seed=3)
    with gw.attach(model, optimizer, hft):
        before = {name: value.clone() for name, value in frozen_rows(model, hft.frozen_)}
        whole = copies(model)
        train(model, optimizer, kind, first=2)
        for name, value in frozen_rows(model, hft.frozen_):
            assert torch.equal(value, before[name]), name
        updated = [n for n in whole if n not in before]
        params = dict(model.named_parameters())
        assert all(not torch.equal(params[n], whole[n]) for n in updated)
        for name in before:
            if name in params:
                assert params[name].grad is None
                assert not params[name].requires_grad
                assert params[name] not in optimizer.state
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_check_3_bytes_of_the_optimisers_state(fused):
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=fused)
    with gw.attach(model, optimizer, gw.HalfFineTuning()):
        train(model, optimizer)
        moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
        held = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
        assert sum(v.numel() * v.element_size() for v in held) == 2 * moving * 4
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert sum(g.numel() for g in grads) == moving
        assert moving < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_check_4_all_is_full_fine_tuning(kind):
    plain, held = tiny(kind), tiny(kind)
    for model, regularizers in ((plain, []), (held, [gw.HalfFineTuning(1.0)])):
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        wires = gw.attach(model, optimizer, regularizers)
        train(model, optimizer, kind)
        wires.consolidate()
        train(model, optimizer, kind)
        wires.detach()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True)
    )


def test_check_4_nothing_stays_as_it_is():
    model = tiny("gpt2")
    for name, p in model.named_parameters():
        p.requires_grad_(".h." in name)  # embeddings and final norm frozen too
    before = copies(model)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    with gw.attach(model, optimizer, gw.HalfFineTuning(0.0)):
        assert not any(p.requires_grad for p in model.parameters())
        for _ in range(2):
            optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # What was frozen before is not unfrozen.
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in before if ".h." in n
    }


@pytest.mark.parametrize("adam", [False, True])
def test_check_5_three_ways_of_freezing_are_one(adam):
    def optimise(params):
        if adam:
            return torch.optim.Adam(params, lr=1e-2)
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    names = set(gw.half(tiny("llama"), seed=2))
    models, norms = [tiny("llama") for _ in range(4)], [[] for _ in range(4)]
    masked, excluded, flagged, ours = models
    for name, p in masked.named_parameters():
        if name not in names:
            p.register_hook(torch.zeros_like)
    chosen = [p for n, p in excluded.named_parameters() if n in names]
    for name, p in flagged.named_parameters():
        p.requires_grad_(name in names)
    optimizers = [optimise(m.parameters()) for m in models]
    optimizers[1] = optimise(chosen)
    for name, p in excluded.named_parameters():
        p.requires_grad_(name in names)
    with gw.attach(ours, optimizers[3], gw.HalfFineTuning(seed=2)):
        for model, optimizer, norm in zip(models, optimizers, norms, strict=True):
            train(model, optimizer, clip=0.1, norms=norm)
    for other, norm in zip(models[1:], norms[1:], strict=True):
        torch.testing.assert_close(norm, norms[0], rtol=1e-6, atol=0)
        for a, b in zip(masked.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_check_5_clipping_counts_updated_blocks_only():
    model = tiny("gpt2")
    hft = gw.HalfFineTuning(seed=1)
    reference = tiny("gpt2")
    reference(**batch_of("gpt2", 0)).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gw.attach(model, optimizer, hft):
        grads = {n: p.grad.clone() for n, p in reference.named_parameters()}
        for name in hft.frozen_:
            from guywire.methods.sparsity._pieces import parse

            whole, index = parse(name)
            grads[whole][... if index is None else index] = 0
        wanted = sum(g.square().sum() for g in grads.values()).sqrt()
        norms = []
        train(model, optimizer, "gpt2", steps=1, norms=norms)
        assert norms[0] == pytest.approx(float(wanted), rel=1e-5)


class Quadratic(nn.Module):
    """1/2 (theta - w)^T H (theta - w), theta in two parameters."""

    def __init__(self, hessian, center, start):
        super().__init__()
        self.one, self.two = (nn.Parameter(part.clone()) for part in start.split([3, 2]))
        self.hessian, self.center = hessian, center

    def forward(self):
        distance = torch.cat([self.one, self.two]) - self.center
        return 0.5 * distance @ self.hessian @ distance


def test_check_6_the_constrained_optimum_of_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + 2 * torch.eye(5, dtype=torch.float64)
    center, start = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    model = Quadratic(hessian, center, start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 / float(hessian.trace()))
    categories = {"*": "feed-forward"}
    hft = gw.HalfFineTuning(level="model", categories=categories)
    with gw.attach(model, optimizer, hft):
        assert len(hft.frozen_) == 1
        for _ in range(4000):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    one, two = torch.arange(3), torch.arange(3, 5)
    free, held = (one, two) if hft.frozen_ == ["two"] else (two, one)
    ff, fh, hh = (hessian[a][:, b] for a, b in ((free, free), (free, held), (held, held)))
    theta = torch.cat([model.one, model.two]).detach()
    gap = start[held] - center[held]
    wanted = center[free] - torch.linalg.solve(ff, fh @ gap)
    torch.testing.assert_close(theta[free], wanted, rtol=0, atol=1e-10)
    assert torch.equal(theta[held], start[held])
    schur = hh - fh.T @ torch.linalg.solve(ff, fh)
    assert float(model().detach()) == pytest.approx(float(0.5 * gap @ schur @ gap), abs=1e-12)
    # Full fine-tuning under lambda ||(I - M)(theta - theta^0)||^2 comes to it as 1/lambda.
    errors = []
    for strength in (1e2, 1e4, 1e6):
        pull = torch.zeros(5, dtype=torch.float64)
        pull[held] = 2 * strength
        solution = torch.linalg.solve(hessian + torch.diag(pull), hessian @ center + pull * start)
        errors.append(float((solution - theta).norm()) * strength)
    assert errors[1] == pytest.approx(errors[2], rel=1e-3)
    assert errors[0] == pytest.approx(errors[2], rel=0.2)


def test_check_9_flops_fall_from_six_to_five_units():
    model = tiny("llama", layers=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = batch_of("llama", 0)
    tokens = batch["input_ids"].numel()

    def matmuls():
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        counted = counter.get_flop_counts()["Global"]
        # Not attention's own products, which no weight takes part in.
        return sum(
            v for op, v in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
        )

    full = matmuls()
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    inside = sum(size for name, size in sizes.items() if ".layers." in name)
    head = sizes["lm_head.weight"]
    assert full == 6 * tokens * (inside + head)
    with gw.attach(model, optimizer, gw.HalfFineTuning()):
        half = matmuls()
    assert half - 6 * tokens * head == 5 * tokens * inside


def test_the_model_is_left_alone_but_for_its_flags():
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    hft = gw.HalfFineTuning()
    wires = gw.attach(model, optimizer, hft)
    train(model, optimizer)
    before, state = copies(model), torch.get_rng_state()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    wires.consolidate()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad and name in grads:
            assert torch.equal(p.grad, grads[name])
        else:
            assert p.grad is None


def test_what_was_frozen_before_stays_frozen():
    model = tiny("llama")
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    with gw.attach(model, optimizer, gw.HalfFineTuning()) as wires:
        train(model, optimizer)
        wires.consolidate()
        assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert all(p.requires_grad for p in model.model.layers[1].parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16(kind):
    model = tiny(kind).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    hft = gw.HalfFineTuning()
    with gw.attach(model, optimizer, hft):
        before = {n: v.clone() for n, v in frozen_rows(model, hft.frozen_)}
        train(model, optimizer, kind)
        assert all(torch.equal(v, before[n]) for n, v in frozen_rows(model, hft.frozen_))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_errors():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="'step'"):
        gw.attach(model, optimizer, gw.HalfFineTuning(reselect="step"))
    with pytest.raises(UsageError, match=r"ratio is 1\.5"):
        gw.attach(model, optimizer, gw.HalfFineTuning(1.5))
    assert all(p.requires_grad for p in model.parameters())
    hft = gw.HalfFineTuning(seed=1)
    with gw.attach(model, optimizer, hft) as wires:
        state = wires.state_dict()
    other = tiny("bert")
    with pytest.raises(AttachError, match="which the model lacks"):
        gw.attach(other, torch.optim.SGD(other.parameters(), lr=0.1), hft)
    with (
        gw.attach(model, optimizer, gw.HalfFineTuning(seed=2)) as wires,
        pytest.raises(CheckpointError, match="seed 1"),
    ):
        wires.load_state_dict(state)
    with (
        gw.attach(
            other, torch.optim.SGD(other.parameters(), lr=0.1), gw.HalfFineTuning(seed=1)
        ) as w,
        pytest.raises(CheckpointError, match="lacks"),
    ):
        w.load_state_dict(state)


def test_deep_copies_of_a_held_model_can_be_made():
    model = tiny("gpt2")
    with gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), gw.HalfFineTuning()):
        twin = copy.deepcopy(model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
