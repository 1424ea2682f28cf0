"""Hold parameters while the Hugging Face ``Trainer`` trains.

Step-side methods (L2, L1, EWC, GEM) need the callback only::

    callback = GuywireCallback(gw.L2(0.01))
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])

Loss-side methods (distillation, replay) add their term in a ``compute_loss_func`` of two lines::

    def compute_loss(outputs, labels, num_items_in_batch=None):
        loss = F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return loss + callback.loss(outputs, labels, num_items_in_batch)


    trainer = Trainer(..., callbacks=[callback], compute_loss_func=compute_loss)

``max_grad_norm`` clips before the pull. The state of the regularizers is saved beside every
checkpoint of the Trainer, as ``guywire.safetensors``, and found again on resume.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from guywire.core import checkpoint
from guywire.core.aside import is_aside, listener
from guywire.core.attach import Wires, attach
from guywire.core.errors import AttachError, CheckpointError, need
from guywire.core.regularizer import Regularizer
from guywire.core.sharded import gathered

need("transformers", extra="hf")

from transformers.trainer_callback import TrainerCallback  # noqa: E402

__all__ = ["FILE", "GuywireCallback"]

FILE = "guywire.safetensors"
"""Name of the file in each of the Trainer's checkpoint folders."""

_IGNORED = -100


class GuywireCallback(TrainerCallback):
    """Attach regularizers when the Trainer begins, save and restore their state with its own.

    The wires stay attached when training ends, so that :meth:`consolidate` can follow; the next
    ``train()`` attaches anew, to its new optimiser. Under DDP every process consolidates, each on its
    own part of the data, which is what ``trainer.get_train_dataloader()`` gives it. FSDP and
    DeepSpeed are not supported here.

    Args:
        regularizers: one or several.
        consolidate: consolidate on the Trainer's own training data, and detach, when training ends.
        resume_from: the checkpoint folder that training resumes from, where that is not
            ``checkpoint-<step>`` in the Trainer's ``output_dir``.

    Example:
        >>> import guywire as gw
        >>> callback = GuywireCallback(gw.L2(0.01))
        >>> callback.wires is None  # until trainer.train()
        True
    """

    def __init__(
        self,
        regularizers: Regularizer | Sequence[Regularizer],
        *,
        consolidate: bool = False,
        resume_from: str | Path | None = None,
    ) -> None:
        self.regularizers = regularizers
        self.consolidate_at_end = consolidate
        self.resume_from = resume_from
        self.wires: Wires | None = None
        self._accumulation = 1
        self._shifted = False
        self._inputs: dict[str, Any] | None = None
        self._handle: Any = None

    def __deepcopy__(self, memo: Any) -> GuywireCallback:
        return self  # as of wires: a teacher of a module that holds its callback shares it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach; on resume, load the state saved beside the checkpoint.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            control: the Trainer's.
            **kwargs: the model and the optimiser among them.

        Raises:
            CheckpointError: training resumes from a checkpoint without a state of ours.
        """
        self.detach()
        model: nn.Module = kwargs["model"]
        self._accumulation = args.gradient_accumulation_steps
        self._shifted = _leaves_first_out(model)
        self.wires = attach(_as_trained(model), kwargs["optimizer"], self.regularizers)
        if any(type(r).loss is not Regularizer.loss for r in self.wires.regularizers):
            self._handle = model.register_forward_pre_hook(self._inputs_hook(), with_kwargs=True)
        if state.global_step > 0:
            folder = self.resume_from or _folder(args, state)
            path = Path(folder) / FILE
            if not path.exists():
                self.detach()
                raise CheckpointError(
                    f"training resumes at step {state.global_step}, but there is no {path}: pass "
                    "GuywireCallback(..., resume_from=FOLDER), or train from the start"
                )
            self.wires.load_state_dict(checkpoint.load(path))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell methods that go by epochs which one begins.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            control: the Trainer's.
            **kwargs: not used.
        """
        if self.wires is not None:
            for regularizer in self.wires.regularizers:
                if (start := getattr(regularizer, "start_epoch", None)) is not None:
                    start(int((state.epoch or 0.0) + 1e-6))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state beside the Trainer's checkpoint.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            control: the Trainer's.
            **kwargs: not used.
        """
        folder = _folder(args, state)
        if self.wires is None:
            return
        whole = gathered(self.wires.state_dict())  # under FSDP2 every process takes part
        if args.should_save and folder.is_dir():
            checkpoint.save(folder / FILE, whole)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Consolidate on the training data, if asked to.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            control: the Trainer's.
            **kwargs: the data loader among them.
        """
        if self.consolidate_at_end:
            self.consolidate(kwargs.get("train_dataloader"))

    def consolidate(self, data: Iterable[Any] | None = None) -> None:
        """Tell the regularizers that a task ends, and detach.

        Args:
            data: batches, such as ``trainer.get_train_dataloader()``.

        Raises:
            AttachError: nothing was trained yet.
        """
        if self.wires is None:
            raise AttachError("consolidate() comes after trainer.train(): nothing is attached yet")
        self.wires.consolidate(data)
        self.detach()

    def detach(self) -> None:
        """Remove all hooks; the regularizers keep what they learnt."""
        if self.wires is not None:
            self.wires.detach()
        if self._handle is not None:
            self._handle.remove()
        self.wires = self._handle = self._inputs = None

    def loss(
        self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return what loss-side methods add to the loss of this micro-batch.

        Their term is a mean over the micro-batch, and the Trainer adds up what a
        ``compute_loss_func`` returns over the micro-batches of a step. So it is weighted by this
        micro-batch's share of the step's items, or where the Trainer does not count items, by one
        over the accumulation steps: it counts once.

        Args:
            outputs: what the Trainer passes.
            labels: what the Trainer passes.
            num_items_in_batch: what the Trainer passes: labels other than -100 in all
                micro-batches of the step.

        Returns:
            A 0-d tensor; zero in evaluation, and where no method adds anything.
        """
        inputs, self._inputs = self._inputs, None
        if self.wires is None or inputs is None or not torch.is_grad_enabled():
            return torch.zeros(())
        if labels is not None:
            inputs["labels"] = labels
        term = self.wires.loss(inputs, outputs)
        if num_items_in_batch is None or not isinstance(labels, Tensor):
            return term / self._accumulation
        counted = labels[..., 1:] if self._shifted else labels
        return term * ((counted != _IGNORED).sum() / num_items_in_batch)

    def _inputs_hook(self) -> Callable[..., Any]:
        # compute_loss_func gets outputs and labels only, and a teacher needs the inputs as well.
        @listener
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if module.training and torch.is_grad_enabled() and not is_aside():
                own = ("labels", "num_items_in_batch")
                self._inputs = {name: v for name, v in kwargs.items() if name not in own}

        return keep


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _as_trained(model: nn.Module) -> nn.Module:
    """Return the wrapper that the Trainer put around a model under DDP, else the model.

    Callbacks see the bare model, and nothing that they get leads to the wrapper; but it says with
    whom importances are to be summed. Without it the processes would be pulled apart.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return model
    found = nn.parallel.DistributedDataParallel
    for thing in gc.get_objects():
        # Not isinstance, which some proxies answer by importing what they stand for.
        if issubclass(type(thing), found) and thing.module is model:
            return thing
    return model


def _leaves_first_out(model: nn.Module) -> bool:
    """Say whether the Trainer leaves each sequence's first label out when it counts items.

    Newer versions do so for models whose own loss shifts the labels; this is their rule.
    """
    from transformers import Trainer

    if "_loss_shifts_labels" not in Trainer.__init__.__code__.co_names:
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    kind = LOSS_MAPPING.get(str(getattr(model, "loss_type", None)))
    decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return kind is ForCausalLMLoss and not decoder
