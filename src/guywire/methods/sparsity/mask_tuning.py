"""Mask tuning: learn which weights to switch off, and keep the original's predictions meanwhile.

For whoever adapts a pretrained model, such as CLIP, from a few labelled images and wants to lose
little of what it knows. All weights stay frozen; :func:`guywire.mask` puts real scores on some of
them, and the task's gradient moves the scores. *Gradient dropout* drops entries of that gradient at
random where they disagree with keeping the original's predictions:

    P = (1 + sgn(g_a) (g_a + g_b) / (|g_a| + |g_b|)) / 2
    g = ((1 - l) + l * [P > U]) * g_a,      U uniform in [0, 1), fresh for each step and entry

g_a: the gradient of the task's loss by the scores; g_b: that of the cross entropy to the unmasked
model's predictions (KL divergence up to a constant); l: the strength, 0 for plain mask tuning and 1
for hard dropout. g_b only gates and never enters the update. Where the signs agree P is 1, else
``|g_a| / (|g_a| + |g_b|)``. A small norm term, ``1e-4 * sum |m|_2``, joins the loss.

Source: Zheng et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained
Vision-Language Models", ICCV 2023, arXiv 2307.15049; the norm term is in its code.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, distributed, nn

from guywire.core import batches
from guywire.core.aside import aside, undisturbed
from guywire.core.errors import AttachError, SelectionError, UsageError
from guywire.core.processes import data_parallel
from guywire.core.regularizer import Regularizer, Step, Strength, strength_at
from guywire.core.tensors import Tensors
from guywire.methods.sparsity.masks import masked_weights, unmasked

__all__ = ["MaskTuning", "gradient_dropout", "keep_probability", "prediction_drift"]


def keep_probability(task: Tensor, original: Tensor) -> Tensor:
    """Return the probability with which an entry of the task's gradient is kept.

    Without the paper's code's ``1e-8`` in the denominator, which makes tiny gradients a coin flip.

    Args:
        task: g_a.
        original: g_b, of the same shape.

    Returns:
        P in [0, 1]; 1/2 where both gradients are 0.

    Example:
        >>> keep_probability(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([3.0, -3.0, 0.0]))
        tensor([1.0000, 0.2500, 1.0000])
    """
    size = task.abs() + original.abs()
    agreement = task.sign() * (task + original) / torch.where(size > 0, size, 1.0)
    return 0.5 * (1.0 + agreement)


def gradient_dropout(
    task: Tensor, original: Tensor, uniform: Tensor, strength: float = 1.0
) -> Tensor:
    """Return the task's gradient after dropping what disagrees with the original's predictions.

    Args:
        task: g_a.
        original: g_b, of the same shape.
        uniform: U, draws from [0, 1), of the same shape.
        strength: l in [0, 1].

    Returns:
        ``((1 - l) + l [P > U]) g_a``.

    Example:
        >>> task, original = torch.tensor([1.0, 1.0]), torch.tensor([-3.0, -3.0])  # P = 1/4
        >>> gradient_dropout(task, original, torch.tensor([0.1, 0.9]))
        tensor([1., 0.])
    """
    kept = (keep_probability(task, original) > uniform).to(task.dtype)
    return ((1.0 - strength) + strength * kept) * task


def prediction_drift(logits: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the cross entropy from the original's predictions to the present ones.

    Args:
        logits: ``[batch, ..., classes]``.
        original: the same shape; gets no gradient.
        temperature: T of both softmaxes; the result is scaled by T^2.

    Returns:
        The mean over the batch (0-d), in float32 at least; its gradient is 0 where they agree.

    Example:
        >>> prediction_drift(torch.zeros(1, 2), torch.zeros(1, 2))  # log 2
        tensor(0.6931)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    targets = (original.detach().to(dtype) / temperature).softmax(-1)
    logs = (logits.to(dtype) / temperature).log_softmax(-1)
    return -(targets * logs).sum(-1).mean() * temperature**2


@final
class MaskTuning(Regularizer):
    """Gate the gradient of a masked model's scores by the unmasked model's predictions.

    Mask the model first, give the scores to the optimiser, and add ``wires.loss(batch, outputs)`` to
    the loss: besides returning the small norm term it takes g_b on the graph of ``outputs``, so call
    it before ``backward``, once for every batch, and inside the same autocast. The original is the
    model itself with its masks off, so there is no copy. Several micro-batches a step are averaged by
    their sizes; under DDP g_b is averaged over the processes before gating, and all draw the same U.

    Do not clip gradients (set ``max_grad_norm=0`` in the Hugging Face ``Trainer``): P compares their
    sizes. Keep BatchNorm in eval mode, as its statistics belong to the frozen original. Modules
    sharded by ``fully_shard`` (FSDP2) are refused.

    Args:
        strength: l in [0, 1], or a schedule ``step -> number``; at 0 the original is not run. The
            paper's code uses 0.3 and 1.
        norm: weight of the norm term.
        temperature: of the predictions.
        seed: of U.

    Raises:
        SelectionError: at attach, if the model has no masks.
        AttachError: at attach, if the model is sharded.
        UsageError: at attach, if an argument makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(3, 2)  # stands for a pretrained one
        >>> scores = gw.mask(model, "weight")
        >>> optimizer = torch.optim.Adam(scores.values(), lr=1e-3)
        >>> batch = torch.randn(8, 3), torch.arange(8) % 2
        >>> with gw.attach(model, optimizer, gw.MaskTuning()) as wires:
        ...     for _ in range(20):
        ...         outputs = model(batch[0])
        ...         loss = nn.functional.cross_entropy(outputs, batch[1]) + wires.loss(
        ...             batch, outputs
        ...         )
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> type(gw.fold_mask(model)) is nn.Linear
        True
    """

    slug: ClassVar[str] = "mask-tuning"
    title: ClassVar[str] = (
        "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models"
    )
    arxiv: ClassVar[str] = "2307.15049"
    place: ClassVar[str] = "weight"
    memory: ClassVar[str] = "2"
    passes: ClassVar[str] = "1 forward and 1 backward a step"

    def __init__(
        self,
        strength: Strength = 1.0,
        *,
        norm: float = 1e-4,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.strength = strength
        self.norm = norm
        self.temperature = temperature
        self.seed = seed
        self.steps_ = 0
        self._model: nn.Module | None = None
        self._scores: dict[str, nn.Parameter] = {}
        self._original: Tensors = {}
        self._weight = 0.0

    def setup(self, model: nn.Module) -> None:
        """Bind to the masks of a model.

        Args:
            model: the user's module.

        Raises:
            SelectionError: it has no masks, or their scores are frozen.
            AttachError: it is sharded.
            UsageError: an argument makes no sense.
        """
        self._strength_at(0)
        if self.norm < 0.0 or not self.temperature > 0.0:
            raise UsageError(
                f"norm={self.norm} must be at least 0 and temperature={self.temperature} positive"
            )
        masks = masked_weights(model)
        if not masks:
            raise SelectionError("the model has no masks: call gw.mask(model) before attach")
        scores = {name: one.scores for name, one in masks.items() if one.scores.requires_grad}
        if not scores:
            raise SelectionError(
                "the scores of all masks are frozen: set requires_grad=True on them"
            )
        if any(hasattr(p, "device_mesh") for p in model.parameters()):
            raise AttachError(
                "mask tuning takes a second gradient on the graph of the loss, which modules "
                "sharded by fully_shard do not give: use DDP for it"
            )
        self._model, self._scores = model, scores
        self._forget()

    def loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """Take g_b of a batch, and return the norm term.

        Args:
            batch: the batch.
            outputs: what the model returned for it; ``None`` runs the model once more.

        Returns:
            ``norm * sum |m|_2`` (0-d), or ``None`` without autograd or with ``norm=0``.
        """
        if self._model is None or not torch.is_grad_enabled():
            return None
        wires = getattr(self, "_wires", None)
        if self._strength_at(0 if wires is None else wires.steps) > 0.0:
            self._add_original(self._model, batch, outputs)
        if self.norm == 0.0:
            return None
        norms = [torch.linalg.vector_norm(p) for p in self._scores.values()]
        return self.norm * torch.stack([one.to(norms[0]) for one in norms]).sum()

    def before_step(self, step: Step) -> None:
        """Drop entries of the scores' gradient.

        Args:
            step: the step that is about to happen.

        Raises:
            UsageError: ``wires.loss`` was not called since the last step.
        """
        strength = self._strength_at(step.number)
        moving = [n for n, p in self._scores.items() if p.grad is not None and step.owns(p)]
        if strength == 0.0 or not moving:
            self._forget()
            return
        if self._weight == 0.0:
            raise UsageError(
                "MaskTuning has no gradient of the original's predictions to gate with: add "
                "wires.loss(batch, outputs) to the loss of every batch"
            )
        original = self._averaged()
        draws = _Uniform(self.seed, self.steps_)
        for name, p in self._scores.items():
            uniform = draws.like(p)  # for every mask, so that U depends on nothing but the step
            if name not in moving:
                continue
            grad = p.grad
            assert grad is not None
            task = grad.to(original[name].dtype) / step.scale
            kept = gradient_dropout(task, original[name], uniform, strength)
            grad.copy_(kept * step.scale)
        self._forget()

    def after_step(self, step: Step) -> None:
        """Count, so that the next step draws another U.

        Args:
            step: the step that has happened.
        """
        self.steps_ += 1

    def teardown(self) -> None:
        """Let go of the model."""
        self._model, self._scores = None, {}
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were drawn for; masks and scores are the model's own state.

        Returns:
            The state.
        """
        return {"steps": self.steps_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: the tree.
        """
        self.steps_ = int(state["steps"])

    def _strength_at(self, number: int) -> float:
        strength = strength_at(self.strength, number)
        if strength > 1.0:
            raise UsageError(f"strength is {strength}: the share of gradient dropout is at most 1")
        return strength

    def _add_original(self, model: nn.Module, batch: Any, outputs: Any) -> None:
        # Gradients that are gone without a step (AMP skipped it) take their g_b with them.
        if self._weight > 0.0 and _is_clean(self._scores.values()):
            self._forget()
        with torch.no_grad(), unmasked(model), undisturbed(model, mode=False):
            original = batches.logits_of(batches.forward(model, batch))
        grads = None
        if outputs is not None:
            grads = self._gradient(batches.logits_of(outputs), original)
        if grads is None:
            with aside():
                again = batches.logits_of(batches.forward(model, batch))
            grads = self._gradient(again, original)
            assert grads is not None
        weight = float(batches.size_of(batch))
        for (name, p), grad in zip(self._scores.items(), grads, strict=True):
            if name not in self._original:
                dtype = torch.promote_types(p.dtype, torch.float32)
                self._original[name] = torch.zeros_like(p, dtype=dtype)
            if grad is not None:
                self._original[name].add_(grad, alpha=weight)
        self._weight += weight

    def _gradient(self, logits: Tensor, original: Tensor) -> tuple[Tensor | None, ...] | None:
        # In float16 small gradients vanish unless scaled; the user's own scale is out of reach here.
        factor = 2.0**10 if logits.dtype == torch.float16 else 1.0
        drift = factor * prediction_drift(logits, original, self.temperature)
        try:
            grads = torch.autograd.grad(
                drift, list(self._scores.values()), retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            # torch.compile's backward frees its buffers as it goes, so its graph serves only once.
            if "donated buffers" in str(error):
                return None
            raise
        if factor == 1.0:
            return grads
        return tuple(
            None if g is None else (g.float() / factor).nan_to_num(0.0, 0.0, 0.0) for g in grads
        )

    def _averaged(self) -> Tensors:
        """Return g_b of the step: the mean over micro-batches, and over processes."""
        original = {name: total / self._weight for name, total in self._original.items()}
        wrapper = data_parallel(getattr(getattr(self, "_wires", None), "model", None))
        if wrapper is None:
            return original
        group = wrapper.process_group
        world = distributed.get_world_size(group)
        # One call for all; dividing first keeps the sum's range that of one process.
        flat = torch.cat([one.reshape(-1) for one in original.values()]) / world
        distributed.all_reduce(flat, group=group)
        parts = flat.split([one.numel() for one in original.values()])
        return {
            name: part.view_as(one)
            for (name, one), part in zip(original.items(), parts, strict=True)
        }

    def _forget(self) -> None:
        self._original, self._weight = {}, 0.0


class _Uniform:
    """Draws of one step: the same on every process, whatever was drawn before."""

    def __init__(self, seed: int, step: int) -> None:
        state = np.random.SeedSequence([seed % 2**64, step]).generate_state(1, np.uint64)
        self._seed = int(state[0]) >> 1
        self._generators: dict[torch.device, torch.Generator] = {}

    def like(self, tensor: Tensor) -> Tensor:
        device = tensor.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(self._seed)
        return torch.rand(
            tensor.shape, generator=self._generators[device], device=device, dtype=torch.float32
        )


def _is_clean(scores: Any) -> bool:
    return all(p.grad is None or not bool(p.grad.any()) for p in scores)
