"""Part A: a small vision transformer on garments, made thinner, repaired, and put to digits."""

from __future__ import annotations

import statistics
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core.checkpoint import load, save
from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.models.seeding import seeded
from guywire.lab.streams.idx import find_idx, read_idx
from guywire.lab.studies.study import Work
from guywire.methods.adapters.low_rank import LowRank

__all__ = ["original_of", "repair", "train_original"]

_START = "original.safetensors"
# The last images of the training file are never trained on: rates and weights are chosen on them.
_VALID = 3000


def train_original(work: Work) -> list[dict[str, Any]]:
    """Train the original on garments; leave its weights.

    Args:
        work: of the study.

    Returns:
        One row: its accuracy.
    """
    s = work.settings
    model = _vit(work.generator("network"))
    images, labels = _data("fashion-mnist", "train")
    images, labels = images[:-_VALID], labels[:-_VALID]
    _train(
        model, None, images, labels, steps=s["a_steps"], batch=s["a_batch"], rate=s["a_rate"],
        generator=work.generator("batches"),
    )  # fmt: skip
    save(work.leaves(_START), {k: v.detach() for k, v in model.state_dict().items()})
    test = _data("fashion-mnist", "test")
    return [work.row("accuracy", _accuracy(model, *test, s["a_test"]))]


def original_of(work: Work) -> nn.Module:
    """Return the trained original.

    Args:
        work: of the study.

    Returns:
        The model.
    """
    model = _vit(torch.Generator().manual_seed(0))
    model.load_state_dict(load(work.folder / _START))  # pyright: ignore[reportArgumentType]
    return model


def repair(
    work: Work,
    *,
    ratio: float,
    rate: float,
    init: str = "svd",
    feature: float = 0.0,
    perturbation: float = 0.0,
    downstream: bool = False,
    timed: bool = False,
    tune: bool = False,
) -> list[dict[str, Any]]:
    """Make the original thinner (not at ratio 1) and train it on.

    Args:
        work: of the study.
        ratio: how many times fewer weights its linear layers get.
        rate: learning rate.
        init: of the factors.
        feature: weight of the blocks' distillation.
        perturbation: weight of the bound on the weights.
        downstream: fine-tune on digits as well.
        timed: measure the forward pass beside the original's.
        tune: measure on validation images only.

    Returns:
        Rows: accuracies before, after and downstream, and sizes.
    """
    s = work.settings
    teacher = original_of(work)
    model = teacher
    if ratio > 1.0:
        start: Any = init
        model = gw.factorize(teacher, ratio, init=start, seed=work.seed)
    else:
        teacher = original_of(work)
    images, labels = _data("fashion-mnist", "train")
    held = (images[-_VALID:], labels[-_VALID:]) if tune else _data("fashion-mnist", "test")
    count = _VALID if tune else s["a_test"]
    out = [] if tune else [work.row("before", _accuracy(model, *held, count))]
    regularizer = None
    if feature or perturbation:
        regularizer = gw.PELA(teacher, feature=feature, perturbation=perturbation)
    _train(
        model, regularizer, images[:-_VALID], labels[:-_VALID], steps=s["a_repair_steps"],
        batch=s["a_batch"], rate=rate, generator=work.generator("repair"),
    )  # fmt: skip
    accuracy = _accuracy(model, *held, count)
    if tune:
        return [work.row("valid", accuracy)]
    out.append(work.row("accuracy", accuracy))
    out.append(work.row("weights", _weights(model) / _weights(teacher)))
    if ratio > 1.0:
        out.append(work.row("deviation", _deviation(model, teacher)))
    if timed:
        out.append(work.row("time", _time(model, teacher, s["a_batch"])))
    if downstream:
        out.append(work.row("downstream", _downstream(work, model)))
    return out


def _downstream(work: Work, model: nn.Module) -> float:
    """Fine-tune on some digits with a new head; return the accuracy."""
    s = work.settings
    with seeded(work.generator("head")):
        model.classifier = nn.Linear(128, 10)
    images, labels = _data("mnist", "train")
    chosen = torch.randperm(len(labels), generator=work.generator("digits"))[: s["a_digits"]]
    _train(
        model, None, images[chosen], labels[chosen], steps=s["a_digit_steps"], batch=64,
        rate=s["a_rate"], generator=work.generator("digit batches"),
    )  # fmt: skip
    return _accuracy(model, *_data("mnist", "test"), s["a_test"])


def _train(
    model: nn.Module,
    regularizer: gw.PELA | None,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps + 1, pct_start=0.1
    )
    model.train()
    with gw.attach(model, optimizer, [regularizer] if regularizer else []) as wires:
        for _ in range(steps):
            rows = torch.randint(len(labels), (batch,), generator=generator)
            data = {"pixel_values": _scaled(images[rows]), "labels": labels[rows]}
            outputs = model(pixel_values=data["pixel_values"])
            loss = nn.functional.cross_entropy(outputs.logits, data["labels"])
            optimizer.zero_grad()
            (loss + wires.loss(data, outputs)).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor, count: int) -> float:
    model.eval()
    right = 0
    for at in torch.arange(count).split(250):
        logits = model(pixel_values=_scaled(images[at])).logits
        right += int((logits.argmax(1) == labels[at]).sum())
    return right / count


def _weights(model: nn.Module) -> int:
    """Return the weights of the blocks' linear layers."""
    blocks: Any = model.vit.layers  # pyright: ignore[reportAttributeAccessIssue]
    return sum(p.numel() for p in blocks.parameters() if p.dim() == 2)


@torch.no_grad()
def _deviation(model: nn.Module, teacher: nn.Module) -> float:
    """Return the largest entry of a weight's deviation, the mean over layers."""
    gaps = [
        float((m.weight.dense() - teacher.get_submodule(name).weight).abs().max())  # pyright: ignore
        for name, m in model.named_modules()
        if isinstance(m, LowRank)
    ]
    return statistics.fmean(gaps)


@torch.no_grad()
def _time(model: nn.Module, teacher: nn.Module, batch: int, rounds: int = 9) -> float:
    """Return the forward pass's processor time over the original's, the median of rounds."""
    images = _scaled(_data("fashion-mnist", "test")[0][:batch])
    model.eval()
    teacher.eval()
    ratios = []
    for _ in range(rounds):
        spent = []
        for one in (teacher, model):
            begun = time.process_time()
            one(pixel_values=images)
            spent.append(time.process_time() - begun)
        ratios.append(spent[1] / spent[0])
    return statistics.median(ratios)


def _scaled(images: Tensor) -> Tensor:
    return images.float().div_(255.0).sub_(0.3).div_(0.35).unsqueeze(1)


@lru_cache(maxsize=4)
def _data(name: str, part: str) -> tuple[Tensor, Tensor]:
    folder = streams.data_folder() / name
    files = find_idx(folder)
    which = "train" if part == "train" else "t10k"
    found = []
    for kind in ("images", "labels"):
        path = next(p for p in files.values() if which in p.name and kind in p.name)
        found.append(torch.from_numpy(read_idx(path).copy()))
    images, labels = found
    return images, labels.long()


def _vit(generator: torch.Generator) -> Any:
    transformers = need("transformers", extra="hf")
    config = transformers.ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with seeded(generator):
        model = transformers.ViTForImageClassification(config)
        # The first values of transformers, 0.02, are for wide models. At this width what is learnt in
        # a few hundred steps would be all there is, of a rank so low that nothing can be cut away.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return model
