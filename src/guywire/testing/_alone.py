"""The checks that one process is enough for."""

from __future__ import annotations

import copy
import inspect
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from guywire.core import checkpoint
from guywire.core.attach import attach
from guywire.core.errors import AttachError, SelectionError
from guywire.core.regularizer import Regularizer
from guywire.testing import _bench as bench

Factory = Callable[..., Regularizer]
Off = Mapping[str, Any]


def constructor(factory: Factory, off: Off) -> None:
    """The constructor only stores keywords; a repr; facts on the class."""
    made = factory()
    kind = type(made)
    parameters = inspect.signature(kind).parameters
    for name in parameters:
        assert hasattr(made, name), f"{kind.__name__} does not store {name!r}"
    for name in vars(made):
        learnt = name.endswith("_") or name.startswith("_")
        assert name in parameters or learnt, f"{name!r} is neither a keyword, private nor learnt_"
    again = kind(**{name: getattr(made, name) for name in parameters})
    assert repr(again) == repr(made)
    assert repr(made).startswith(kind.__name__ + "(")
    assert kind.title, f"{kind.__name__} has no title"
    assert kind.place in ("step", "weight", "loss"), f"place is {kind.place!r}"


def acts(factory: Factory, off: Off) -> None:
    """It changes what is learnt, or all other checks say nothing."""
    plain, held = (bench.build(bench.Plain) for _ in range(2))
    bench.two_tasks(None, plain)
    bench.two_tasks(factory(), held)
    pairs = zip(plain.parameters(), held.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs), "nothing differs from plain training"


def strength_zero(factory: Factory, off: Off) -> None:
    """Turned off, it is plain training bit for bit."""
    for kind in (bench.Plain, bench.Corners):
        plain, held = (bench.build(kind, torch.float32) for _ in range(2))
        wanted = bench.two_tasks(None, plain, torch.float32)
        assert bench.two_tasks(factory(**off), held, torch.float32) == wanted
        bench.assert_same(bench.state_of(plain), bench.state_of(held))


def twice_is_once(factory: Factory, off: Off) -> None:
    """A second attach is refused; detach and attach, or loading a state twice, change nothing."""
    results = []
    for twice in (False, True):
        model = bench.build(bench.Plain)
        regularizer = factory()
        optimizer = bench.sgd(model)
        wires = attach(model, optimizer, regularizer)
        bench.train(model, optimizer, wires, bench.task(0))
        wires.consolidate(bench.task(0))
        if twice:
            try:
                attach(model, optimizer, regularizer)
            except AttachError:
                pass
            else:
                raise AssertionError("it can be attached twice, and would act twice")
            steps = wires.steps
            wires.detach()
            wires.detach()
            wires = attach(model, optimizer, regularizer)
            state = copy.deepcopy({**wires.state_dict(), "steps": steps})
            wires.load_state_dict(state)
            wires.load_state_dict(state)
        losses = bench.train(model, optimizer, wires, bench.task(1))
        results.append((losses, bench.state_of(model)))
    assert results[0][0] == results[1][0]
    bench.assert_same(results[0][1], results[1][1])


def detach_restores(factory: Factory, off: Off) -> None:
    """After detach the model and the optimiser look as before: names, hooks, flags."""
    model = bench.build(bench.Corners)
    optimizer = bench.sgd(model)
    before = _looks(model, optimizer)
    with attach(model, optimizer, factory()) as wires:
        bench.train(model, optimizer, wires, bench.task(0))
        wires.consolidate(bench.task(0))
        bench.train(model, optimizer, wires, bench.task(1))
    after = _looks(model, optimizer)
    for what, value in before.items():
        assert after[what] == value, f"{what} changed: {value} became {after[what]}"


def save_load_continue(factory: Factory, off: Off) -> None:
    """State that went through a file continues with the same losses, bit for bit."""
    saved, wanted = interrupted(factory)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        checkpoint.save(path, saved)
        assert resumed(factory, checkpoint.load(path)) == wanted


def estimation(factory: Factory, off: Off) -> None:
    """Consolidating leaves parameters, buffers, gradients, flags and random states alone."""
    model = bench.build(bench.Corners)
    optimizer = bench.sgd(model)
    wires = attach(model, optimizer, factory())
    bench.train(model, optimizer, wires, bench.task(0))
    model.train()
    model.get_submodule("norm").eval()
    before = bench.state_of(model), _looks(model, None)
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    random_before = _random_states()
    wires.consolidate(torch.utils.data.DataLoader(_Rows(), batch_size=4, shuffle=True))
    _assert_random_states(random_before)
    bench.assert_same(before[0], bench.state_of(model))
    after = _looks(model, None)
    assert after["train flags"] == before[1]["train flags"], "train flags changed"
    assert after["requires_grad"] == before[1]["requires_grad"], "requires_grad changed"
    for name, p in model.named_parameters():
        was = grads[name]
        same = p.grad is None if was is None else p.grad is not None and torch.equal(p.grad, was)
        assert same, f"the gradient of {name!r} changed"


def random_state(factory: Factory, off: Off) -> None:
    """The global random states are not drawn from: not at attach, in steps, nor between."""
    before = _random_states()
    bench.two_tasks(factory(), bench.build(bench.Plain))
    _assert_random_states(before)


def micro_batches(factory: Factory, off: Off) -> None:
    """Four micro-batches a step equal one batch."""
    whole, pieces = (bench.build(bench.Plain) for _ in range(2))
    bench.two_tasks(factory(), whole)
    bench.two_tasks(factory(), pieces, pieces=4)
    bench.assert_same(bench.state_of(whole), bench.state_of(pieces), 1e-9)


def gradient(factory: Factory, off: Off) -> None:
    """The pull is the gradient of ``penalty()``, and ``loss()`` has the gradient it should."""
    model = bench.build(bench.Plain)
    regularizer = factory()
    bench.two_tasks(regularizer, model)
    frozen = bench.still(model)
    with attach(model, frozen, regularizer) as wires:
        # The frozen weights of a model with adapters are constants.
        params = [p for p in model.parameters() if p.requires_grad]
        state = copy.deepcopy(wires.state_dict())
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in params:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        batch = bench.task(1)[0]

        def loss() -> torch.Tensor:
            wires.load_state_dict(state)  # so that a memory draws the same each time
            return wires.loss(batch, model(batch[0]))

        def along(value: Callable[[], torch.Tensor]) -> float:
            epsilon, ends = 1e-6, []
            for sign in (1.0, -2.0, 1.0):
                with torch.no_grad():
                    for p, d in zip(params, direction, strict=True):
                        p.add_(d, alpha=sign * epsilon)
                ends.append(float(value().detach()))
            return (ends[0] - ends[1]) / (2 * epsilon)

        def inner() -> float:
            pairs = zip(params, direction, strict=True)
            return sum(float((p.grad * d).sum()) for p, d in pairs if p.grad is not None)

        frozen.zero_grad()
        term = loss()
        if term.requires_grad:
            term.backward()
        _assert_near(inner(), along(loss), "loss()")
        coupled = not getattr(regularizer, "decoupled", False)
        if coupled and regularizer.penalty() is not None:
            frozen.zero_grad()
            frozen.step()
            _assert_near(inner(), along(wires.penalty), "penalty()")


def corners(factory: Factory, off: Off) -> None:
    """Tied, frozen, unused and 0-d parameters: nothing breaks, what is frozen stays."""
    model = bench.build(bench.Corners)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    bench.two_tasks(factory(), model)
    now = dict(model.named_parameters(remove_duplicate=False))
    for name, value in frozen.items():
        assert torch.equal(now[name], value), f"{name!r} is frozen, and moved"
    assert now["again.weight"] is now["tied.weight"], "tied weights came apart"
    for name, p in now.items():
        assert bool(torch.isfinite(p).all()), f"{name!r} is not finite"


def nothing_selected(factory: Factory, off: Off) -> None:
    """A selection that matches nothing is an error, and leaves nothing attached."""
    model = bench.build(bench.Plain)
    optimizer = bench.sgd(model)
    before = _looks(model, optimizer)
    regularizer = factory(select="no.such.parameter")
    said = ""
    try:
        attach(model, optimizer, regularizer)
    except SelectionError as error:
        said = str(error)
    assert "no.such.parameter" in said, f"it attached with nothing selected, or said only {said!r}"
    assert _looks(model, optimizer) == before
    regularizer = factory(select="head.*")
    attach(model, optimizer, regularizer).detach()


def bfloat16(factory: Factory, off: Off) -> None:
    """Parameters in bfloat16 stay finite."""
    model = bench.build(bench.Plain, torch.bfloat16)
    losses = bench.two_tasks(factory(), model, torch.bfloat16)
    assert all(np.isfinite(losses)), "a loss is not finite"
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert bool(torch.isfinite(p).all()), f"{name!r} is not finite"


ALONE: dict[str, Callable[[Factory, Off], None]] = {
    check.__name__: check
    for check in (
        constructor,
        acts,
        strength_zero,
        twice_is_once,
        detach_restores,
        save_load_continue,
        estimation,
        random_state,
        micro_batches,
        gradient,
        corners,
        nothing_selected,
        bfloat16,
    )
}


def interrupted(factory: Factory) -> tuple[dict[str, Any], list[float]]:
    """Train, save in the middle of the second task, go on: the state and the losses after it."""
    model = bench.build(bench.Plain)
    regularizer = factory()
    optimizer = bench.sgd(model)
    with attach(model, optimizer, regularizer) as wires:
        bench.train(model, optimizer, wires, bench.task(0))
        wires.consolidate(bench.task(0))
    optimizer = bench.sgd(model)
    wires = attach(model, optimizer, regularizer)
    bench.train(model, optimizer, wires, bench.task(1)[:2])
    saved = copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "wires": wires.state_dict(),
        }
    )
    return saved, bench.train(model, optimizer, wires, bench.task(1, batches=6)[2:])


def resumed(factory: Factory, saved: dict[str, Any]) -> list[float]:
    """Build everything anew, load, go on: the losses."""
    model = bench.build(bench.Plain, seed=1)
    model.load_state_dict(saved["model"])
    optimizer = bench.sgd(model)
    optimizer.load_state_dict(saved["optimizer"])
    wires = attach(model, optimizer, factory())
    wires.load_state_dict(saved["wires"])
    return bench.train(model, optimizer, wires, bench.task(1, batches=6)[2:])


class _Rows(torch.utils.data.Dataset):
    """The samples of task 0, for a DataLoader that shuffles."""

    def __init__(self) -> None:
        self.x, self.y = (torch.cat(parts) for parts in zip(*bench.task(0), strict=True))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> bench.Batch:
        return self.x[index], self.y[index]


def _looks(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    return {
        "parameter names": [n for n, _ in model.named_parameters(remove_duplicate=False)],
        "buffer names": [n for n, _ in model.named_buffers()],
        "module types": [type(m) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "train flags": [m.training for m in model.modules()],
        "module hooks": [
            len(value)
            for m in model.modules()
            for name, value in vars(m).items()
            if name.endswith("_hooks") and isinstance(value, dict)
        ],
        "parameter hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
        "optimiser hooks": []
        if optimizer is None
        else [
            len(optimizer._optimizer_step_pre_hooks),
            len(optimizer._optimizer_step_post_hooks),
        ],
    }


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def _assert_random_states(before: tuple[Any, ...]) -> None:
    now = _random_states()
    assert torch.equal(now[0], before[0]), "torch's global random state changed"
    assert now[1] == before[1], "Python's global random state changed"
    assert np.array_equal(now[2][1], before[2][1]), "numpy's global random state changed"
    assert now[2][2] == before[2][2], "numpy's global random state changed"


def _assert_near(found: float, wanted: float, what: str) -> None:
    allowed = 1e-6 * max(1.0, abs(wanted))
    assert abs(found - wanted) < allowed, f"{what}: gradient {found}, finite difference {wanted}"
