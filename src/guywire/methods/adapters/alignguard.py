"""AlignGuard-LoRA: fine-tune with LoRA without disturbing what a model was aligned to.

For whoever tunes a model that was taught to refuse, or anything else that its fine-tuning data never
show: directions that the alignment data depend on are held hard, all others mildly, and what is
learnt for the task is kept from moving the same entries. D is the update of a layer, ``[out, in]``;
``consolidate(alignment_data)``, once and before fine-tuning, estimates F = E[G G'] from per-sample
gradients G of the alignment data (``guywire.curvature.output_gram``) and keeps its top eigenvectors.

    penalty = strength * sum over layers of
              aligned * |F^{1/2} D_A|^2 + task * |H^{1/2} D_T|^2
              + collision * (overlap * E_RM + (1 - overlap) * E_geo)

``mode="projected"``, one update: D_A = P D, D_T = (I - P) D. E_geo is zero then whatever D is.

``mode="two_branch"``: D_A and D_T are two adapters, both active, and the layer adds D_A + D_T. Each is
assigned to its part softly: P D_T is charged to the first term like D_A, and (I - P) D_A to the second
like D_T (that it is charged at all the paper does not say; else one branch would be free there).
F is scaled, or the weights would not carry over between models: by default to the trace of the
identity, so that ``aligned`` and ``task`` weigh an average direction alike.

Source: AlignGuard-LoRA, arXiv 2508.02079; the terms are in ``alignguard_terms``. F is the empirical
Fisher information (true labels) of a layer's outputs, which is our reading: see ``output_gram``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import errors, tensors
from guywire.core.regularizer import Regularizer, Step, Strength, strength_at
from guywire.core.selection import named_parameters, unwrap
from guywire.core.tensors import Tensors
from guywire.curvature import output_gram
from guywire.methods.adapters._alignguard_checks import check_layer, check_values
from guywire.methods.adapters._lora import Site, sites
from guywire.methods.adapters.alignguard_terms import (
    Product,
    Reduce,
    critical_subspace,
    layer_terms,
)

__all__ = ["AlignGuardLoRA"]

Mode = Literal["two_branch", "projected"]
Normalise = Literal["trace", "top"]


@final
class AlignGuardLoRA(Regularizer):
    """Hold LoRA updates where alignment data are sensitive, and keep two branches apart.

    Nothing is held until ``consolidate(alignment_data)``. The penalty depends on parameters only, so
    its gradient is added once an optimiser step.

    Args:
        strength: of all terms together; a number, or a schedule ``step -> number``.
        mode: ``"two_branch"`` (two adapters a layer, see :func:`guywire.add_branch`) or
            ``"projected"`` (the sum of the adapters is split by the projector).
        aligned: weight of what alignment depends on (the paper's lambda_A).
        task: weight of the rest (lambda_T).
        collision: weight of the overlaps (lambda_NC).
        overlap: share of the Riemannian overlap in them, in [0, 1] (alpha); the rest is geodesic.
        beta: how much more large entries count in the Riemannian overlap.
        tau: from where on entries are large.
        large: what is large there: an entry of the ``"update"`` or of the updated ``"weight"``.
        reduce: over the entries of the Riemannian overlap, ``"mean"`` or ``"sum"``.
        energy: share of F's trace that the held directions have.
        normalise: scale F to the ``"trace"`` of the identity, or to ``"top"`` eigenvalue 1; ``None``
            leaves it. ``trace_`` has the traces as they were.
        task_metric: H, names of adapted layers to positive ``[out, in]`` tensors, such as the
            diagonal Fisher information of the task; ones if ``None``.
        adapters: PEFT's names; for two branches that of the task, then of alignment. The active ones
            if ``None``.
        labels: of F: the alignment data's ``"true"`` ones, ``"sampled"`` or ``"expected"``.
        unit: whose gradient F is of: a whole ``"sample"``'s or a ``"token"``'s.
        seed: of the generator behind ``labels="sampled"``.

    Raises:
        SelectionError: at attach, if the model has no such adapters.
        UsageError: at attach, if a value makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = gw.lora_group(nn.Sequential(nn.Linear(6, 3)), n=2, r=2, target_modules=["0"])
        >>> optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        >>> wires = gw.attach(model, optimizer, gw.AlignGuardLoRA())
        >>> wires.consolidate([(torch.randn(8, 6), torch.arange(8) % 3)])  # before fine-tuning
        >>> float(wires.penalty())  # nothing has moved yet
        0.0
    """

    slug: ClassVar[str] = "alignguard-lora"
    title: ClassVar[str] = (
        "AlignGuard-LoRA: Alignment-Preserving Fine-Tuning via Fisher-Guided Decomposition and "
        "Riemannian-Geodesic Collision Regularization"
    )
    arxiv: ClassVar[str] = "2508.02079"
    place: ClassVar[str] = "step"
    memory: ClassVar[str] = "out x m a layer"
    passes: ClassVar[str] = "1 over the alignment data"

    def __init__(
        self,
        strength: Strength = 1.0,
        *,
        mode: Mode = "two_branch",
        aligned: float = 0.25,
        task: float = 0.5,
        collision: float = 0.1,
        overlap: float = 0.5,
        beta: float = 4.0,
        tau: float = 0.01,
        large: Literal["update", "weight"] = "update",
        reduce: Reduce = "mean",
        energy: float = 0.9,
        normalise: Normalise | None = "trace",
        task_metric: Mapping[str, Tensor] | None = None,
        adapters: Sequence[str] | None = None,
        labels: Literal["expected", "sampled", "true"] = "true",
        unit: Literal["sample", "token"] = "sample",
        seed: int = 0,
    ) -> None:
        self.strength = strength
        self.mode: Mode = mode
        self.aligned = aligned
        self.task = task
        self.collision = collision
        self.overlap = overlap
        self.beta = beta
        self.tau = tau
        self.large: Literal["update", "weight"] = large
        self.reduce: Reduce = reduce
        self.energy = energy
        self.normalise: Normalise | None = normalise
        self.task_metric = task_metric
        self.adapters = adapters
        self.labels: Literal["expected", "sampled", "true"] = labels
        self.unit: Literal["sample", "token"] = unit
        self.seed = seed
        self.basis_: Tensors = {}
        self.values_: Tensors = {}
        self.trace_: dict[str, float] = {}
        self._layers: dict[str, list[Site]] = {}
        self._number = 0

    def setup(self, model: nn.Module) -> None:
        """Find the adapters of each layer.

        Args:
            model: the user's module.

        Raises:
            SelectionError: there are none, or a layer's weight is no plain matrix.
            UsageError: a value makes no sense, or a layer has not two branches.
        """
        check_values(self)
        found: dict[str, list[Site]] = {}
        for site in sites(model, self.adapters):
            if self.adapters is None and site.adapter not in site.layer.active_adapters:  # type: ignore[operator]
                continue
            found.setdefault(site.name, []).append(site)
        if not found:
            raise errors.SelectionError(
                "no LoRA adapter is active: name adapters=..., or activate one with set_adapter"
            )
        for name, group in found.items():
            check_layer(name, group, self.mode, self.task_metric)
            if self.adapters is not None:
                group.sort(key=lambda site: list(self.adapters or ()).index(site.adapter))
        self._layers = found
        for held in (self.basis_, self.values_):
            for name in held.keys() & found.keys():
                held[name] = held[name].to(found[name][0].A.device)

    def fit(self, model: nn.Module, data: Iterable[Any]) -> None:
        """Learn from alignment data before anything is attached, as ``wires.consolidate`` does.

        For loops of others, which attach only when training begins: the Trainer's callback.

        Args:
            model: with its adapters; plain, compiled or wrapped by DDP.
            data: batches of alignment data.

        Raises:
            AttachError: it is attached: call ``wires.consolidate(data)``.
        """
        if getattr(self, "_wires", None) is not None:
            raise errors.AttachError("AlignGuardLoRA is attached: call wires.consolidate(data)")
        try:
            self.setup(unwrap(model))
            self._learn(model, data)
        finally:
            self.teardown()

    def before_step(self, step: Step) -> None:
        """Add the gradient of the penalty to that of the factors.

        Args:
            step: the step that is about to happen.
        """
        self._number = step.number
        strength = strength_at(self.strength, step.number)
        if step.skipped or strength == 0.0:
            return
        for name in self._held():
            params = self._params(name)
            own = [p.requires_grad and step.owns(p) for p in params]
            if not any(own):
                continue
            values = [_whole(p).requires_grad_(o) for p, o in zip(params, own, strict=True)]
            with torch.enable_grad():
                value = self._weighted(self._terms(name, values))
            if not value.requires_grad:  # every weight is zero
                continue
            leaves = [v for v in values if v.requires_grad]
            pulls = iter(torch.autograd.grad(value, leaves, materialize_grads=True))
            for p, o in zip(params, own, strict=True):
                if not o:
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                pull = tensors.local(tensors.place_like(next(pulls), p))
                tensors.local(p.grad).add_(pull, alpha=strength * step.scale)

    def penalty(self) -> Tensor | None:
        """Return the value of the penalty.

        Returns:
            A 0-d tensor, or ``None`` before the first ``consolidate``.
        """
        if not self._held():
            return None
        return strength_at(self.strength, self._number) * self._weighted(self._all_terms())

    def terms(self) -> dict[str, float]:
        """Return the terms as they are now, without their weights, summed over layers.

        Returns:
            ``aligned``, ``task``, ``overlap`` (Riemannian) and ``geodesic``, which with
            ``mode="projected"`` is zero but for rounding; empty before the first ``consolidate``.
        """
        if not self._held():
            return {}
        return {name: float(value) for name, value in self._all_terms(inert=True).items()}

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Estimate what alignment data depend on; a second time, estimate it anew.

        Args:
            model: the user's module, with the adapters as they are: still zero, if nothing was
                trained yet.
            data: batches of alignment data: safe and refused prompts with the aligned answers.

        Raises:
            UsageError: there is no data.
            NonFiniteError: F is NaN or infinite; nothing is changed then.
        """
        if data is None:
            raise errors.UsageError(
                "AlignGuardLoRA estimates from alignment data: wires.consolidate(alignment_loader)"
            )
        wires = getattr(self, "_wires", None)
        self._learn(model if wires is None else wires.model, data)  # DDP's wrapper says with whom

    def _learn(self, model: nn.Module, data: Iterable[Any]) -> None:
        names = {id(p): name for name, p in named_parameters(model).items()}
        weights = {name: names[id(_base(group[0]))] for name, group in self._layers.items()}
        grams = output_gram(
            model,
            data,
            labels=self.labels,
            unit=self.unit,
            select=lambda name, _: name in set(weights.values()),
            generator=torch.Generator().manual_seed(self.seed),
        )
        learnt = {}
        for name, weight in weights.items():
            if not bool(torch.isfinite(grams[weight]).all()):
                raise errors.NonFiniteError(
                    f"the Fisher information of {name!r} is NaN or infinite: the model's loss on "
                    "the alignment data is not finite; nothing was changed"
                )
            learnt[name] = self._subspace(grams[weight])
        self.basis_ = {name: basis for name, (basis, _, _) in learnt.items()}
        self.values_ = {name: values for name, (_, values, _) in learnt.items()}
        self.trace_ = {name: trace for name, (_, _, trace) in learnt.items()}

    def teardown(self) -> None:
        """Let go of the model; what was learnt stays."""
        self._layers = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the held directions, their eigenvalues, and the traces.

        Returns:
            The state.
        """
        return {"basis": self.basis_, "values": self.values_, "trace": self.trace_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: it does not fit the model attached.
        """
        for name, basis in state["basis"].items():
            group = self._layers.get(name)
            if group is None or basis.shape[0] != group[0].B.shape[0]:
                there = "no such layer" if group is None else f"{group[0].B.shape[0]} outputs"
                raise errors.CheckpointError(
                    f"the saved directions of {name!r} are for {basis.shape[0]} outputs, but the "
                    f"model attached has {there}"
                )
        devices = {name: group[0].A.device for name, group in self._layers.items()}
        self.basis_ = {n: t.detach().clone().to(devices[n]) for n, t in state["basis"].items()}
        self.values_ = {n: t.detach().clone().to(devices[n]) for n, t in state["values"].items()}
        self.trace_ = {name: float(trace) for name, trace in state["trace"].items()}

    def _held(self) -> list[str]:
        return [name for name in self._layers if name in self.basis_]

    def _params(self, name: str) -> list[nn.Parameter]:
        return [p for site in self._layers[name] for p in (site.A, site.B)]

    def _subspace(self, gram: Tensor) -> tuple[Tensor, Tensor, float]:
        trace = float(gram.diagonal().sum())
        basis, values = critical_subspace(gram, self.energy)
        if self.normalise == "trace" and trace > 0.0:
            values = values * (gram.shape[0] / trace)
        elif self.normalise == "top" and len(values):
            values = values / values[0]
        return basis, values, trace

    def _terms(
        self, name: str, factors: Sequence[Tensor], *, inert: bool = False
    ) -> dict[str, Tensor]:
        """Return the terms of a layer from its ``A, B, A, B, ...``, wholes in float32 or more."""
        group = self._layers[name]
        pairs = zip(group, factors[::2], factors[1::2], strict=True)
        updates = [Product(site.scaling * b, a) for site, a, b in pairs]
        basis, values = (held[name].to(updates[0].left) for held in (self.basis_, self.values_))
        metric = None if self.task_metric is None else self.task_metric[name].to(updates[0].left)
        base = _whole(group[0].base) if self.large == "weight" else None
        return layer_terms(
            updates,
            basis,
            values,
            two_branch=self.mode == "two_branch",
            metric=metric,
            base=base,
            beta=self.beta,
            tau=self.tau,
            reduce=self.reduce,
            overlap=inert or self.collision * self.overlap > 0.0,
            geodesic=inert or self._geodesic() > 0.0,
        )

    def _geodesic(self) -> float:
        """Return the weight of E_geo, which says nothing about two parts of one update."""
        return self.collision * (1.0 - self.overlap) if self.mode == "two_branch" else 0.0

    def _all_terms(self, *, inert: bool = False) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in self._held():
                factors = [_whole(p) for p in self._params(name)]
                for term, value in self._terms(name, factors, inert=inert).items():
                    sums[term] = sums[term] + value.to(sums[term]) if term in sums else value
        return sums

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        weights = {
            "aligned": self.aligned,
            "task": self.task,
            "overlap": self.collision * self.overlap,
            "geodesic": self._geodesic(),
        }
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def _base(site: Site) -> nn.Parameter:
    return site.layer.get_base_layer().weight  # type: ignore[operator]


def _whole(tensor: Tensor) -> Tensor:
    """Return a detached tensor of the whole shape in float32 or more; under FSDP2 this communicates."""
    gather = getattr(tensor, "full_tensor", None)
    whole = (tensor if gather is None else gather()).detach()
    return whole.to(torch.promote_types(whole.dtype, torch.float32))
