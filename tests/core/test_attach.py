"""Attaching to a model and its optimiser: every optimiser, every corner."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn, optim

import guywire as gw
from guywire.core.errors import AttachError, CheckpointError, SelectionError, UsageError

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(12, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def net(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def anchors_of(model, shift=0.3):
    return {n: p.detach() + shift for n, p in model.named_parameters()}


def task_loss(model, x=X, y=Y):
    return (model(x) - y).square().mean()


def penalised(model, anchors, strength):
    return strength * gw.l2_penalty(dict(model.named_parameters()), anchors)


def hooks_of(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def same(one, two, tolerance=1e-10):
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def unlike(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


OPTIMISERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: optim.SGD(p, lr=0.05, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, lr=0.05),
    "Adam amsgrad": lambda p: optim.Adam(p, lr=0.05, amsgrad=True, foreach=True),
    "Adam fused": lambda p: optim.Adam(p, lr=0.05, fused=True),
    "Adam tensor lr": lambda p: optim.Adam(p, lr=torch.tensor(0.05), foreach=False),
    "AdamW": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.05, fused=True),
    "Adamax": lambda p: optim.Adamax(p, lr=0.05),
    "NAdam": lambda p: optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: optim.RAdam(p, lr=0.05),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "Adagrad fused": lambda p: optim.Adagrad(p, lr=0.05, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p),
    "ASGD": lambda p: optim.ASGD(p, lr=0.05),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.05),
    "Muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.02),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.5, max_iter=4),
    "LBFGS strong_wolfe": lambda p: optim.LBFGS(p, max_iter=6, line_search_fn="strong_wolfe"),
}


def test_the_table_has_every_optimiser():
    known = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, optim.Optimizer)
        and kind is not optim.Optimizer
    }
    assert known - {name.split()[0] for name in OPTIMISERS} == {"SparseAdam"}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_equals_the_penalty_in_the_loss(name):
    plain, held = net(), net()
    anchors = anchors_of(plain)
    one, two = (OPTIMISERS[name](list(m.parameters())) for m in (plain, held))
    only = [n for n, p in held.named_parameters() if name != "Muon" or p.dim() == 2]
    kept = {n: anchors[n] for n in only}
    wires = gw.attach(held, two, gw.L2(strength=0.7, anchor=kept, select=only))
    start = copy.deepcopy(held)

    def in_the_loss():
        one.zero_grad()
        params = {n: p for n, p in plain.named_parameters() if n in kept}
        loss = task_loss(plain) + 0.7 * gw.l2_penalty(params, kept)
        loss.backward()
        return loss

    def by_the_hook():
        two.zero_grad()
        loss = task_loss(held)
        loss.backward()
        return loss

    for _ in range(5):
        if name.startswith("LBFGS"):
            a, b = one.step(in_the_loss), two.step(by_the_hook)
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-12)
        else:
            in_the_loss()
            one.step()
            by_the_hook()
            two.step()
    same(plain, held, 1e-9)
    assert unlike(start, held)
    assert wires.steps == 5


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_sees_loss_and_gradient_of_the_whole(keyword):
    plain, held = net(), net()
    anchors = anchors_of(plain)
    one, two = optim.Adam(plain.parameters(), lr=0.1), optim.Adam(held.parameters(), lr=0.1)
    gw.attach(held, two, gw.L2(strength=0.7, anchor=anchors))

    def in_the_loss():
        one.zero_grad()
        loss = task_loss(plain) + penalised(plain, anchors, 0.7)
        loss.backward()
        return loss

    def by_the_hook():
        two.zero_grad()
        loss = task_loss(held)
        loss.backward()
        return loss

    for _ in range(3):
        a = one.step(closure=in_the_loss) if keyword else one.step(in_the_loss)
        b = two.step(closure=by_the_hook) if keyword else two.step(by_the_hook)
        torch.testing.assert_close(a.detach(), b.detach())
    same(plain, held)


def test_closures_that_return_numbers_or_nothing():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    wires = gw.attach(model, optimizer, gw.L2(strength=1.0, anchor=anchors_of(model)))

    def number():
        task_loss(model).backward()
        return 2.0

    assert optimizer.step(number) == pytest.approx(2.0 + float(wires.penalty()))
    assert optimizer.step(lambda: None) is None


def test_a_decoupled_pull_moves_once_and_stays_out_of_the_closures_loss():
    model = net()
    before = copy.deepcopy(model)
    optimizer = optim.LBFGS(model.parameters(), lr=0.0, max_iter=3)
    gw.attach(model, optimizer, gw.L2(0.5, anchor="zero", decoupled=True))
    group = optimizer.param_groups[0]

    calls = []

    def closure():
        optimizer.zero_grad()
        group["lr"] = 0.1  # for the pull; LBFGS read its own, 0, when the step began
        loss = task_loss(model)
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == calls[0]
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b * 0.9)


def test_groups_have_their_own_rates():
    model = net()
    before = copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[2].parameters(), "lr": 0.01},
    ]
    optimizer = optim.SGD(groups, lr=1.0)
    gw.attach(model, optimizer, gw.L2(0.5, anchor="zero", decoupled=True))
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before[0].weight * 0.9)
    torch.testing.assert_close(model[2].weight, before[2].weight * 0.99)


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_accumulation_pulls_once_a_step(pieces):
    plain, held = net(), net()
    anchors = anchors_of(plain)
    one, two = optim.Adam(plain.parameters(), lr=0.1), optim.Adam(held.parameters(), lr=0.1)
    gw.attach(held, two, gw.L2(strength=0.7, anchor=anchors))
    for _ in range(3):
        one.zero_grad()
        two.zero_grad()
        (task_loss(plain) + penalised(plain, anchors, 0.7)).backward()
        for x, y in zip(X.chunk(pieces), Y.chunk(pieces), strict=True):
            (task_loss(held, x, y) / pieces).backward()
        one.step()
        two.step()
    same(plain, held)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad])
def test_grad_scaler(kind, fused, unscale):
    plain, held = net(dtype=torch.float32), net(dtype=torch.float32)
    x, y = X.float(), Y.float()
    anchors = anchors_of(plain)
    one, two = kind(plain.parameters(), lr=0.05), kind(held.parameters(), lr=0.05, fused=fused)
    wires = gw.attach(held, two, gw.L2(strength=0.7, anchor=anchors))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(4):
        one.zero_grad()
        two.zero_grad()
        (task_loss(plain, x, y) + penalised(plain, anchors, 0.7)).backward()
        one.step()
        scaler.scale(task_loss(held, x, y)).backward()
        if unscale:
            scaler.unscale_(two)
        scaler.step(two)
        scaler.update()
    same(plain, held, 1e-5)
    assert wires.steps == 4


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_with_infinities(fused, decoupled):
    model = net(dtype=torch.float32)
    optimizer = optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    l2 = gw.L2(strength=0.7, anchor=anchors_of(model), decoupled=decoupled)
    wires = gw.attach(model, optimizer, l2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model)
    scaler.scale(task_loss(model, X.float(), Y.float()) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    same(model, before, 0)
    assert wires.steps == 0
    assert scaler.get_scale() < 1024.0


class Corners(nn.Module):
    """Tied, frozen, unused, 0-d, and one that the optimiser does not hold."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.outside = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.gain * self.outside(self.frozen(self.tied(self.first(x).tanh()).tanh()))


def test_corner_parameters():
    torch.manual_seed(0)
    model = Corners()
    inside = [p for n, p in model.named_parameters() if not n.startswith("outside")]
    optimizer = optim.SGD(inside, lr=0.1)
    anchors = {n: p.detach() + 1 for n, p in model.named_parameters() if p.requires_grad}
    gw.attach(model, optimizer, gw.L2(strength=0.5, anchor=anchors))
    before = copy.deepcopy(model)
    model(torch.randn(8, 4)).square().mean().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    after = dict(model.named_parameters())
    assert "tied.weight" not in anchors
    for name, p in before.named_parameters():
        if name.startswith("frozen"):
            assert torch.equal(after[name], p)
            assert after[name].grad is None
        elif name.startswith("outside"):
            assert torch.equal(after[name], p)
            assert torch.equal(after[name].grad, grads[name])  # not pulled, since nothing moves it
        else:  # strength 0.5 pulls by param - anchor = -1, also where the loss gave no gradient
            grad = torch.zeros_like(p) if grads[name] is None else grads[name]
            torch.testing.assert_close(after[name], p - 0.1 * (grad - 1))


def test_a_parameter_frozen_in_the_middle_stays():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gw.attach(model, optimizer, gw.L2(strength=0.5, anchor=anchors_of(model)))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_sparse_gradients_are_refused_by_name_unless_decoupled():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = optim.SparseAdam(list(model.parameters()), lr=0.1)
    with gw.attach(model, optimizer, gw.L2(0.5, anchor="zero")):
        model(torch.tensor([1])).sum().backward()
        with pytest.raises(UsageError, match="'weight' has a sparse gradient"):
            optimizer.step()
    before = model.weight.detach().clone()
    with gw.attach(model, optimizer, gw.L2(0.5, anchor="zero", decoupled=True)):
        optimizer.step()
    torch.testing.assert_close(model.weight[0], before[0] * 0.9)


def test_compiled_models():
    plain, held = net(), net()
    anchors = anchors_of(plain)
    compiled = torch.compile(held, backend="eager")
    one, two = optim.Adam(plain.parameters(), lr=0.1), optim.Adam(compiled.parameters(), lr=0.1)
    wires = gw.attach(compiled, two, gw.L2(strength=0.7, anchor=anchors))
    for _ in range(3):
        one.zero_grad()
        two.zero_grad()
        (task_loss(plain) + penalised(plain, anchors, 0.7)).backward()
        task_loss(compiled).backward()
        one.step()
        two.step()
    same(plain, held)
    torch.testing.assert_close(wires.penalty(), penalised(plain, anchors, 0.7).detach())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_compiled_step_pulls_as_well():
    model = net()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    wires = gw.attach(model, optimizer, gw.L2(0.5, anchor="zero"))
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(3):
        optimizer.zero_grad()
        task_loss(model).backward()
        wanted = [p.grad + p.detach() for p in model.parameters()]
        step()
        assert wires.steps == number + 1
        for p, grad in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, grad)


# --- the double-fire hazard ---


def subclass(base):
    class Derived(base):
        def step(self, closure=None):
            return super().step(closure)

    return Derived


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_an_optimiser_that_calls_super_pulls_once(closure, used_before):
    base = type("Fresh", (optim.SGD,), {"step": lambda self, c=None: optim.SGD.step(self, c)})
    if used_before:
        base(net().parameters(), lr=0.1)  # torch patches a class's step when it first makes one
    plain, held = net(), net()
    anchors = anchors_of(plain)
    one = optim.SGD(plain.parameters(), lr=0.1, momentum=0.5)
    two = subclass(base)(held.parameters(), lr=0.1, momentum=0.5)
    wires = gw.attach(held, two, gw.L2(strength=0.7, anchor=anchors))

    def by_the_hook():
        two.zero_grad()
        loss = task_loss(held)
        loss.backward()
        return loss

    for _ in range(3):
        one.zero_grad()
        (task_loss(plain) + penalised(plain, anchors, 0.7)).backward()
        one.step()
        if closure:
            two.step(by_the_hook)
        else:
            by_the_hook()
            two.step()
    same(plain, held)
    assert wires.steps == 3


def test_a_step_that_raised_does_not_swallow_the_next_pull():
    model = net()
    optimizer = subclass(optim.SGD)(model.parameters(), lr=0.1)
    wires = gw.attach(model, optimizer, gw.L2(0.5, anchor="zero"))

    def broken():
        raise RuntimeError("no loss today")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no loss today"):
            optimizer.step(broken)
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before[0].weight * 0.9)
    assert wires.steps == 1


# --- a model that changes ---


def grow(model):
    model.append(nn.Linear(2, 2).double())


def shrink(model):
    del model[2]


def reshape(model):
    model[2].weight.data = torch.zeros(3, 5, dtype=torch.float64)


def swap(model):
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def move(model):
    model[2] = nn.Linear(5, 2, device="meta", dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (grow, r"parameter '3\.bias' appeared"),
        (shrink, r"parameter '2\.bias' vanished"),
        (reshape, r"'2\.weight' changed from shape \(2, 5\) on cpu to shape \(3, 5\) on cpu"),
        (swap, r"'2\.weight' was replaced by another tensor"),
        (move, r"'2\.bias' changed from shape \(2,\) on cpu to shape \(2,\) on meta"),
    ],
)
def test_a_change_between_steps_is_an_error(change, words):
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    wires = gw.attach(model, optimizer, gw.L2(0.5))
    optimizer.step()
    keep = list(model.parameters())  # so that no new tensor can take an old one's identity
    change(model)
    with pytest.raises(AttachError, match=words + ".*wires.refresh"):
        optimizer.step()
    assert wires.steps == 1
    assert keep


def test_refresh_accepts_a_change_and_leaves_new_parameters_free():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    wires = gw.attach(model, optimizer, gw.L2(0.5))
    grow(model)
    optimizer.add_param_group({"params": model[3].parameters()})
    wires.refresh()
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    before = copy.deepcopy(model)
    optimizer.step()
    assert torch.equal(model[3].weight, before[3].weight)
    torch.testing.assert_close(model[0].weight, before[0].weight - 0.1)
    wires.consolidate()
    with torch.no_grad():
        model[3].weight += 1
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(model[3].weight, before[3].weight + 0.9)


# --- attach and detach ---


def test_arguments():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"not a torch\.optim optimiser"):
        gw.attach(model, object(), gw.L2())
    with pytest.raises(AttachError, match="is not a Regularizer"):
        gw.attach(model, optimizer, [gw.L2])
    l2 = gw.L2()
    with pytest.raises(AttachError, match="stands twice"):
        gw.attach(model, optimizer, [l2, l2])
    with pytest.raises(AttachError, match="none of the model's parameters"):
        gw.attach(net(), optimizer, l2)
    assert hooks_of(optimizer) == 0
    gw.attach(model, optimizer, l2)
    with pytest.raises(AttachError, match="attached already"):
        gw.attach(model, optimizer, l2)
    assert hooks_of(optimizer) == 2


def test_two_attachments_of_different_regularizers_add_up():
    model = net()
    before = copy.deepcopy(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gw.attach(model, optimizer, gw.L2(0.5, anchor="zero"))
    gw.attach(model, optimizer, [gw.L2(0.5, anchor="zero"), gw.L2(0.5, anchor="zero")])
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before[0].weight * 0.7)


def test_detach_leaves_nothing_and_keeps_what_was_learnt():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    l2 = gw.L2(0.5)
    wires = gw.attach(model, optimizer, l2)
    anchor = l2.anchors_["0.weight"].clone()
    wires.detach()
    wires.detach()
    assert hooks_of(optimizer) == 0
    with torch.no_grad():
        model[0].weight += 1
    before = copy.deepcopy(model)
    optimizer.step()
    same(model, before, 0)
    assert float(wires.penalty()) == 0.0
    assert torch.equal(l2.anchors_["0.weight"], anchor)
    with pytest.raises(AttachError, match="detached"):
        wires.consolidate()
    with pytest.raises(AttachError, match="detached"):
        wires.refresh()
    # A fresh optimiser with the same object: still held to where the first task began.
    again = optim.SGD(model.parameters(), lr=0.1)
    with gw.attach(model, again, l2):
        again.step()
    torch.testing.assert_close(model[0].weight, anchor + 0.9)
    assert hooks_of(again) == 0


def test_a_detached_model_can_be_collected():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    l2 = gw.L2(0.5)
    wires = gw.attach(model, optimizer, l2)
    optimizer.step()
    wires.detach()
    gone = weakref.ref(model)
    del model, optimizer, wires
    gc.collect()
    assert gone() is None
    assert l2.anchors_ is not None


def test_the_context_manager_detaches_also_after_an_error():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), gw.attach(model, optimizer, gw.L2(0.5)):
        1 / 0  # noqa: B018
    assert hooks_of(optimizer) == 0


class Failing(gw.Regularizer):
    """Fails half-way through a hook; ``torn`` counts teardowns."""

    def __init__(self, where="setup"):
        self.where = where
        self.torn = 0

    def setup(self, model):
        self.handle = model.register_forward_hook(lambda *_: None)
        if self.where == "setup":
            raise UsageError("setup fails")

    def before_step(self, step):
        if self.where == "before_step":
            raise UsageError("before_step fails")

    def consolidate(self, model, data):
        model.train()
        torch.rand(1)
        random.random()
        np.random.rand()  # noqa: NPY002
        if self.where == "consolidate":
            raise UsageError("consolidate fails")

    def teardown(self):
        self.torn += 1
        self.handle.remove()


def test_a_setup_that_fails_leaves_nothing_hooked():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    first, failing = gw.L2(0.5), Failing()
    with pytest.raises(UsageError, match="setup fails"):
        gw.attach(model, optimizer, [first, failing])
    assert hooks_of(optimizer) == 0
    assert failing.torn == 1
    assert not model._forward_hooks
    failing.where = ""
    gw.attach(model, optimizer, [first, failing]).detach()  # neither counts as attached


def test_a_selection_that_fails_leaves_nothing_hooked():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SelectionError):
        gw.attach(model, optimizer, [gw.L2(0.5), gw.L2(0.5, select="nowhere")])
    assert hooks_of(optimizer) == 0


def test_a_hook_that_fails_stops_the_step():
    model = net()
    before = copy.deepcopy(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    task_loss(model).backward()
    with (
        pytest.raises(UsageError, match="before_step"),
        gw.attach(model, optimizer, Failing("before_step")),
    ):
        optimizer.step()
    same(model, before, 0)
    assert hooks_of(optimizer) == 0


@pytest.mark.parametrize("where", ["consolidate", ""])
def test_consolidate_leaves_flags_and_random_state(where):
    model = net()
    model.eval()
    model[2].train()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    wires = gw.attach(model, optimizer, Failing(where))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    if where:
        with pytest.raises(UsageError):
            wires.consolidate([])
    else:
        wires.consolidate([])
    assert [m.training for m in model] == [False, False, True]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.array_equal(np.random.get_state()[1], state[2][1])  # noqa: NPY002


class Reader(gw.Regularizer):
    def __init__(self):
        self.seen_ = []

    def consolidate(self, model, data):
        self.seen_ += list(data)


def test_every_method_reads_an_iterator_that_can_be_read_once():
    model = net()
    readers = [Reader(), Reader()]
    wires = gw.attach(model, optim.SGD(model.parameters(), lr=0.1), readers)
    wires.consolidate(iter([(X, Y), (X, Y)]))
    assert [len(r.seen_) for r in readers] == [2, 2]


class Term(gw.Regularizer):
    def __init__(self, value=None):
        self.value = value

    def loss(self, batch, outputs):
        return None if self.value is None else self.value * outputs.sum()


def test_loss_terms_add_up():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    outputs = model(X)
    with gw.attach(model, optimizer, [Term(2.0), Term(), Term(0.5)]) as wires:
        torch.testing.assert_close(wires.loss((X, Y), outputs), 2.5 * outputs.sum())
    with gw.attach(model, optimizer, [Term(), gw.L2()]) as wires:
        zero = wires.loss((X, Y), outputs)
        assert zero.dim() == 0
        assert float(zero) == 0.0


class Counting(gw.Regularizer):
    """Records what it is told about each step."""

    def __init__(self):
        self.before_ = []
        self.after_ = []

    def before_step(self, step):
        assert not torch.is_grad_enabled()
        self.before_.append((step.number, step.evaluation, step.scale))

    def after_step(self, step):
        self.after_.append((step.number, step.evaluation))


def test_what_a_step_tells():
    model = net()
    counting = Counting()
    optimizer = optim.LBFGS(model.parameters(), max_iter=3)
    gw.attach(model, optimizer, counting)

    def closure():
        optimizer.zero_grad()
        loss = task_loss(model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert counting.before_ == [(s, e, 1.0) for s in range(2) for e in range(3)]
    assert counting.after_ == [(0, 2), (1, 2)]


def test_state_goes_back_only_where_it_came_from():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with gw.attach(model, optimizer, gw.L2(0.5)) as wires:
        optimizer.step()
        state = wires.state_dict()
    assert state["steps"] == 1
    with gw.attach(model, optimizer, gw.L1(0.5)) as wires:
        with pytest.raises(CheckpointError, match=r"\['L2'\], but attached are \['L1'\]"):
            wires.load_state_dict(state)
        with pytest.raises(CheckpointError, match="not the state of wires"):
            wires.load_state_dict({"steps": 3})
    with gw.attach(model, optimizer, gw.L2(0.5)) as wires:
        wires.load_state_dict(state)
        assert wires.steps == 1


def test_repr():
    model = net()
    wires = gw.attach(model, optim.SGD(model.parameters()), [gw.L2(0.5), gw.L1(select="0.*")])
    assert repr(wires) == "Wires(L2(strength=0.5), L1(select='0.*'))"
