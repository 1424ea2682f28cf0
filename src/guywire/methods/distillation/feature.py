"""Feature distillation: keep the representation of new data where the old model had it.

For whoever wants to hold what a network computes rather than its weights, whatever its head is.
Each batch also goes through a frozen copy of the model, and the features at one layer are held to
the copy's:

    L_FeatKD = mean over the batch of || f(x) - fhat(x) ||_2^2

f, fhat: the features of student and teacher at the layer; by default the penultimate ones, i.e.
what goes into the last ``nn.Linear``. On its own it did not help class-incremental learning in the
paper (about 8 % where prediction distillation had 25 %), and added to the latter it took from it.

Source: Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", arXiv 2203.17269
(L_FeatKD; the choice of the layer and the mean over the batch are ours).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import batches, exchange
from guywire.core.aside import aside, is_aside, listener
from guywire.core.errors import CheckpointError, DataError, SelectionError, UsageError
from guywire.core.regularizer import Regularizer, Strength, strength_at
from guywire.methods.distillation import _teacher

__all__ = ["FeatureDistillation", "feature_distillation_loss"]

Side = Literal["input", "output"]


def feature_distillation_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the squared distance of two batches of features, summed inside each sample.

    Args:
        student: ``[batch, ...]``.
        teacher: the same shape; gets no gradient.
        mask: ``[batch, length]`` for features ``[batch, length, width]``: zero where padding is.

    Returns:
        The mean over the batch (0-d).

    Raises:
        DataError: the shapes differ.

    Example:
        >>> feature_distillation_loss(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2))
        tensor(13.)
    """
    if student.shape != teacher.shape:
        raise DataError(
            f"features of shape {tuple(student.shape)} cannot be held to {tuple(teacher.shape)}: "
            "distil a layer whose width does not change"
        )
    squares = (student - teacher.detach()).square()
    if mask is not None and squares.dim() == 3 and mask.shape == squares.shape[:2]:
        squares = squares * mask.unsqueeze(-1).to(squares.dtype)
    return squares.flatten(1).sum(1).mean()


@final
class FeatureDistillation(Regularizer):
    """Hold the features at one layer to those of the model at the end of the last task.

    There is no teacher, and nothing is added, until the first ``consolidate``. Add
    ``wires.loss(batch, outputs)`` to the loss; the student's features are those of the forward pass
    that gave ``outputs``. Where they were not seen (no ``outputs``, or a model compiled before it
    was attached) the model runs once more.

    The teacher is a deep copy of the model; under FSDP2 it is shards, which trade places with the
    model's while it answers, so that every process must call ``wires.loss`` alike.

    Args:
        strength: weight of the term; a number or a schedule ``step -> number``. At 0 the teacher is
            not run.
        layer: name of a module; by default the last ``nn.Linear`` in module order (of a growing
            head, its last block).
        at: the module's first ``"input"`` or its ``"output"``.

    Raises:
        SelectionError: at attach, if there is no such layer.
        UsageError: at attach, if another argument makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> wires = gw.attach(model, optimizer, gw.FeatureDistillation(10.0))
        >>> wires.consolidate()
        >>> batch = torch.randn(8, 3), torch.arange(8) % 2
        >>> wires.loss(batch, model(batch[0])).item()  # student and teacher agree
        0.0
    """

    slug: ClassVar[str] = "rehearsal-free-cl"
    title: ClassVar[str] = "A Closer Look at Rehearsal-Free Continual Learning"
    arxiv: ClassVar[str] = "2203.17269"
    place: ClassVar[str] = "loss"
    memory: ClassVar[str] = "1"
    passes: ClassVar[str] = "1 forward a step"

    def __init__(
        self, strength: Strength = 1.0, *, layer: str | None = None, at: Side = "input"
    ) -> None:
        self.strength = strength
        self.layer = layer
        self.at: Side = at
        self.teacher_: _teacher.Teacher | None = None
        self._model: nn.Module | None = None
        self._seen: _Capture | None = None

    def setup(self, model: nn.Module) -> None:
        """Bind to the model and listen at the layer.

        Args:
            model: the user's module.

        Raises:
            SelectionError: there is no such layer.
            UsageError: an argument makes no sense.
        """
        strength_at(self.strength, 0)
        if self.at not in ("input", "output"):
            raise UsageError(f"at={self.at!r} is neither 'input' nor 'output'")
        self._seen = _Capture(_find(model, self.layer), self.at)
        self._model = model
        if self.teacher_ is not None:
            self.teacher_ = _teacher.move(self.teacher_, model)

    def loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """Return the distillation term of a batch.

        Args:
            batch: the batch, of new data.
            outputs: what the model returned for it; ``None`` runs the model once more.

        Returns:
            A 0-d tensor, or ``None`` before the first ``consolidate`` or at strength 0.

        Raises:
            DataError: the layer did not run, or its features changed their width.
        """
        if self._seen is None or self._model is None:
            return None
        # Taken whatever comes, so that no graph outlives its batch.
        student = self._seen.take()
        wires = getattr(self, "_wires", None)
        strength = strength_at(self.strength, 0 if wires is None else wires.steps)
        if self.teacher_ is None or strength == 0.0:
            return None
        if outputs is None or student is None or student.shape[0] != batches.size_of(batch):
            student, outputs = self._run(self._model, batch)
        if isinstance(self.teacher_, _teacher.Shards):
            student = exchange.through(student, outputs)
        with torch.no_grad(), _teacher.teaching(self.teacher_, self._model) as old:
            teacher, _ = self._run(old, batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return strength * feature_distillation_loss(student, teacher, mask)

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Take the model as it is for the teacher.

        Args:
            model: the user's module.
            data: not used.

        Raises:
            AttachError: the model cannot be copied.
        """
        if self._seen is not None:
            self._seen.take()
        self.teacher_ = _teacher.freeze(model)

    def teardown(self) -> None:
        """Stop listening and let go of the model; the teacher stays."""
        if self._seen is not None:
            self._seen.remove()
        self._seen = self._model = None

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's tensors.

        Returns:
            The state.
        """
        return {"teacher": None if self.teacher_ is None else _teacher.tensors_of(self.teacher_)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the teacher as a copy of the attached model with the saved tensors.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: no model is attached, or the saved teacher does not fit it.
        """
        saved = state["teacher"]
        if saved is not None and self._model is None:
            raise CheckpointError("a teacher is rebuilt from the attached model: attach first")
        if saved is None or self._model is None:
            self.teacher_ = None
        else:
            # A head that grew since then does not change what goes into it.
            self.teacher_ = _teacher.rebuild(self._model, saved, grown=True)

    def _run(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        probe = _Capture(_find(model, self.layer), self.at, ours=True)
        try:
            with aside():
                outputs = batches.forward(model, batch)
            features = probe.take()
        finally:
            probe.remove()
        if features is None:
            layer = "the last nn.Linear" if self.layer is None else repr(self.layer)
            raise DataError(
                f"{layer} was not called in the forward pass: name another layer "
                "(parts of nn.MultiheadAttention, for one, are read but never called)"
            )
        return features, outputs


class _Capture:
    """Keep what last went into a module, or came out, in a forward pass with autograd."""

    def __init__(self, module: nn.Module, at: Side, *, ours: bool = False) -> None:
        self.features: Tensor | None = None

        @listener
        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            # Deaf to copies of the module, to evaluations, and to passes of other methods.
            if called is not module or (not ours and (is_aside() or not torch.is_grad_enabled())):
                return
            inputs = (*args, *kwargs.values())
            value = inputs[0] if at == "input" and inputs else output
            if isinstance(value, tuple | list) and value:
                value = value[0]
            if isinstance(value, Tensor):
                self.features = value

        self._handle = module.register_forward_hook(hook, with_kwargs=True)

    def take(self) -> Tensor | None:
        features, self.features = self.features, None
        return features

    def remove(self) -> None:
        self._handle.remove()
        self.features = None


def _find(model: nn.Module, layer: str | None) -> nn.Module:
    if layer is None:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise SelectionError(
                "the model has no nn.Linear: name the layer whose features to hold"
            )
        return linear[-1]
    modules = dict(model.named_modules())
    if layer not in modules:
        near = difflib.get_close_matches(layer, modules, 3, 0.3) or list(modules)[1:4]
        raise SelectionError(f"the model has no module {layer!r}; near misses: {', '.join(near)}")
    return modules[layer]
