"""The drawings, the U-Net, its pretraining, and its error on emoji that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core.checkpoint import load, save
from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.study import Work

__all__ = ["START", "Diffusion", "errors", "pretrain", "start", "take_away"]

START = "start.safetensors"
SOURCE, TARGET = "openmoji-line", "noto"


class Diffusion:
    """The noise process and the loss of predicting it.

    Args:
        steps: of noise.
    """

    def __init__(self, steps: int) -> None:
        diffusers = need("diffusers", extra="dev")
        self.steps = steps
        self.scheduler: Any = diffusers.DDPMScheduler(
            num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2"
        )

    def loss(self, model: nn.Module, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the mean squared error of the predicted noise.

        Args:
            model: a U-Net.
            images: ``[B, 3, S, S]`` from -1 to 1.
            noise: like them.
            times: ``[B]``.

        Returns:
            A 0-d tensor.
        """
        noisy = self.scheduler.add_noise(images, noise, times)
        return nn.functional.mse_loss(model(noisy, times).sample, noise)

    def draw(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return noise and times for a batch.

        Args:
            images: the batch.
            generator: to draw from.

        Returns:
            Noise, and times ``[B]``.
        """
        noise = torch.randn(images.shape, generator=generator)
        return noise, torch.randint(self.steps, (len(images),), generator=generator)


def pretrain(work: Work) -> list[dict[str, Any]]:
    """Train the U-Net on line drawings; leave its weights and the drawings.

    Args:
        work: of the study.

    Returns:
        Rows: the loss of the first and the last tenth of the steps.
    """
    s = work.settings
    parts = _drawings(s)
    with seeded(work.generator("weights")):
        model = unet(s)
    process = Diffusion(s["noise_steps"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["start_rate"])
    schedule = cosine(optimizer, s["start_steps"])
    generator = work.generator("pretraining")
    losses = []
    for _ in range(s["start_steps"]):
        images = batch(parts["source train"], s["start_batch"], generator)
        loss = process.loss(model, images, *process.draw(images, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    save(work.leaves(START), {"weights": dict(model.state_dict()), "parts": parts})
    tenth = max(1, len(losses) // 10)
    return [
        work.row("first_loss", sum(losses[:tenth]) / tenth),
        work.row("last_loss", sum(losses[-tenth:]) / tenth),
        work.row("weights", sum(p.numel() for p in model.parameters())),
    ]


def take_away(work: Work) -> list[dict[str, Any]]:
    """Measure the pretrained U-Net, and what it loses without its smallest, or random, weights.

    Args:
        work: of the study.

    Returns:
        Rows: its errors on both styles, and by which share the old style's error rises.
    """
    s = work.settings
    model, parts = start(work)
    source, target = errors(work, model, parts, "test")
    params = dict(model.named_parameters())
    limit = gw.threshold_of_share(params.values(), s["taken"])
    masks = {
        "smallest": gw.smallest_masks(params, limit),
        "random": random_masks(params, s["taken"], work.generator("taken")),
    }
    rows = [work.row("source_error", source), work.row("target_error", target)]
    for kind, chosen in masks.items():
        less, _ = start(work)
        with torch.no_grad():
            for name, p in less.named_parameters():
                p.masked_fill_(chosen[name], 0.0)
        without, _ = errors(work, less, parts, "test")
        rows.append(work.row(f"rise_without_{kind}", without / source - 1.0))
    return rows


def start(work: Work) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a fresh copy of the pretrained U-Net, and the drawings.

    Args:
        work: of the study.

    Returns:
        The model, and images ``uint8 [N, 3, S, S]`` under names such as ``target test``.
    """
    saved = _start(work.folder / START)
    with seeded(torch.Generator().manual_seed(0)):
        model = unet(work.settings)
    model.load_state_dict(saved["weights"])
    return model, saved["parts"]


@torch.no_grad()
def errors(
    work: Work, model: nn.Module, parts: Mapping[str, Tensor], part: str
) -> tuple[float, float]:
    """Return the error of the predicted noise on the old style and on the new one.

    Noise and times are fixed for a seed, the times spread evenly.

    Args:
        work: of the study.
        model: a U-Net.
        parts: the drawings.
        part: ``valid`` or ``test``.

    Returns:
        Two mean squared errors.
    """
    s = work.settings
    process = Diffusion(s["noise_steps"])
    found = []
    for style in ("source", "target"):
        generator = work.generator(f"{style} {part}")
        images = parts[f"{style} {part}"]
        chosen = torch.randperm(len(images), generator=generator)[: s["evaluated"]]
        images = scaled(images[chosen])
        noise = torch.randn(images.shape, generator=generator)
        times = torch.linspace(0, process.steps - 1, len(images)).long()
        total = 0.0
        for at in torch.arange(len(images)).split(64):
            loss = process.loss(model, images[at], noise[at], times[at])
            total += float(loss) * len(at)
        found.append(total / len(images))
    return found[0], found[1]


def random_masks(
    params: Mapping[str, Tensor], share: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return masks of a random share of all entries.

    Args:
        params: names to tensors.
        share: of all entries together.
        generator: to draw from.

    Returns:
        Names to boolean masks.
    """
    draws = {n: torch.rand(p.shape, generator=generator) for n, p in params.items()}
    return gw.smallest_masks(draws, gw.threshold_of_share(draws.values(), share))


def batch(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return random images, from -1 to 1.

    Args:
        images: ``uint8 [N, 3, S, S]``.
        size: how many.
        generator: to draw from.

    Returns:
        ``[size, 3, S, S]``.
    """
    return scaled(images[torch.randint(len(images), (size,), generator=generator)])


def scaled(images: Tensor) -> Tensor:
    """Return images from -1 to 1.

    Args:
        images: ``uint8``.

    Returns:
        ``float32`` of the same shape.
    """
    return images.float() / 127.5 - 1.0


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that falls to zero along a cosine.

    Args:
        optimizer: whose rate.
        steps: until zero.

    Returns:
        The schedule.
    """
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def unet(settings: Mapping[str, Any]) -> nn.Module:
    """Return a U-Net of three levels, with attention on the lowest.

    Args:
        settings: of the study.

    Returns:
        The model.
    """
    diffusers = need("diffusers", extra="dev")
    return diffusers.UNet2DModel(
        sample_size=settings["side"],
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=tuple(settings["channels"]),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def _drawings(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the drawings by style and part; an emoji is in the same part in both styles.

    Some emoji share a drawing: as lines, all flags look alike. What is measured on is therefore
    without the drawings that occur in a part before it.
    """
    stream = streams.load(
        streams.StreamConfig(
            data="renditions",
            scenario="domain",
            image_size=settings["side"],
            test_fraction=settings["test_fraction"],
            valid_fraction=settings["valid_fraction"],
            min_per_class=2,
        )
    )
    parts: dict[str, Tensor] = {}
    names = {SOURCE: "source", TARGET: "target"}
    seen: dict[str, list[Tensor]] = {task.name: [] for task in stream.tasks}
    for part in ("train", "valid", "test"):
        for task in stream.tasks:
            if task.name in names:
                images = getattr(task, part).inputs
                parts[f"{names[task.name]} {part}"] = unseen(images, seen[task.name])
                seen[task.name].append(images)
    return parts


def unseen(images: Tensor, before: Sequence[Tensor]) -> Tensor:
    """Return the images that are not among others.

    Args:
        images: ``uint8 [N, ...]``.
        before: the others, in parts.

    Returns:
        Those of ``images`` that are in none of them, in their order.
    """
    known = {image.numpy().tobytes() for part in before for image in part}
    new = [image.numpy().tobytes() not in known for image in images]
    return images[torch.tensor(new, dtype=torch.bool)]


@lru_cache(maxsize=1)
def _start(path: Path) -> dict[str, Any]:
    return load(path)
