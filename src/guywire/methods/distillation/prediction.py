"""Prediction distillation (LwF and LwF.MC): keep answering for old classes as the old model did.

For whoever may not keep old data and learns new classes with the same head. Each batch of *new*
data also goes through a frozen copy of the model, taken when the last task ended, and the old
classes' outputs are held to the copy's.

    softmax:  CE(softmax(zhat / T), softmax(z / T)) over the old classes only     (mean over batch)
    sigmoid:  sum over old classes c of BCE(sigma(zhat_c), sigma(z_c))            (mean over batch)

z, zhat: logits of student and teacher; T: temperature, 2 by default and without a factor T^2. Both
softmaxes are over the old classes, so that the gradient is exactly zero where student and teacher
agree. The sigmoid form has no temperature.

With ``kind="sigmoid"`` the loop's own classification loss must cover the *new* classes only,
``gw.sigmoid_cross_entropy(logits, labels, classes=new)``: the teacher gives the targets of the old
ones. With ``kind="softmax"`` the paper's own loss is the cross entropy over all classes.

Source: Smith et al., arXiv 2203.17269 (L_PredKD and the BCE head); Li, Hoiem, "Learning without
Forgetting", arXiv 1606.09282; LwF.MC: Rebuffi et al., arXiv 1611.07725.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.aside import aside
from guywire.core.errors import CheckpointError, DataError, UsageError
from guywire.core.regularizer import Regularizer, Strength, strength_at
from guywire.methods.distillation import _teacher

__all__ = ["PredictionDistillation", "prediction_distillation_loss"]

Kind = Literal["softmax", "sigmoid"]


def prediction_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Kind = "softmax",
    temperature: float = 2.0,
) -> Tensor:
    """Return how far the student's answers for the old classes are from the teacher's.

    Args:
        student_logits: ``[..., classes]``, at least as many classes as the teacher's; columns
            beyond those are new classes and do not count.
        teacher_logits: ``[..., old classes]``.
        kind: ``"softmax"`` or ``"sigmoid"``.
        temperature: of the softmaxes; not used by ``"sigmoid"``.

    Returns:
        The mean over the batch (0-d). At equality it is the teacher's mean entropy (for
        ``"sigmoid"`` the summed binary entropies), with zero gradient.

    Raises:
        UsageError: the kind is unknown, or the temperature not positive.
        DataError: the student has fewer classes than the teacher.

    Example:
        >>> teacher = torch.zeros(1, 2)
        >>> prediction_distillation_loss(torch.zeros(1, 5), teacher)  # log 2
        tensor(0.6931)
        >>> prediction_distillation_loss(torch.zeros(1, 5), teacher, kind="sigmoid")  # 2 log 2
        tensor(1.3863)
    """
    old = teacher_logits.shape[-1]
    if student_logits.shape[-1] < old:
        raise DataError(
            f"the student has {student_logits.shape[-1]} classes, the teacher {old}: "
            "a head may grow but not shrink"
        )
    student, teacher = student_logits[..., :old], teacher_logits.detach()
    if kind == "sigmoid":
        targets = teacher.sigmoid().to(student.dtype)
        terms = F.binary_cross_entropy_with_logits(student, targets, reduction="none")
        return terms.sum(-1).mean()
    if kind != "softmax":
        raise UsageError(f"kind={kind!r} is neither 'softmax' nor 'sigmoid'")
    if not temperature > 0.0:
        raise UsageError(f"temperature={temperature} must be positive")
    targets = (teacher / temperature).softmax(-1)
    return -(targets * (student / temperature).log_softmax(-1)).sum(-1).mean()


@final
class PredictionDistillation(Regularizer):
    """Hold the predictions for old classes to those of the model at the end of the last task.

    There is no teacher, and nothing is added, until the first ``consolidate``. Old classes are all
    labels seen in the data of any ``consolidate``; without data, all outputs of the teacher. Add
    ``wires.loss(batch, outputs)`` to the loss. On sequences, tokens labelled -100 do not count.

    The teacher is a deep copy of the model; under FSDP2 it is shards, which trade places with the
    model's while it answers, so that every process must call ``wires.loss`` alike. Under DDP and
    FSDP2 old classes are those that any process saw.

    Args:
        strength: weight of the term; a number or a schedule ``step -> number``. At 0 the teacher is
            not run.
        kind: ``"softmax"`` (LwF), or ``"sigmoid"`` (LwF.MC), with which the loop's own loss must
            cover the new classes only (``gw.sigmoid_cross_entropy``).
        temperature: of the softmaxes.

    Raises:
        UsageError: at attach, if an argument makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(3, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> wires = gw.attach(model, optimizer, gw.PredictionDistillation())
        >>> old = torch.randn(8, 3), torch.arange(8) % 2
        >>> wires.consolidate([old])
        >>> new = torch.randn(8, 3), torch.arange(8) % 2 + 2
        >>> bool(wires.loss(new, model(new[0])) > 0)
        True
    """

    slug: ClassVar[str] = "rehearsal-free-cl"
    title: ClassVar[str] = "Learning without Forgetting"
    arxiv: ClassVar[str] = "1606.09282"
    place: ClassVar[str] = "loss"
    memory: ClassVar[str] = "1"
    passes: ClassVar[str] = "1 forward a step"

    def __init__(
        self, strength: Strength = 1.0, *, kind: Kind = "softmax", temperature: float = 2.0
    ) -> None:
        self.strength = strength
        self.kind: Kind = kind
        self.temperature = temperature
        self.teacher_: _teacher.Teacher | None = None
        self.old_classes_: Tensor | None = None
        self._model: nn.Module | None = None

    def setup(self, model: nn.Module) -> None:
        """Bind to the model.

        Args:
            model: the user's module.

        Raises:
            UsageError: an argument makes no sense.
        """
        strength_at(self.strength, 0)
        prediction_distillation_loss(
            torch.zeros(1, 1), torch.zeros(1, 1), kind=self.kind, temperature=self.temperature
        )
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
            DataError: an old class lies outside the teacher's outputs.
        """
        wires = getattr(self, "_wires", None)
        strength = strength_at(self.strength, 0 if wires is None else wires.steps)
        if self.teacher_ is None or self._model is None or strength == 0.0:
            return None
        with aside():
            if outputs is None:
                outputs = batches.forward(self._model, batch)
            with torch.no_grad(), _teacher.teaching(self.teacher_, self._model) as old:
                teacher = batches.logits_of(batches.forward(old, batch))
        student = batches.logits_of(outputs)
        if student.dim() > 2:
            counted = batches.labels_of(batch) != -100
            if counted.shape == student.shape[:-1]:
                student, teacher = student[counted], teacher[counted]
        if self.old_classes_ is not None:
            student, teacher = self._old(student), self._old(teacher)
        term = prediction_distillation_loss(
            student, teacher, kind=self.kind, temperature=self.temperature
        )
        return strength * term

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Take the model as it is for the teacher, and note the classes seen.

        Args:
            model: the user's module.
            data: batches of the task that ends; without them all outputs count as old.

        Raises:
            AttachError: the model cannot be copied.
            DataError: the data has no class labels.
        """
        everything = data is None or (self.teacher_ is not None and self.old_classes_ is None)
        wires = getattr(self, "_wires", None)
        whole = model if wires is None else wires.model  # DDP's wrapper says with whom to share
        classes = None if data is None or everything else _teacher.classes_in(data, whole)
        self.teacher_ = _teacher.freeze(model)
        if classes is not None and self.old_classes_ is not None:
            classes = torch.cat([self.old_classes_.cpu(), classes]).unique()
        self.old_classes_ = classes

    def teardown(self) -> None:
        """Let go of the model; the teacher stays."""
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's tensors and the old classes.

        Returns:
            The state.
        """
        return {
            "teacher": None if self.teacher_ is None else _teacher.tensors_of(self.teacher_),
            "old_classes": self.old_classes_,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the teacher as a copy of the attached model with the saved tensors.

        Blocks of a head that appeared after the state was saved may be missing in it: the old
        columns do not depend on them.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: no model is attached, or the saved teacher does not fit it.
        """
        saved, old = state["teacher"], state["old_classes"]
        if saved is not None:
            if self._model is None:
                raise CheckpointError("a teacher is rebuilt from the attached model: attach first")
            self.teacher_ = _teacher.rebuild(self._model, saved, grown=old is not None)
        else:
            self.teacher_ = None
        self.old_classes_ = None if old is None else old.clone()

    def _old(self, logits: Tensor) -> Tensor:
        assert self.old_classes_ is not None
        if int(self.old_classes_[-1]) >= logits.shape[-1]:
            raise DataError(
                f"the old class {int(self.old_classes_[-1])} lies outside a head of "
                f"{logits.shape[-1]} classes: consolidate with the labels that the head was "
                "trained on"
            )
        return logits.index_select(-1, self.old_classes_.to(logits.device))
