"""Hold parameters while Lightning's ``Trainer`` trains.

Step-side methods need the callback only; loss-side methods add their term in ``training_step``::

    callback = GuywireCallback(gw.PredictionDistillation())


    def training_step(self, batch, index):
        outputs = self(batch[0])
        return F.cross_entropy(outputs, batch[1]) + callback.loss(batch, outputs)

Lightning divides losses by ``accumulate_grad_batches`` itself, so the term counts once. Gradient
clipping comes before the pull. The state of the regularizers travels in Lightning's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from guywire.core.attach import Wires, attach
from guywire.core.errors import AttachError, need
from guywire.core.regularizer import Regularizer

need("lightning", extra="lightning")

from lightning.pytorch.callbacks import Callback  # noqa: E402

__all__ = ["GuywireCallback"]


class GuywireCallback(Callback):
    """Attach regularizers when training starts; save and restore their state with the checkpoint.

    The wires stay attached when training ends, so that :meth:`consolidate` can follow; the next
    ``fit`` attaches anew. Methods that run the model (EWC, distillation, replay) call the
    ``LightningModule``: its ``forward`` must return logits.

    Args:
        regularizers: one or several.
        consolidate: consolidate on the training data, and detach, when training ends.
        optimizer: which one, where the module has several.

    Example:
        >>> import guywire as gw
        >>> callback = GuywireCallback(gw.L2(0.01))
        >>> callback.wires is None  # until trainer.fit()
        True
    """

    def __init__(
        self,
        regularizers: Regularizer | Sequence[Regularizer],
        *,
        consolidate: bool = False,
        optimizer: int = 0,
    ) -> None:
        self.regularizers = regularizers
        self.consolidate_at_end = consolidate
        self.optimizer = optimizer
        self.wires: Wires | None = None
        self._loaded: dict[str, Any] | None = None

    def __deepcopy__(self, memo: Any) -> GuywireCallback:
        return self  # as of wires: a teacher of a module that holds its callback shares it

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach; after a checkpoint was loaded, take its state.

        Args:
            trainer: Lightning's.
            pl_module: the module that is trained.
        """
        self.detach()
        model = trainer.strategy.model or pl_module
        self.wires = attach(model, trainer.optimizers[self.optimizer], self.regularizers)
        if self._loaded is not None:
            self.wires.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Consolidate on the training data, if asked to.

        Args:
            trainer: Lightning's.
            pl_module: the module that was trained.
        """
        if self.consolidate_at_end:
            self.consolidate(trainer.train_dataloader)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach.

        Args:
            trainer: Lightning's.
            pl_module: the module.
            exception: what went wrong.
        """
        self.detach()

    def consolidate(self, data: Iterable[Any] | None = None) -> None:
        """Tell the regularizers that a task ends, and detach.

        Args:
            data: batches of the task.

        Raises:
            AttachError: nothing was trained yet.
        """
        if self.wires is None:
            raise AttachError("consolidate() comes after trainer.fit(): nothing is attached yet")
        self.wires.consolidate(data)
        self.detach()

    def detach(self) -> None:
        """Remove all hooks; the regularizers keep what they learnt."""
        if self.wires is not None:
            self.wires.detach()
        self.wires = None

    def loss(self, batch: Any, outputs: Any = None) -> Tensor:
        """Return what loss-side methods add to the loss of this batch.

        Args:
            batch: the batch.
            outputs: what the model returned for it.

        Returns:
            A 0-d tensor; zero in evaluation.
        """
        if self.wires is None or not torch.is_grad_enabled():
            return torch.zeros(())
        return self.wires.loss(batch, outputs)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the regularizers, for Lightning's checkpoint.

        Returns:
            The tree; empty while nothing is attached.
        """
        return {} if self.wires is None else self.wires.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts.

        Args:
            state_dict: from the checkpoint.
        """
        self._loaded = state_dict or None
