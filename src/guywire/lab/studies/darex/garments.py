"""Part A: a network that knows digits is fine-tuned on garments; then its change is pruned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core import losses
from guywire.core.checkpoint import load, save
from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.darex import pruning
from guywire.lab.studies.darex.pruning import Bed
from guywire.lab.studies.study import Work
from guywire.methods import merging

__all__ = ["Network", "pretrain_digits", "prune_garments", "samples", "tune_garments"]

WEIGHTS = "digits.safetensors"
_LARGER = 10.0
Data = tuple[Tensor, Tensor]


class Network(nn.Module):
    """A perceptron with two hidden layers: ``encoder``, which is pruned, and ``head``.

    Args:
        width: of the hidden layers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Args:
            x: images, ``[B, 784]``.

        Returns:
            ``[B, 10]``.
        """
        return self.head(self.encoder(x))


def pretrain_digits(work: Work) -> list[dict[str, Any]]:
    """Train the network on digits and leave its weights.

    Args:
        work: of the study.

    Returns:
        One row: the accuracy on test digits.
    """
    s = work.settings
    train, _, test = samples("mnist", s["pretraining_samples"], 0, s["test"], 0)
    with seeded(work.generator("network")):
        model = Network(s["width"])
    optimizer = torch.optim.Adam(model.parameters(), lr=s["pretraining_rate"])
    _train(model, optimizer, train, s["pretraining_epochs"], s["batch"], work.generator("digits"))
    save(work.leaves(WEIGHTS), {n: p.detach() for n, p in model.encoder.named_parameters()})
    return [work.row("accuracy", pruning.accuracy(model, _split(test)))]


def tune_garments(
    work: Work,
    *,
    arm: str,
    rate: float,
    strength: float = 0.0,
    floor: float = 0.0,
) -> list[dict[str, Any]]:
    """Fine-tune and measure on validation data alone, to choose rates and strengths.

    Args:
        work: of the study.
        arm: ``plain``, ``AdamR-L2``, ``AdamR-L1`` or ``LoRA``.
        rate: learning rate.
        strength: of AdamR.
        floor: unpruned accuracy below which a strength does not count.

    Returns:
        Rows: ``valid_accuracy`` unpruned, and ``valid_score``: the accuracy after pruning at the
        largest rate (DARE, or MP after L1); where the unpruned one lies below the floor, how far,
        less 1, so that any strength above the floor is better.
    """
    s = work.settings
    bed = _bed(work, arm, rate, strength)
    unpruned = pruning.accuracy(bed.model, bed.valid)
    rows = [work.row("valid_accuracy", unpruned)]
    if strength > 0.0:
        judged = Bed(
            bed.model, bed.base, bed.tuned, bed.valid, bed.valid, bed.search_masks, bed.search_masks
        )
        method = "MP" if arm == "AdamR-L1" else "DARE"
        pruned = pruning.measure(judged, s["rates"][-1], [method])[method].accuracy
        score = pruned if unpruned >= floor else unpruned - floor - 1.0
        rows.append(work.row("valid_score", score))
    return rows


def prune_garments(
    work: Work, *, arm: str, rate: float, strength: float = 0.0
) -> list[dict[str, Any]]:
    """Fine-tune once and prune at every rate by every method that belongs to the arm.

    Args:
        work: of the study.
        arm: as for :func:`tune_garments`, or ``large``: plain, at ten times the learning rate.
        rate: learning rate.
        strength: of AdamR.

    Returns:
        Rows with the method in the condition: ``accuracy at RATE`` with ``spread`` and ``q``.
    """
    s = work.settings
    bed = _bed(work, arm, rate, strength)
    methods = {
        "plain": pruning.METHODS,
        "AdamR-L2": ("DARE",),
        "AdamR-L1": ("MP",),
        "large": ("DARE", "1/q_e", "MP", "WANDA"),
        "LoRA": ("DARE", "1/q_v", "MP"),
    }[arm]
    rows = [
        _named(work, arm, "unpruned", "accuracy", pruning.accuracy(bed.model, bed.test)),
        _named(work, arm, "unpruned", "change", _size(bed)),
    ]
    for dropped in s["large_rates"] if arm == "large" else s["rates"]:
        for method, found in pruning.measure(bed, dropped, methods).items():
            rows += [
                _named(work, arm, method, f"accuracy at {dropped}", found.accuracy),
                _named(work, arm, method, f"spread at {dropped}", found.spread),
                _named(work, arm, method, f"q at {dropped}", found.q),
                {**_named(work, arm, method, "accuracy", found.accuracy), "step": dropped},
            ]
    if arm == "plain":
        name = "encoder.2.weight"
        delta = bed.tuned[name] - bed.base[name]
        with torch.no_grad():
            first = bed.model.get_submodule("encoder.0")
            hidden = first(bed.valid[0][0][:1]).relu()[0]
        ratio = pruning.output_variance(delta, hidden, s["rates"][-1], s["variance_masks"])
        rows.append(_named(work, arm, "DARE", "variance ratio", ratio))
    return rows


@lru_cache(maxsize=8)
def samples(name: str, train: int, valid: int, test: int, seed: int) -> tuple[Data, Data, Data]:
    """Return normalised images as vectors with their labels.

    Args:
        name: ``mnist`` or ``fashion-mnist``.
        train: how many to train on.
        valid: how many others of the training part to choose by.
        test: how many of the test part, the same for every seed.
        seed: of the choice.

    Returns:
        Three pairs ``([N, 784], [N])``.
    """
    config = streams.StreamConfig(data=name, tasks=1, valid_fraction=0.0, class_order="given")
    stream = streams.load(config)
    (task,) = stream.tasks
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
    parts = (
        task.train.subset(order[:train]),
        task.train.subset(order[train : train + valid]),
        task.test.subset(torch.arange(test) * (len(task.test) // test)),
    )
    found = []
    for part in parts:
        pairs: list[Any] = list(stream.batches(part, 1000)) if len(part) else []
        images = [x.flatten(1) for x, _ in pairs] or [torch.empty(0, 784)]
        found.append((torch.cat(images), torch.cat([y for _, y in pairs] or [part.labels])))
    return found[0], found[1], found[2]


def _bed(work: Work, arm: str, rate: float, strength: float) -> Bed:
    s = work.settings
    train, valid, test = samples(
        "fashion-mnist", s["samples"], s["valid"], s["test"], work.number("garments") % 2**31
    )
    with seeded(work.generator("head")):
        model = Network(s["width"])
    body = load(work.folder / WEIGHTS)
    model.encoder.load_state_dict(body)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = _fine_tune(work, model, base, arm, rate, strength, train)
    bed = Bed(
        model,
        base,
        tuned,
        _split(valid),
        _split(test),
        range(s["masks"]),
        range(100, 100 + s["masks"]),
    )
    bed.put(tuned)
    return bed


def _fine_tune(
    work: Work,
    model: Network,
    base: dict[str, Tensor],
    arm: str,
    rate: float,
    strength: float,
    train: Data,
) -> dict[str, Tensor]:
    s = work.settings
    shuffle = work.generator("shuffle")
    if arm == "LoRA":
        return _fine_tune_lora(work, model, rate, train)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=rate * (_LARGER if arm == "large" else 1), fused=True
    )
    held: list[gw.Regularizer] = []
    if arm.startswith("AdamR"):
        body = {n: p for n, p in base.items() if not n.startswith("head.")}
        kind = "l2" if arm == "AdamR-L2" else "l1"
        held = [gw.AdamR(strength, kind=kind, anchor=body, select="!head.*")]
    with gw.attach(model, optimizer, held):
        _train(model, optimizer, train, s["epochs"], s["batch"], shuffle)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _fine_tune_lora(work: Work, model: Network, rate: float, train: Data) -> dict[str, Tensor]:
    """Tune low-rank factors and the head; what is pruned is the merged update."""
    peft = need("peft", extra="adapters")
    s = work.settings
    with seeded(work.generator("factors")):
        config = peft.LoraConfig(
            r=s["rank"], lora_alpha=s["rank"], target_modules=["encoder.0", "encoder.2"]
        )
        adapted = peft.inject_adapter_in_model(config, _copy(model))
    for p in adapted.head.parameters():
        p.requires_grad_(True)
    moving = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=rate, fused=True)
    _train(adapted, optimizer, train, s["epochs"], s["batch"], work.generator("shuffle"))
    for layer in (adapted.encoder[0], adapted.encoder[2]):
        layer.merge()
    return {
        n.replace(".base_layer", ""): p.detach().clone()
        for n, p in adapted.named_parameters()
        if "lora_" not in n
    }


def _copy(model: Network) -> Network:
    other = Network(model.head.in_features)
    other.load_state_dict(model.state_dict())
    return other


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    epochs: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    model.train()
    for _ in range(epochs):
        for x, y in _shuffled(data, batch, generator):
            loss = losses.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _shuffled(data: Data, batch: int, generator: torch.Generator) -> Iterator[Data]:
    for rows in torch.randperm(len(data[1]), generator=generator).split(batch):
        yield data[0][rows], data[1][rows]


def _split(data: Data, size: int = 1000) -> list[Data]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def _size(bed: Bed) -> float:
    """Return the mean absolute change of a weight."""
    names = merging.prunable(bed.base, bed.tuned, exclude="head.*")
    total = sum(float((bed.tuned[n] - bed.base[n]).abs().sum()) for n in names)
    return total / sum(bed.base[n].numel() for n in names)


def _named(work: Work, arm: str, method: str, metric: str, value: float) -> dict[str, Any]:
    condition = f"garments: {method}" if arm == "plain" else f"garments, {arm}: {method}"
    return {**work.row(metric, value), "condition": condition}
