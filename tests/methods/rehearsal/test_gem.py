"""Exact check 7 of the stability-gap sheet, the small quadratic problem, and the hook."""

from __future__ import annotations

import numpy as np
import pytest
import quadprog
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import NonFiniteError, SelectionError, UsageError
from guywire.methods.rehearsal import gem_weights


def make(dropout=0.0, norm=False, dtype=torch.float64):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    layers = [nn.Linear(4, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6)]
    return nn.Sequential(*layers).to(dtype)


def batch(seed, size=16, low=0, high=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=dtype)
    return x, torch.randint(low, high, (size,), generator=generator)


def attach(model, regularizer, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return gw.attach(model, optimizer, regularizer), optimizer


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


# The pure functions


@given(st.integers(1, 50), st.integers(1, 80), st.integers(0, 10_000), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=60)
def test_the_weights_are_those_of_quadprog(k, width, seed, margin):
    generator = np.random.default_rng(seed)
    # Correlated rows, as gradients of related tasks are.
    rows = generator.standard_normal((k, width)) + generator.standard_normal(width)
    g = -rows.mean(0) + generator.standard_normal(width)
    gram, products = rows @ rows.T, rows @ g
    ridge = 1e-3
    found = gem_weights(
        torch.from_numpy(gram), torch.from_numpy(products), margin=margin, ridge=ridge
    )
    if not (products < 0).any():
        assert found is None
        return
    hessian = 0.5 * (gram + gram.T) + ridge * np.eye(k)
    expected = quadprog.solve_qp(hessian, -products, np.eye(k), np.full(k, margin))[0]

    def cost(v):
        return 0.5 * v @ hessian @ v + products @ v

    v = found.numpy()
    assert (v >= margin).all()
    scale = 1.0 + abs(cost(expected))
    assert cost(v) <= cost(expected) + 1e-9 * scale
    # In directions that the problem hardly sees, weights may differ; the step they make may not.
    np.testing.assert_allclose(
        rows.T @ v, rows.T @ expected, atol=1e-6 * (1 + abs(rows.T @ v).max())
    )


def test_no_violated_constraint_leaves_the_gradient_bit_for_bit():
    g = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}
    memories = [
        {"w": torch.tensor([1.0, 0.0])},
        {"w": torch.tensor([0.0, 3.0]), "b": torch.ones(1)},
    ]
    projected = gw.gem_project(g, memories)
    assert all(projected[name] is g[name] for name in g)


@given(st.integers(2, 20), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_one_past_gradient_is_the_closed_form(width, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(width, generator=generator, dtype=torch.float64)
    g = torch.randn(width, generator=generator, dtype=torch.float64) - 2.0 * h
    if g @ h >= 0:
        return
    found = gw.gem_project({"w": g}, [{"w": h}], margin=0.0, ridge=0.0)["w"]
    torch.testing.assert_close(found, g - (g @ h) / (h @ h) * h, rtol=0, atol=1e-8)
    assert float(found @ h) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("repeats", [2, 3])
def test_equal_past_gradients_without_a_ridge(repeats):
    h, g = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
    found = gw.gem_project({"w": g}, [{"w": h}] * repeats, margin=0.0, ridge=0.0)["w"]
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]))


def test_projected_gradients_violate_nothing_and_are_the_nearest_that_do_not():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    g = -rows.sum(0) + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
    memories = [{"w": row} for row in rows]
    found = gw.gem_project({"w": g}, memories, margin=0.0, ridge=0.0)["w"]
    assert bool((rows @ found >= -1e-8).all())
    # The primal problem, solved by another: min ||x - g||^2 subject to rows x >= 0.
    expected = quadprog.solve_qp(np.eye(30), g.numpy(), rows.numpy().T, np.zeros(5))[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)


def test_gradients_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="memory of a past task"):
        gw.gem_project({"w": torch.ones(1)}, [{"w": torch.tensor([torch.nan])}])


# The hook


def past_gradient(model, memory):
    x, y = memory
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_hook_is_the_pure_function(margin):
    model = make()
    gem = gw.GEM(10, margin=margin)
    wires, optimizer = attach(model, gem)
    tasks = [batch(seed, 10) for seed in (1, 2, 3)]
    for task in tasks:
        wires.consolidate([task])
    x, y = tasks[0]  # the opposite of what task 0 asks
    (-F.cross_entropy(model(x), y)).backward()
    names = [n for n, _ in model.named_parameters()]
    g = {n: p.grad.clone() for n, p in model.named_parameters()}
    memories = [dict(zip(names, past_gradient(model, t), strict=True)) for t in tasks]
    expected = gw.gem_project(g, memories, margin=margin)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-12)
    added = flat(expected.values()) - flat(g.values())
    assert gem.violated_ > 0
    assert gem.stability_norm_ == pytest.approx(float(added.norm()), rel=1e-9)
    cosine = float(F.cosine_similarity(added, flat(g.values()), 0))
    assert gem.cosine_ == pytest.approx(cosine, rel=1e-9)


def test_a_step_that_agrees_with_the_memory_is_plain_bit_for_bit():
    plain, held = make(dtype=torch.float32), make(dtype=torch.float32)
    gem = gw.GEM(16, margin=0.0)
    wires, optimizer = attach(held, gem)
    memory = batch(0, dtype=torch.float32)
    wires.consolidate([memory])
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(20):  # full-batch steps on the memory itself: <g, g> >= 0
        for model, o in ((plain, reference), (held, optimizer)):
            o.zero_grad()
            F.cross_entropy(model(memory[0]), memory[1]).backward()
            o.step()
        assert gem.violated_ == 0
        assert gem.stability_norm_ == 0.0
    for a, b in zip(plain.parameters(), held.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_past_task_training_is_plain_bit_for_bit_and_so_is_the_model_state_with_one():
    plain, held = make(0.3, norm=True), make(0.3, norm=True)
    wires, optimizer = attach(held, gw.GEM(8))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    torch.manual_seed(1)
    for step in range(5):
        reference.zero_grad()
        F.cross_entropy(plain(batch(step)[0]), batch(step)[1]).backward()
        reference.step()
    torch.manual_seed(1)
    for step in range(5):
        optimizer.zero_grad()
        F.cross_entropy(held(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
    for a, b in zip(plain.state_dict().values(), held.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    wires.consolidate([batch(0)])
    optimizer.zero_grad()
    buffers = {n: b.clone() for n, b in held.named_buffers()}
    state = torch.get_rng_state()
    held[1].eval()
    optimizer.step()
    assert not held[1].training
    assert held[0].training
    assert all(torch.equal(b, buffers[n]) for n, b in held.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_memory_is_the_first_samples_of_each_task():
    gem = gw.GEM(10)
    wires, _ = attach(make(), gem)
    data = [batch(0, 6), batch(1, 6), batch(2, 6)]
    wires.consolidate(data)
    x, y = gem.memories_[0]
    assert torch.equal(x, torch.cat([data[0][0], data[1][0][:4]]))
    assert torch.equal(y, torch.cat([data[0][1], data[1][1][:4]]))
    wires.consolidate([batch(3, 4)])
    assert len(gem.memories_[1][1]) == 4
    for nothing in (None, []):
        with pytest.raises(UsageError):
            wires.consolidate(nothing)


def test_a_parameter_without_a_gradient_gets_the_memorys():
    model = make()
    gem = gw.GEM(10, margin=0.0, ridge=0.0)
    wires, optimizer = attach(model, gem)
    wires.consolidate([batch(1, 10)])
    h = past_gradient(model, batch(1, 10))
    model[0].bias.grad = -h[1].clone()  # of all parameters only one has a gradient, and it opposes
    optimizer.step()
    g = torch.zeros_like(flat(h))
    g[32:40] = -h[1]
    expected = g - (g @ flat(h)) / (flat(h) @ flat(h)) * flat(h)
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), expected)


def test_only_the_selected_and_owned_parameters_are_projected():
    model = make()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    gem = gw.GEM(10, select="*.weight")
    wires, _ = attach(model, gem, optimizer)
    wires.consolidate([batch(1, 10)])
    x, y = batch(1, 10)
    (-F.cross_entropy(model(x), y)).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p.grad, before[n])]
    assert changed == ["0.weight"]


def test_the_scale_of_a_fused_optimiser_does_not_change_the_projection():
    results = []
    for scale in (1.0, 1024.0):
        model = make(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        wires, _ = attach(model, gw.GEM(10), optimizer)
        data = batch(1, 10, dtype=torch.float32)
        wires.consolidate([data])
        (-scale * F.cross_entropy(model(data[0]), data[1])).backward()
        if scale != 1.0:
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        results.append(flat(p.detach() for p in model.parameters()))
    torch.testing.assert_close(*results)


def test_saved_and_resumed_the_parameters_are_bit_identical(tmp_path):
    model = make()
    wires, optimizer = attach(model, gw.GEM(8))
    wires.consolidate([batch(1)])
    wires.consolidate([batch(2)])
    checkpoint.save(tmp_path / "s.safetensors", wires.state_dict())
    other = make()
    again, second = attach(other, gw.GEM(8))
    again.load_state_dict(checkpoint.load(tmp_path / "s.safetensors"))
    for m, o in ((model, optimizer), (other, second)):
        for step in range(6):
            o.zero_grad()
            F.cross_entropy(m(batch(step)[0]), batch(step)[1]).backward()
            o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_closures_project_behind_every_evaluation():
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    gem = gw.GEM(10, margin=0.0)
    wires, _ = attach(model, gem, optimizer)
    x, y = batch(1, 10)
    wires.consolidate([(x, y)])
    before = float(F.cross_entropy(model(x), y).detach())

    def closure():
        optimizer.zero_grad()
        loss = -F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert gem.violated_ == 1
    assert float(F.cross_entropy(model(x), y).detach()) == pytest.approx(before, abs=1e-3)


def test_it_keeps_the_loss_on_an_old_task_from_rising():
    losses = {}
    for name, regularizer in (("plain", gw.L2(0.0)), ("gem", gw.GEM(64))):
        model = make()
        wires, optimizer = attach(model, regularizer)
        old, new = batch(0, 64, 0, 3), batch(1, 64, 3, 6)
        for task in (old, new):
            for _ in range(60):
                optimizer.zero_grad()
                F.cross_entropy(model(task[0]), task[1]).backward()
                optimizer.step()
            if task is old:
                wires.consolidate([old])
                first = float(F.cross_entropy(model(old[0]), old[1]).detach())
        losses[name] = float(F.cross_entropy(model(old[0]), old[1]).detach()) - first
    assert losses["plain"] > 0.5
    assert losses["gem"] < 0.05


def test_wrong_words_and_facts():
    for wrong in ({"memory_per_task": 0}, {"margin": -0.1}, {"ridge": float("nan")}):
        with pytest.raises(UsageError):
            attach(make(), gw.GEM(**wrong))
    with pytest.raises(SelectionError):
        attach(make(), gw.GEM(select="*.nothing"))
    assert (gw.GEM.place, gw.GEM.arxiv, gw.GEM.slug) == ("step", "1706.08840", "stability-gap")
    assert repr(gw.GEM(8, margin=0.1)) == "GEM(memory_per_task=8, margin=0.1)"
