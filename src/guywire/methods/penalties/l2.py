"""L2: hold parameters near an anchor by the plain squared distance.

For whoever fine-tunes a pretrained model and wants the cheapest thing that helps: one extra copy of
the selected weights, no pass over data, no importance to estimate. With a pretrained network and
the pull on the self-attention's projections alone it beat EWC and distillation in the paper.

    penalty = strength * sum_i (theta_i - anchor_i)^2,     pull = 2 * strength * (theta - anchor)

theta: the selected parameters; anchor: their values when the wires were attached, refreshed at
every ``consolidate`` (``anchor="previous"``), kept for good (``"initial"``), zero (``"zero"``), or
tensors of yours. Decoupled, the pull bypasses the optimiser as AdamW's decay does: with
``anchor="zero"`` it equals a weight decay of ``2 * strength``.

Source: Smith, Tian, Halbe, Hsu, Kira, "A Closer Look at Rehearsal-Free Continual Learning",
arXiv 2203.17269; the starting point as an anchor is L2-SP, arXiv 1802.01483.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from guywire.core.regularizer import Regularizer, Step
from guywire.core.selection import Selection
from guywire.core.shelf import Keep, Shelf
from guywire.core.tensors import Tensors
from guywire.methods.penalties import _anchored

__all__ = ["L2", "l2_penalty"]


def l2_penalty(params: Mapping[str, Tensor], anchors: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return ``sum (theta - anchor)^2`` over all tensors, differentiable.

    Args:
        params: names to parameters.
        anchors: names to anchors of the same shapes; ``None`` is zero.

    Returns:
        A 0-d tensor.

    Example:
        >>> l2_penalty({"w": torch.tensor([3.0, 4.0])})
        tensor(25.)
    """
    terms = [(p if anchors is None else p - anchors[n]).square().sum() for n, p in params.items()]
    return torch.stack(terms).sum()


@final
class L2(Regularizer):
    """Pull parameters towards an anchor by the squared distance to it.

    Args:
        strength: weight of the penalty; a number, a schedule ``step -> number``, or a mapping from
            globs to these for a strength per group of parameters.
        select: which parameters, see :func:`guywire.select`.
        anchor: ``"previous"`` (where they were at the last ``consolidate``, or at ``attach``),
            ``"initial"`` (at the first ``attach``, for good), ``"zero"``, or names to tensors.
        decoupled: apply the pull to the parameters, times the learning rate, instead of to the
            gradients.
        anchor_dtype: of the anchors; the parameters' own if ``None``.
        keep: where the anchors are: beside the parameters (``None``), in the CPU's memory
            (``"cpu"``), in a nameless file mapped into memory (``"disk"``), or in files in a folder
            (a ``pathlib.Path``) of their own. Under FSDP2 each process keeps its shards.

    Raises:
        SelectionError: at attach, if the selection matches nothing.
        UsageError: at attach, if the strength or the anchor makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> wires = gw.attach(model, optimizer, gw.L2(strength=1.0, anchor="zero"))
        >>> before = model.weight.detach().clone()
        >>> optimizer.step()  # no gradient of a loss: only the pull acts
        >>> bool(torch.allclose(model.weight, before * 0.8))
        True
    """

    slug: ClassVar[str] = "rehearsal-free-cl"
    title: ClassVar[str] = "A Closer Look at Rehearsal-Free Continual Learning"
    arxiv: ClassVar[str] = "2203.17269"
    place: ClassVar[str] = "step"
    memory: ClassVar[str] = "1"
    passes: ClassVar[str] = "0"

    def __init__(
        self,
        strength: _anchored.Strengths = 1e-2,
        *,
        select: Selection = None,
        anchor: _anchored.Anchor = "previous",
        decoupled: bool = False,
        anchor_dtype: torch.dtype | None = None,
        keep: Keep = None,
    ) -> None:
        self.strength = strength
        self.select = select
        self.anchor: _anchored.Anchor = anchor
        self.decoupled = decoupled
        self.anchor_dtype = anchor_dtype
        self.keep: Keep = keep
        self.anchors_: Tensors | None = None
        self._binding = _anchored.Binding()

    def setup(self, model: nn.Module) -> None:
        """Bind to the model; the first time, take the anchors.

        Args:
            model: the user's module.
        """
        self._binding.bind(model, self.select, self.strength)
        self.anchors_ = _anchored.anchors_at_setup(
            model,
            self._binding.params,
            self.anchor,
            self.anchors_,
            self.anchor_dtype,
            self._shelf(),
        )

    def before_step(self, step: Step) -> None:
        """Pull.

        Args:
            step: the step that is about to happen.
        """
        self._binding.apply(step, self.anchors_, None, factor=2.0, decoupled=self.decoupled)

    def penalty(self) -> Tensor | None:
        """Return ``strength * sum (theta - anchor)^2``.

        Returns:
            A 0-d tensor, or ``None`` if nothing is held.
        """
        return self._binding.value(self.anchors_, None)

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Move the anchors to where the parameters are now, if they are the previous task's.

        Args:
            model: the user's module.
            data: not used.
        """
        if self.anchor == "previous":
            self._binding.bind(model, self.select, self.strength)
            self.anchors_ = _anchored.anchors_now(
                self._binding.params, self.anchor_dtype, self._shelf()
            )

    def teardown(self) -> None:
        """Let go of the model; the anchors stay."""
        self._binding.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the anchors.

        Returns:
            The state.
        """
        return {"anchors": self.anchors_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the anchors back.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: they do not fit the model attached.
        """
        anchors = state["anchors"]
        if anchors is not None:
            _anchored.check_shapes(self._binding.params, anchors, "the saved anchor")
            anchors = _anchored.like(anchors, self._binding.params, self._shelf())
        self.anchors_ = anchors

    def _shelf(self) -> Shelf:
        return Shelf(self.keep, "l2-anchors")
