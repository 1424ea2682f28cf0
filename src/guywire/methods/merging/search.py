"""Search DAREx-q's q, or its eta, on data: labelled (1/q_v) or not (1/q_e).

Labelled, the score is an error on validation data. Unlabelled, it is how far pruning moves the
model's output: ``output_change`` for encoders, ``top_logits_change`` for language models. Either way
a score is the mean over several masks, of which the one farthest from the mean is left out, for one
mask at a rate of 0.99 is a lottery.

Source: "DARE the Extreme", arXiv 2410.09344, section 4.2, and the scan of its released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from guywire.core.aside import undisturbed
from guywire.core.errors import UsageError
from guywire.core.selection import canonical, unwrap
from guywire.methods.merging import dare
from guywire.methods.merging.inputs import LayerInputs
from guywire.methods.merging.rescale import eta_of_one, layer_qs
from guywire.methods.merging.scores import Score

__all__ = [
    "Search",
    "grid_search",
    "search_eta",
    "search_q",
    "steady_mean",
]

_PATIENCE = 4


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: the value with the lowest score.
        scores: every value tried, in order, and its score.
    """

    best: float
    scores: dict[float, float]


def grid_search(
    score: Callable[[float], float],
    low: float,
    high: float,
    step: float,
    *,
    patience: int = _PATIENCE,
) -> Search:
    """Scan coarsely from below, then finely around the best, each until it stops to improve.

    The coarse scan goes from ``low`` to ``high`` by ``step`` and stops after ``patience`` values in
    a row that are no better; the fine one goes by a tenth of the step from ``best - 0.9 * step`` to
    ``best + step``, with the same rule.

    Args:
        score: value to score; lower is better.
        low: first value.
        high: last value.
        step: of the coarse scan.
        patience: values that are no better before a scan stops.

    Returns:
        Best value and all scores.

    Raises:
        UsageError: the range is empty, or no score is a number.

    Example:
        >>> found = grid_search(lambda v: (v - 0.34) ** 2, 0.1, 1.0, 0.1)
        >>> round(found.best, 6)
        0.34
    """
    if not low <= high or step <= 0.0:
        raise UsageError(f"there is nothing to search from {low} to {high} by steps of {step}")
    scores: dict[float, float] = {}
    coarse = _scan(score, low, high, step, patience, scores)
    _scan(
        score,
        max(low, coarse - 0.9 * step),
        min(high, coarse + step),
        step / 10.0,
        patience,
        scores,
    )
    best = min(scores, key=scores.__getitem__)
    if not math.isfinite(scores[best]):
        raise UsageError(f"every value from {low} to {high} has the score {scores[best]}")
    return Search(best, scores)


def steady_mean(values: Sequence[float]) -> float:
    """Return the mean without the value that is farthest from it (of three or more).

    Args:
        values: one score a mask.

    Returns:
        The mean of the others.

    Example:
        >>> steady_mean([1.0, 2.0, 3.0, 100.0])
        2.0
    """
    mean = sum(values) / len(values)
    if len(values) < 3 or not math.isfinite(mean):
        return mean
    far = max(range(len(values)), key=lambda i: abs(values[i] - mean))
    rest = [value for i, value in enumerate(values) if i != far]
    return sum(rest) / len(rest)


def search_q(
    model: nn.Module,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rate: float,
    score: Score,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    high: float = 1.0,
    step: float | None = None,
    select: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Search:
    """Search one q for all tensors.

    Args:
        model: what the tensors belong to; it gets the edited weights meanwhile, and keeps its own.
        base: names to pretrained parameters.
        tuned: names to fine-tuned parameters.
        rate: share that is dropped, in [0, 1).
        score: of a model, lower is better: an error on validation data, or what
            :func:`~guywire.methods.merging.output_change` returns. Never on test data.
        seeds: of the masks to average over.
        high: largest q.
        step: of the coarse scan from ``1 - rate``; a twentieth of the range if ``None``.
        select: as for :func:`~guywire.methods.merging.drop_and_rescale`.
        exclude: as for :func:`~guywire.methods.merging.drop_and_rescale`.

    Returns:
        The best q and all scores.

    Raises:
        UsageError: names or shapes do not fit the model, or the range is empty.
        SelectionError: nothing is left to prune.
    """
    masks = [dare.keep(base, tuned, rate, seed=s, select=select, exclude=exclude) for s in seeds]
    low = 1.0 - rate
    step = (high - low) / 20.0 if step is None else step
    with _Trial(model, base, tuned, masks, score) as trial:
        return grid_search(trial, low, high, step)


def search_eta(
    model: nn.Module,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rate: float,
    score: Score,
    inputs: Mapping[str, LayerInputs],
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    high: float | None = None,
    step: float | None = None,
    select: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Search:
    """Search the scalar eta that gives every layer its q.

    Args:
        model: as for :func:`search_q`.
        base: names to pretrained parameters.
        tuned: names to fine-tuned parameters.
        rate: share that is dropped, in [0, 1).
        score: of a model, lower is better.
        inputs: of the linear layers, from :func:`~guywire.methods.merging.layer_inputs`.
        seeds: of the masks to average over.
        high: largest eta; where half of all rows have ``q >= 1`` if ``None``.
        step: of the coarse scan, and the smallest eta; a twentieth of ``high`` if ``None``.
        select: as for :func:`~guywire.methods.merging.drop_and_rescale`.
        exclude: as for :func:`~guywire.methods.merging.drop_and_rescale`.

    Returns:
        The best eta and all scores; ``layer_qs(..., eta=found.best)`` gives the q of each tensor.

    Raises:
        UsageError: names or shapes do not fit the model, or the range is empty.
        SelectionError: nothing is left to prune.
    """
    masks = [dare.keep(base, tuned, rate, seed=s, select=select, exclude=exclude) for s in seeds]
    high = eta_of_one(base, tuned, rate, inputs) if high is None else high
    step = high / 20.0 if step is None else step
    with _Trial(model, base, tuned, masks, score) as trial:

        def value(eta: float) -> float:
            return trial(layer_qs(base, tuned, rate, inputs, eta=eta))

        return grid_search(value, step, high, step)


class _Trial:
    """Scores edits of a model; from one to the next only the survivors are written.

    Args:
        model: gets the edited weights within ``with``, and its own back.
        base: names to pretrained tensors.
        tuned: names to fine-tuned tensors.
        masks: names to survivors, for each mask.
        score: of a model.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        masks: Sequence[Mapping[str, Tensor]],
        score: Score,
    ) -> None:
        self.model, self.base, self.tuned = model, base, tuned
        self.masks, self.score = masks, score
        self.params = parameters_for(model, tuned)
        self.own: dict[str, Tensor] = {}

    def __enter__(self) -> _Trial:
        self.own = {name: p.detach().clone() for name, p in self.params.items()}
        pruned = self.masks[0]
        self._put({n: self.base[n] if n in pruned else v for n, v in self.tuned.items()})
        return self

    def __exit__(self, *error: object) -> None:
        self._put(self.own)

    def __call__(self, q: dare.Factors) -> float:
        values = []
        with undisturbed(self.model, mode=False), torch.no_grad():
            for kept in self.masks:
                try:
                    for name, where in kept.items():
                        self._write(name, where, q[name] if isinstance(q, Mapping) else q)
                    values.append(self.score(self.model))
                finally:
                    for name, where in kept.items():
                        self._write(name, where, None)
        return steady_mean(values)

    def _write(self, name: str, where: Tensor, q: float | None) -> None:
        """Write survivors divided by q, or the base's values over them."""
        before = self.base[name].detach().reshape(-1)[where]
        if q is not None:
            # The pieces at the survivors, as tensors of their own: all of them are kept.
            after = self.tuned[name].detach().reshape(-1)[where]
            before = dare.rescaled(before, after, torch.ones_like(after, dtype=torch.bool), q)
        p = self.params[name].detach()
        where = where.to(p.device)
        if p.is_contiguous():
            p.view(-1)[where] = before.to(p)
        else:
            p.copy_(p.reshape(-1).index_copy(0, where, before.to(p)).view(p.shape))

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.params[name].copy_(value)


def parameters_for(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's own tensors under the names of others.

    Args:
        model: any module.
        tensors: names to tensors.

    Returns:
        Names to parameters or buffers of the same shapes.

    Raises:
        UsageError: the model lacks a name, or has another shape there.
    """
    inner = unwrap(model)
    named = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers()]
    mine: dict[str, Tensor] = {canonical(name): value for name, value in named}
    for name, value in tensors.items():
        if name not in mine or mine[name].shape != value.shape:
            shape = tuple(mine[name].shape) if name in mine else "none"
            raise UsageError(
                f"{name!r} has the shape {tuple(value.shape)}, in the model {shape}: give tensors "
                "under the names of the model's state_dict()"
            )
    return {name: mine[name] for name in tensors}


def _scan(
    score: Callable[[float], float],
    low: float,
    high: float,
    step: float,
    patience: int,
    scores: dict[float, float],
) -> float:
    """Scan upwards until it stops to improve; note scores, return the best value of this scan."""
    best, lowest, since = low, math.inf, 0
    for i in range(int((high - low) / step + 1e-9) + 1):
        # Rounded, so that values of both scans that are the same are computed once.
        value = round(low + i * step, 12)
        if value not in scores:
            found = score(value)
            scores[value] = found if math.isfinite(found) else math.inf
        if scores[value] < lowest:
            best, lowest, since = value, scores[value], 0
        else:
            since += 1
            if since >= patience:
                break
    return best
