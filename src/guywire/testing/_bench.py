"""The little world in which the conformance suite tries a regularizer: models, data, a loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core.attach import Wires, attach
from guywire.core.regularizer import Regularizer

CLASSES = 4
Batch = tuple[Tensor, Tensor]

_dress: ContextVar[Callable[[nn.Module], nn.Module] | None] = ContextVar("dress", default=None)
_drive: ContextVar[Callable[[Any], torch.optim.Optimizer] | None] = ContextVar(
    "drive", default=None
)


@contextlib.contextmanager
def dressed_as(factory: Callable[..., Any]) -> Iterator[None]:
    """Within, models and optimisers are those that the factory of a regularizer wants."""
    tokens = (
        _dress.set(getattr(factory, "dress", None)),
        _drive.set(getattr(factory, "drive", None)),
    )
    try:
        yield
    finally:
        _dress.reset(tokens[0])
        _drive.reset(tokens[1])


class Plain(nn.Module):
    """Layers whose output for a sample does not depend on the others in its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, CLASSES]`` for ``x [B, 6]``."""
        return self.head(self.second(self.norm(self.first(x)).tanh()).tanh())


class Corners(nn.Module):
    """Tied, frozen, unused and 0-d parameters, BatchNorm buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.tied.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, CLASSES]`` for ``x [B, 6]``."""
        hidden = self.norm(self.first(x)).tanh()
        hidden = self.frozen(self.again(self.tied(hidden).tanh()).tanh())
        return self.head(self.gain * hidden)


def build(kind: type[nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return a model with weights that depend on the seed only, not on the global random state."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = kind()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.copy_(noise / p.shape[-1] ** 0.5)
        dress = _dress.get()
        if dress is not None:
            model = dress(model)
    return model.to(dtype)


def task(number: int, dtype: torch.dtype = torch.float64, batches: int = 3) -> list[Batch]:
    """Return the batches of a task: its own inputs, its own two of the four classes."""
    generator = torch.Generator().manual_seed(100 + number)
    made = []
    for _ in range(batches):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64) + number
        y = torch.randint(2, (8,), generator=generator) + 2 * (number % 2)
        made.append((x.to(dtype), y))
    return made


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the loop, in at least float32."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return nn.functional.cross_entropy(outputs.to(dtype), labels)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of the checks: SGD with momentum, unless a factory names another."""
    drive = _drive.get()
    if drive is not None:
        return drive(model.parameters())
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def still(model: nn.Module) -> torch.optim.Optimizer:
    """Return the same optimiser with learning rate 0 and, for SGD, without momentum."""
    drive = _drive.get()
    if drive is None:
        return torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = drive(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    wires: Wires | None,
    data: Iterable[Batch],
    *,
    pieces: int = 1,
    share: Callable[[Tensor], Tensor] = lambda part: part,
) -> list[float]:
    """Train on batches as a user's loop would; return the losses.

    Args:
        model: any.
        optimizer: its optimiser.
        wires: attached to both, or ``None``.
        data: batches.
        pieces: micro-batches a step.
        share: takes this process's part of a batch.

    Returns:
        The loss of each step, without step-side penalties.
    """
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        total = 0.0
        parts = zip(share(x).chunk(pieces), share(y).chunk(pieces), strict=True)
        for piece in parts:
            outputs = model(piece[0])
            loss = loss_of(outputs, piece[1])
            if wires is not None:
                loss = loss + wires.loss(piece, outputs)
            (loss / pieces).backward()
            total += float(loss.detach()) / pieces
        optimizer.step()
        losses.append(total)
    return losses


def two_tasks(
    regularizer: Regularizer | None,
    model: nn.Module,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[float]:
    """Train through two tasks with a fresh optimiser each; return all losses."""
    losses = []
    for number in range(2):
        optimizer = sgd(model)
        data = task(number, dtype)
        wires = None if regularizer is None else attach(model, optimizer, regularizer)
        losses += train(model, optimizer, wires, data * 3, **options)
        if wires is not None:
            wires.consolidate(data)
            wires.detach()
    return losses


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Compare two states, bit for bit if the tolerance is 0."""
    assert one.keys() == two.keys(), f"names differ: {sorted(one.keys() ^ two.keys())}"
    for name, value in one.items():
        if tolerance == 0.0:
            assert torch.equal(value, two[name]), f"{name!r} differs"
        else:
            torch.testing.assert_close(
                value, two[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
