"""Train a small vision transformer on drawings, as a pretrained model to fine-tune.

It learns the subgroups of `renditions` that are *not* among the largest ones, in all four drawing
styles, and is saved as a Hugging Face folder. The largest subgroups stay unseen, for a comparison::

    python examples/pretrain_vit.py vit-drawings --leave-out 10
    guywire compare --data renditions --scenario domain --classes 10 --image-size 32 \\
        --model hf:vit-drawings --methods finetune,l2,ewc,hft,lora,i-lora,pego,replay,joint
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from guywire.lab import models, streams
from guywire.lab.models.huggingface import Encoder

WIDTH = 128


def main() -> None:
    """Read the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--leave-out", type=int, default=10, help="so many largest subgroups")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists: name a new folder")

    stream = drawings(args.leave_out, args.image_size)
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    (task,) = stream.tasks
    backbone = transformers.ViTModel(config(args.image_size), add_pooling_layer=False)
    model = models.Classifier(Encoder(backbone, "image", WIDTH), WIDTH)
    model.grow(len(task.classes), generator)
    train(model, stream, args.epochs, generator)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in stream.loader(task.test, 256))
    print(f"{right / len(task.test):.1%} of {len(task.test)} drawings of emoji not trained on")
    save(backbone, stream, args.folder)


def config(size: int) -> transformers.ViTConfig:
    """Return the architecture: 4 layers, 0.8M parameters, patches of 8 pixels."""
    return transformers.ViTConfig(
        image_size=size,
        patch_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def drawings(leave_out: int, size: int) -> streams.Stream:
    """Return all subgroups in one task, less the largest ones."""
    settings: dict[str, Any] = {
        "data": "renditions",
        "tasks": 1,
        "image_size": size,
        "class_order": "given",
    }
    largest = streams.load(streams.StreamConfig(**settings, classes=leave_out)).class_names
    stream = streams.load(streams.StreamConfig(**settings))
    kept = [i for i, name in enumerate(stream.class_names) if name not in largest]
    number = torch.full((len(stream.class_names),), -1)
    number[kept] = torch.arange(len(kept))

    def only(split: streams.Split) -> streams.Split:
        mine = split.subset((number[split.labels] >= 0).nonzero().flatten())
        return replace(mine, labels=number[mine.labels])

    (task,) = stream.tasks
    task = replace(
        task,
        classes=tuple(range(len(kept))),
        **{part: only(getattr(task, part)) for part in ("train", "valid", "test")},
    )
    return replace(stream, tasks=(task,), class_names=tuple(stream.class_names[i] for i in kept))


def train(
    model: models.Classifier, stream: streams.Stream, epochs: int, draw: torch.Generator
) -> None:
    """Train with AdamW and a rate that rises, then falls to zero."""
    split = stream.tasks[0].train
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(split) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for x, y in stream.batches(split, 128, draw):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(y)
        print(
            f"epoch {epoch + 1}: loss {total / len(split):.2f}, {time.perf_counter() - start:.0f} s"
        )


def save(model: Any, stream: streams.Stream, folder: Path) -> None:
    """Save weights, configuration and how images are to be normalised."""
    model.save_pretrained(folder)
    mean, std = stream.mean, stream.std
    assert mean is not None
    assert std is not None
    transformers.ViTImageProcessorPil(
        size={"height": stream.shape[1], "width": stream.shape[2]},
        image_mean=mean.tolist(),
        image_std=std.tolist(),
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
