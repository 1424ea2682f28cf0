"""GEM: turn each step so that, to first order, it raises the loss of no past task.

For whoever keeps a few samples of every task and wants a constraint rather than a second loss. With
g the gradient of this step and rows g_n of G the gradients on the memory of past task n:

    if all <g, g_n> >= 0:  nothing changes, bit for bit
    otherwise:             g~ = g + G^T v,   v = argmin_{v >= gamma} 1/2 v^T (G G^T + ridge I) v + (G g)^T v

gamma, the margin, pushes the step further towards the past tasks than the constraint asks. The
problem has one variable a past task; it is solved exactly, by an active set method in float64.

Source: Lopez-Paz, Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840;
settings as in De Lange, van de Ven, Tuytelaars, arXiv 2205.13452.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, distributed, nn

from guywire.core import _rows, batches, losses, selection, tensors
from guywire.core.aside import undisturbed
from guywire.core.errors import NonFiniteError, UsageError
from guywire.core.processes import data_parallel
from guywire.core.regularizer import Regularizer, Step
from guywire.core.tensors import Tensors
from guywire.methods.rehearsal.replay import Criterion

__all__ = ["GEM", "gem_project", "gem_weights"]


def gem_weights(gram: Tensor, products: Tensor, *, margin: float, ridge: float) -> Tensor | None:
    """Return the weights v of the past tasks' gradients, or ``None`` if no constraint is violated.

    Args:
        gram: ``G G^T``, ``[k, k]``.
        products: ``G g``, ``[k]``.
        margin: gamma, at least 0.
        ridge: added to the diagonal, at least 0.

    Returns:
        ``[k]``, float64, or ``None``.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.

    Example:
        >>> gem_weights(torch.tensor([[4.0]]), torch.tensor([-2.0]), margin=0.0, ridge=0.0)
        tensor([0.5000], dtype=torch.float64)
    """
    if not bool(torch.isfinite(gram).all() and torch.isfinite(products).all()):
        raise NonFiniteError(
            "a gradient is NaN or infinite, on this batch or on the memory of a past task: "
            "lower the learning rate, or look at the data"
        )
    if not bool((products < 0).any()):
        return None
    hessian = gram.detach().double().cpu().numpy()
    hessian = 0.5 * (hessian + hessian.T) + ridge * np.eye(len(hessian))
    linear = products.detach().double().cpu().numpy()
    # With u = v - gamma the bounds are u >= 0.
    shifted = _nonnegative_minimum(hessian, linear + margin * hessian.sum(1))
    return torch.from_numpy(shifted + margin)


def gem_project(
    gradient: Mapping[str, Tensor],
    memories: Sequence[Mapping[str, Tensor]],
    *,
    margin: float = 0.5,
    ridge: float = 1e-3,
) -> Tensors:
    """Return the projected gradient g~.

    Args:
        gradient: names to this step's gradient.
        memories: for every past task, names to its gradient.
        margin: gamma.
        ridge: added to the diagonal of the small problem.

    Returns:
        Names to tensors: the gradient itself where no constraint is violated.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.

    Example:
        >>> g, h = {"w": torch.tensor([1.0, -1.0])}, {"w": torch.tensor([0.0, 2.0])}
        >>> gem_project(g, [h], margin=0.0, ridge=0.0)
        {'w': tensor([1., 0.])}
    """
    gram, products = _products(gradient, memories)
    weights = gem_weights(gram, products, margin=margin, ridge=ridge)
    if weights is None:
        return dict(gradient)
    out = {name: g.clone() for name, g in gradient.items()}
    for v, memory in zip(weights.tolist(), memories, strict=True):
        for name, h in memory.items():
            out[name].add_(h, alpha=v)
    return out


@final
class GEM(Regularizer):
    """Project every step's gradient on those that agree with the memories of all past tasks.

    Nothing happens until the first ``consolidate(data)``, which keeps the first samples of the task
    that ends. Every step then costs one forward and backward on each past task's memory, in the
    train mode that the model is in; buffers, dropout's random state and gradients are left alone.

    Under DDP and FSDP2 the memories' gradients are averaged over the processes, so that all project
    alike: every process must have consolidated the same number of tasks. Under FSDP2 they are sharded
    as the parameters are, and a step sends the traffic of one more training step a past task.

    Args:
        memory_per_task: samples kept of each task.
        margin: gamma, at least 0.
        criterion: ``(logits, labels) -> mean loss``; cross entropy if ``None``.
        ridge: added to the diagonal of the small problem.
        select: which parameters' gradients are projected, see :func:`guywire.select`.

    Raises:
        SelectionError: at attach, if the selection matches nothing.
        UsageError: at attach, if an argument makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> gem = gw.GEM(memory_per_task=8, margin=0.0)
        >>> wires = gw.attach(model, optimizer, gem)
        >>> x = torch.randn(8, 3)
        >>> wires.consolidate([(x, torch.zeros(8, dtype=torch.long))])
        >>> nn.functional.cross_entropy(model(x), torch.ones(8, dtype=torch.long)).backward()
        >>> optimizer.step()  # the very opposite of the old task
        >>> gem.violated_
        1
    """

    slug: ClassVar[str] = "stability-gap"
    title: ClassVar[str] = "Gradient Episodic Memory for Continual Learning"
    arxiv: ClassVar[str] = "1706.08840"
    place: ClassVar[str] = "step"
    memory: ClassVar[str] = "1 a past task, and the samples"
    passes: ClassVar[str] = "1 forward and backward a past task, a step"
    per_process: ClassVar[bool] = True

    def __init__(
        self,
        memory_per_task: int = 256,
        *,
        margin: float = 0.5,
        criterion: Criterion | None = None,
        ridge: float = 1e-3,
        select: selection.Selection = None,
    ) -> None:
        self.memory_per_task = memory_per_task
        self.margin = margin
        self.criterion = criterion
        self.ridge = ridge
        self.select = select
        self.memories_: list[Any] = []
        self.violated_ = 0
        """Constraints that the last step violated before it was projected."""
        self.stability_norm_ = 0.0
        """Norm of what the projection added, ``||g~ - g||``, in the last step."""
        self.cosine_ = float("nan")
        """Cosine of that with the step's own gradient; NaN where nothing was added."""
        self._model: nn.Module | None = None
        self._params: dict[str, nn.Parameter] = {}

    def setup(self, model: nn.Module) -> None:
        """Bind to the model.

        Args:
            model: the user's module.

        Raises:
            UsageError: an argument makes no sense.
        """
        if self.memory_per_task < 1:
            raise UsageError(f"memory_per_task={self.memory_per_task} must be at least 1 sample")
        if not 0.0 <= self.margin < float("inf") or not 0.0 <= self.ridge < float("inf"):
            raise UsageError(
                f"margin={self.margin} and ridge={self.ridge} must be finite and at least 0"
            )
        self._params = selection.select(model, self.select)
        self._model = model

    def before_step(self, step: Step) -> None:
        """Project the gradients, if a constraint is violated.

        Args:
            step: the step that is about to happen.

        Raises:
            NonFiniteError: a gradient is NaN or infinite.
        """
        self.violated_, self.stability_norm_, self.cosine_ = 0, 0.0, float("nan")
        if step.skipped or not self.memories_:
            return
        params = {name: p for name, p in self._params.items() if step.owns(p)}
        memories = [self._gradient(memory, params) for memory in self.memories_]
        # Fused optimisers under AMP divide by the scale inside their step: measure without it.
        gradient = {n: p.grad for n, p in params.items() if p.grad is not None}
        gram, products = _products(gradient, memories)
        products = products / step.scale
        weights = gem_weights(gram, products, margin=self.margin, ridge=self.ridge)
        if weights is None:
            return
        self._note(gradient, gram, products, weights, step.scale)
        for v, memory in zip(weights.tolist(), memories, strict=True):
            for name, h in memory.items():
                parameter = params[name]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                tensors.local(parameter.grad).add_(tensors.local(h), alpha=v * step.scale)

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Keep the first samples of the task that ends.

        Args:
            model: the user's module.
            data: batches of the task.

        Raises:
            UsageError: there is no data.
        """
        if data is None:
            raise UsageError("GEM keeps samples of each task: wires.consolidate(loader)")
        store, held = _rows.Store(self.memory_per_task), 0
        for batch in data:
            kind, fields = _rows.apart(batch)
            taken = {n: v[: self.memory_per_task - held] for n, v in fields.items()}
            count = len(taken["labels"])
            store.write(torch.arange(held, held + count), kind, taken)
            held += count
            if held == self.memory_per_task:
                break
        if held == 0:
            raise UsageError("the task that ends has no samples: pass a list or a DataLoader")
        self.memories_.append(store.batch(torch.arange(held)))
        self._params = selection.select(model, self.select)

    def teardown(self) -> None:
        """Let go of the model; the memories stay."""
        self._model = None
        self._params = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the memories.

        Returns:
            The state.
        """
        parts = [_rows.apart(memory) for memory in self.memories_]
        return {"memories": [{"kind": kind, "fields": fields} for kind, fields in parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the memories back.

        Args:
            state: from ``state_dict``.
        """
        self.memories_ = [
            _rows.together(m["kind"], {n: v.clone() for n, v in m["fields"].items()})
            for m in state["memories"]
        ]

    def _gradient(self, memory: Any, params: Mapping[str, nn.Parameter]) -> Tensors:
        assert self._model is not None
        memory = batches.to(memory, batches.device_of(self._model))
        if any(hasattr(p, "device_mesh") for p in params.values()):
            return self._sharded_gradient(memory, params)
        with undisturbed(self._model), torch.enable_grad():
            grads = torch.autograd.grad(
                self._loss(memory), list(params.values()), allow_unused=True
            )
        found = {n: g for n, g in zip(params, grads, strict=True) if g is not None}
        return self._averaged(found)

    def _sharded_gradient(self, memory: Any, params: Mapping[str, nn.Parameter]) -> Tensors:
        # FSDP2 reduces and scatters in a backward pass that accumulates, and in no other: the
        # step's own gradients make room for it. (The shards are listed before the forward pass,
        # which may leave whole parameters in their place.)
        assert self._model is not None
        every = [(p, p.grad) for p in self._model.parameters()]
        try:
            for p, _ in every:
                p.grad = None
            with undisturbed(self._model), torch.enable_grad():
                self._loss(memory).backward()
            return {n: p.grad for n, p in params.items() if p.grad is not None}
        finally:
            for p, own in every:
                p.grad = own

    def _loss(self, memory: Any) -> Tensor:
        assert self._model is not None
        logits = batches.logits_of(batches.forward(self._model, memory))
        labels = batches.labels_of(memory)
        if self.criterion is None:
            return losses.cross_entropy_of(self._model, logits, labels)
        return self.criterion(logits, labels)

    def _averaged(self, gradient: Tensors) -> Tensors:
        wires = getattr(self, "_wires", None)
        wrapper = data_parallel(getattr(wires, "model", None))
        if wrapper is None:
            return gradient
        flat = torch.cat([g.flatten() for g in gradient.values()])
        distributed.all_reduce(flat, group=wrapper.process_group)
        flat /= distributed.get_world_size(wrapper.process_group)
        parts = flat.split([g.numel() for g in gradient.values()])
        return {n: part.view_as(gradient[n]) for n, part in zip(gradient, parts, strict=True)}

    def _note(
        self, gradient: Tensors, gram: Tensor, products: Tensor, weights: Tensor, scale: float
    ) -> None:
        v, gram, products = weights, gram.double().cpu(), products.double().cpu()
        self.violated_ = int((products < 0).sum())
        self.stability_norm_ = max(0.0, float(v @ gram @ v)) ** 0.5
        squares = ((g, tensors.local(g).double().square().sum()) for g in gradient.values())
        total = tensors.reduce_shards(squares)
        norm = 0.0 if total is None else float(total) ** 0.5 / scale
        if norm > 0.0 and self.stability_norm_ > 0.0:
            self.cosine_ = float(v @ products) / (norm * self.stability_norm_)


def _products(
    gradient: Mapping[str, Tensor], memories: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return ``G G^T`` and ``G g`` in float64; a name that one side lacks counts as zero there."""
    total = tensors.reduce_shards(_local_products(gradient, memories))
    if total is None:
        total = torch.zeros(len(memories), len(memories) + 1, dtype=torch.float64)
    return total[:, :-1], total[:, -1]


def _local_products(
    gradient: Mapping[str, Tensor], memories: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, of every tensor, ``[G G^T, G g]`` (``[k, k + 1]``) over this process's part of it."""
    count = len(memories)
    for name in dict.fromkeys(n for memory in memories for n in memory):
        tensor = next(memory[name] for memory in memories if name in memory)
        rows = [memory.get(name) for memory in (*memories, gradient)]
        there = tensors.local(tensor).device
        out = torch.zeros(count, count + 1, dtype=torch.float64, device=there)
        for i, a in enumerate(rows[:-1]):
            for j, b in enumerate(rows):
                if a is None or b is None or i < j < count:
                    continue
                out[i, j] = _inner(a, b)
                if j < count:
                    out[j, i] = out[i, j]
        yield tensor, out


def _inner(a: Tensor, b: Tensor) -> Tensor:
    a, b = (tensors.local(t).flatten().double() for t in (a, b))
    return torch.dot(a, b)


def _nonnegative_minimum(hessian: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """Return ``argmin_{u >= 0} 1/2 u^T H u + c^T u`` by an active set method (Lawson, Hanson).

    Exact after finitely many steps: a variable leaves the bound where the cost falls fastest, the
    free ones are minimised together, and those that would turn negative go back to the bound.
    """
    count = len(linear)
    u, free = np.zeros(count), np.zeros(count, dtype=bool)
    tolerance = 1e-12 * max(1.0, float(np.abs(linear).max()))
    for _ in range(10 * count + 10):
        fall = -(hessian @ u + linear)
        fall[free] = -np.inf
        if free.all() or fall.max() <= tolerance:
            break
        free[int(fall.argmax())] = True
        while free.any():
            target = np.zeros(count)
            # Least squares rather than solve: without a ridge, equal gradients make H singular.
            block = hessian[np.ix_(free, free)]
            target[free] = np.linalg.lstsq(block, -linear[free], rcond=None)[0]
            wrong = free & (target <= 0.0)
            if not wrong.any():
                u = target
                break
            ratio = np.full(count, np.inf)
            ratio[wrong] = u[wrong] / np.maximum(u[wrong] - target[wrong], 1e-300)
            u = u + ratio.min() * (target - u)
            free &= ratio > ratio.min()
            u[~free] = 0.0
    return u
