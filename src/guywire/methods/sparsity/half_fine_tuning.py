"""HFT: each round, a random half of a transformer's matrices moves and the other half stays.

For whoever fine-tunes all weights of a pretrained model, in stages or task after task, and wants
less forgetting *and* a cheaper step: frozen matrices need no gradient and no optimiser state. In
each layer two of the four attention matrices, on average one and a half of the three feed-forward
ones, and one of the two norms are updated; embeddings, head and final norm always are. A new half
is drawn for every round (a task, a stage), and kept within it:

    vartheta <- vartheta - eta grad_vartheta L(theta),    psi <- psi,     theta = (vartheta, psi)

which solves ``min L`` under ``||(I - M)(theta - theta^0)||^2 = 0``, M the mask of the updated ones.

Source: Hui, Zhang, Wang, Xu, Sun, Wu, "HFT: Half Fine-Tuning for Large Language Models",
arXiv 2404.18466. Fused projections (GPT-2) are halved by blocks, experts each on their own: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import selection, tensors
from guywire.core.errors import AttachError, CheckpointError, UsageError
from guywire.core.processes import data_parallel
from guywire.core.regularizer import Regularizer, Step
from guywire.methods.sparsity import _pieces
from guywire.methods.sparsity.halves import Level, draw, half, half_fractions, half_reset

__all__ = ["HalfFineTuning", "half", "half_fractions", "half_reset"]


@final
class HalfFineTuning(Regularizer):
    """Freeze a random half of the matrices for a round, another half for the next.

    From ``attach`` on the frozen half has ``requires_grad=False`` and no gradient, and no optimiser
    state from the first step on; whatever the optimiser (weight decay, momentum, fused) it stays
    bit for bit as it is. The optimiser may be made before or after. ``consolidate`` begins the next
    round; ``detach`` gives every parameter its flag back. What was frozen before is left alone.

    Blocks of fused parameters (GPT-2's queries, keys and values) are held by masking their gradient
    and writing them back after the step: exact, but it saves nothing.

    Under DDP attach to the bare model first and wrap it then, anew for each round: DDP counts on a
    gradient from each parameter that it was made with. Attached to a model that is wrapped already,
    all gradients are computed and the frozen half's are set to zero: exact, but it saves nothing.
    The Trainer of ``transformers`` wraps before its callbacks see the model, and shows them the bare
    one: not to be used there with DDP.
    Together with penalties put this one first, and attach anew for each round: a penalty binds to
    what is free at ``attach``, and takes the anchors of what is free after ``consolidate``.

    Args:
        ratio: the updated fraction.
        level: ``"category"``, ``"layer"`` or ``"model"``, see :func:`guywire.half`.
        reselect: ``"round"``: a new half at every ``consolidate``; ``"epoch"``: also whenever
            :meth:`start_epoch` is told of a new epoch (the Trainer's callback does).
        seed: of the draw; give every process the same.
        categories: as for :func:`guywire.half`.

    Raises:
        SelectionError: at attach, if the model has no transformer layers or one is not recognised.
        UsageError: at attach, if another argument makes no sense.

    Example:
        >>> import guywire as gw
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with gw.attach(model, optimizer, gw.HalfFineTuning()):
        ...     sum(p.requires_grad for p in model.parameters()) < len(list(model.parameters()))
        True
    """

    slug: ClassVar[str] = "half-fine-tuning"
    title: ClassVar[str] = "HFT: Half Fine-Tuning for Large Language Models"
    arxiv: ClassVar[str] = "2404.18466"
    place: ClassVar[str] = "step"
    memory: ClassVar[str] = "0"
    passes: ClassVar[str] = "0"

    def __init__(
        self,
        ratio: float = 0.5,
        *,
        level: Level = "category",
        reselect: Literal["round", "epoch"] = "round",
        seed: int = 0,
        categories: Mapping[str, str] | None = None,
    ) -> None:
        self.ratio = ratio
        self.level: Level = level
        self.reselect: Literal["round", "epoch"] = reselect
        self.seed = seed
        self.categories = categories
        self.round_ = 0
        self.epoch_ = 0
        self.frozen_: list[str] | None = None
        self._model: nn.Module | None = None
        self._flags: dict[str, nn.Parameter] = {}
        self._blocks: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def setup(self, model: nn.Module) -> None:
        """Bind to the model and freeze the round's half.

        Args:
            model: the user's module.

        Raises:
            AttachError: the half that was drawn belongs to another model.
            UsageError: an argument makes no sense.
        """
        if self.reselect not in ("round", "epoch"):
            raise UsageError(f"reselect={self.reselect!r} is neither 'round' nor 'epoch'")
        self._model = model
        if self.frozen_ is None:
            self._draw()
        else:
            self._check(AttachError, "this regularizer froze")
        self._freeze()

    def start_epoch(self, number: int) -> None:
        """Say that an epoch begins; with ``reselect="epoch"`` it gets a half of its own.

        Args:
            number: of the epoch, from 0 in every round.
        """
        if self.reselect == "epoch" and number != self.epoch_:
            self.epoch_ = number
            self._redraw()

    def before_step(self, step: Step) -> None:
        """Drop what the optimiser has for the frozen half, and mind that it has no gradients.

        Args:
            step: the step that is about to happen.
        """
        for parameter in self._flags.values():
            parameter.grad = None
        for parameter, mask, _ in self._blocks.values():
            if parameter.grad is not None:
                tensors.local(parameter.grad).masked_fill_(mask, 0.0)
        # Here and not at attach: on resume the saved half comes later.
        for parameter in self._flags.values():
            step.optimizer.state.pop(parameter, None)

    def after_step(self, step: Step) -> None:
        """Write frozen blocks back: weight decay moves them in spite of a zero gradient.

        Args:
            step: the step that has happened.
        """
        for parameter, mask, values in self._blocks.values():
            tensors.local(parameter)[mask] = values
            for kept in step.optimizer.state.get(parameter, {}).values():
                if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                    tensors.local(kept).masked_fill_(mask, 0.0)

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Begin the next round: another half is frozen from here on.

        Args:
            model: the user's module.
            data: not used.
        """
        self.round_ += 1
        self.epoch_ = 0
        self._redraw()

    def teardown(self) -> None:
        """Give every parameter its flag back; round and half are kept."""
        self._thaw()
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        """Return seed, round, epoch and the names of the frozen half.

        Returns:
            The state.
        """
        return {
            "seed": self.seed,
            "round": self.round_,
            "epoch": self.epoch_,
            "frozen": self.frozen_,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take round and half back.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: it was drawn with another seed, or belongs to another model.
        """
        if state["seed"] != self.seed:
            raise CheckpointError(
                f"the saved half was drawn with seed {state['seed']}, this regularizer has seed "
                f"{self.seed}: make it with the saved one"
            )
        self.round_, self.epoch_ = state["round"], state["epoch"]
        self.frozen_ = None if state["frozen"] is None else list(state["frozen"])
        if self._model is not None:
            if self.frozen_ is None:
                self._draw()
            self._check(CheckpointError, "the saved state froze")
            self._freeze()

    def _draw(self) -> None:
        assert self._model is not None
        pieces = _pieces.pieces_of(self._model, self.categories)
        drawn = draw(pieces, self.seed, self.round_, self.level, self.ratio, self.epoch_)
        rest = [name for piece in pieces if piece not in drawn for name in piece.names]
        self.frozen_ = _pieces.merged(rest, pieces)

    def _redraw(self) -> None:
        if self._model is None:
            self.frozen_ = None  # drawn at the next attach
            return
        self._draw()
        self._freeze()

    def _check(self, error: type[Exception], who: str) -> None:
        assert self._model is not None
        assert self.frozen_ is not None
        known = selection.named_parameters(self._model)
        missing = [name for name in self.frozen_ if _pieces.parse(name)[0] not in known]
        if missing:
            raise error(f"{who} {missing[0]!r}, which the model lacks: make a new one")

    def _freeze(self) -> None:
        assert self._model is not None
        assert self.frozen_ is not None
        self._thaw()
        params = selection.named_parameters(self._model)
        wires = getattr(self, "_wires", None)
        # DDP waits for the gradient of each parameter that required one when it was made.
        wrapped = data_parallel(getattr(wires, "model", None)) is not None
        parts: dict[str, list[_pieces.Index]] = {}
        for name in self.frozen_:
            whole, index = _pieces.parse(name)
            parameter = params[whole]
            if not parameter.requires_grad:
                continue
            if index is not None:
                parts.setdefault(whole, []).append(index)
                continue
            self._flags[whole] = parameter
            parameter.grad = None
            if wrapped:
                self._handles.append(parameter.register_hook(torch.zeros_like))
            else:
                parameter.requires_grad_(False)
        for whole, indices in parts.items():
            self._hold(whole, params[whole], indices)

    def _hold(self, name: str, parameter: nn.Parameter, indices: Sequence[_pieces.Index]) -> None:
        whole = torch.zeros(parameter.shape, dtype=torch.bool)
        for index in indices:
            whole[index] = True
        mask = tensors.local(tensors.place_like(whole, parameter))
        self._blocks[name] = (parameter, mask, tensors.local(parameter)[mask].clone())
        if parameter.grad is not None:
            tensors.local(parameter.grad).masked_fill_(mask, 0.0)
        if mask.shape == parameter.shape:
            # Before the loop clips: the norm is that of the updated part only.
            self._handles.append(parameter.register_hook(_masking(mask)))

    def _thaw(self) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._flags.values():
            parameter.requires_grad_(True)
        self._handles, self._flags, self._blocks = [], {}, {}


def _masking(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(mask, 0.0)
