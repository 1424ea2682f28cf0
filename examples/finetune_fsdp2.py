"""Fine-tune a causal language model under FSDP2 and hold what it knew, with L2 or EWC.

The weights, their gradients, Adam's moments, the anchors and the importances are all sharded over
the processes. Two processes on one machine::

    torchrun --standalone --nproc-per-node 2 examples/finetune_fsdp2.py MODEL \\
        --train new.txt --old old.txt --method ewc --out tuned

MODEL is a Hugging Face folder or hub name. `new.txt` has one text a line (or `.jsonl`, a field
"text" a line). `old.txt` is text of the kind that must survive: EWC measures on it which weights
matter, and both methods report the loss on a held-out tenth of it. `tuned/` is a Hugging Face folder
again; `tuned/checkpoints/` is what `--resume` goes on from, also with another number of processes.
Without torchrun the script runs as one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import guywire as gw

STRENGTHS = {"none": 0.0, "l2": 0.01, "ewc": 1.0}


def arguments(words: list[str] | None) -> argparse.Namespace:
    """Read the command line; refuse what cannot work before anything is loaded."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a Hugging Face folder or hub name; each process loads it in turn")
    add("--train", type=Path, required=True, metavar="FILE", help="the new text, a text a line")
    add("--old", type=Path, metavar="FILE", help="text of the kind that must survive")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the tuned model goes")
    add("--method", choices=STRENGTHS, default="l2", help="what holds the weights (default: l2)")
    add(
        "--strength",
        type=float,
        help="how hard; search by decades: too little forgets, too much does not learn "
        f"(default: {', '.join(f'{v:g} for {k}' for k, v in STRENGTHS.items() if v)})",
    )
    add("--fisher-blocks", type=int, default=256, help="EWC reads so many blocks of old text")
    add("--steps", type=int, default=200, help="optimiser steps in all")
    add("--batch-size", type=int, default=16, help="blocks a step, over all processes")
    add("--accumulate", type=int, default=1, help="micro-batches a step: less memory, same result")
    add("--length", type=int, default=128, help="tokens a block")
    add("--lr", type=float, default=1e-4, help="of AdamW, constant")
    add(
        "--clip",
        type=float,
        default=1.0,
        help="norm of the loss's gradient; the pull is added after",
    )
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: compute so, keep fp32")
    add(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    add("--save-every", type=int, default=100, metavar="STEPS", help="between checkpoints")
    add(
        "--stop-after",
        type=int,
        metavar="STEP",
        help="save and leave there: for queues with a limit",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--seed", type=int, default=0, help="of the order of blocks")
    args = parser.parse_args(words)
    for name in ("steps", "batch_size", "accumulate", "length", "save_every", "fisher_blocks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if args.strength is None:
        args.strength = STRENGTHS[args.method]
    if args.method == "ewc" and args.old is None:
        parser.error("--method ewc needs --old FILE: it measures there which weights matter")
    for path in filter(None, (args.train, args.old)):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    if args.out.exists() and not args.resume and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty: add --resume, or name a new folder")
    if args.resume and not checkpoints(args.out):
        parser.error(f"--resume: there is no checkpoint in {args.out / 'checkpoints'}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    share = args.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % share:
        parser.error(
            f"--batch-size {args.batch_size} must be a multiple of processes x --accumulate = {share}"
        )
    return args


class Parser(argparse.ArgumentParser):
    """Says what is wrong once, not once a process."""

    def error(self, message: str) -> NoReturn:
        """Print and leave with code 2."""
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"finetune_fsdp2: {message}\n")
        raise SystemExit(2)


def main(words: list[str] | None = None) -> None:
    """Load, shard, attach, train, save."""
    args = arguments(words)
    device = join(args.device)
    try:
        run(args, device)
    finally:
        dist.destroy_process_group()


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Do all but starting and ending."""
    tokenizer, model = load(args)
    train, held_out = blocks(args.train, tokenizer, args.length)
    old, old_held_out = (
        (None, None) if args.old is None else blocks(args.old, tokenizer, args.length)
    )
    torch.manual_seed(args.seed + dist.get_rank())  # for dropout

    model = shard(model, device, args.precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    # After fully_shard: the anchors are then sharded as the parameters are.
    wires = gw.attach(model, optimizer, regularizers(args))

    def report(when: str) -> None:
        texts = {"new": held_out, "old": old_held_out}
        losses = {k: evaluate(model, t, device) for k, t in texts.items() if t is not None}
        say(f"{when}: " + ", ".join(f"{k} loss {v:.4f}" for k, v in losses.items()))

    step = 0
    if args.resume:
        step = restore(checkpoints(args.out)[-1], model, optimizer, wires)
        say(f"on from step {step} with {dist.get_world_size()} processes")
    else:
        report("before")
        if args.method == "ewc":
            assert old is not None
            started = time.perf_counter()
            wires.consolidate(fisher_batches(old[: args.fisher_blocks], device))
            say(f"importances of the old text in {time.perf_counter() - started:.1f} s")

    started = time.perf_counter()
    last = min(args.steps, args.stop_after or args.steps)
    while step < last:
        loss = train_step(model, optimizer, train, step, args, device)
        step += 1
        if step % max(1, args.steps // 10) == 0 or step == last:
            pace = (time.perf_counter() - started) / 60
            say(
                f"step {step}: loss {loss:.4f}, penalty {float(wires.penalty()):.4g}, {pace:.1f} min"
            )
        if step % args.save_every == 0 or step == last:
            save(args.out / "checkpoints" / f"step-{step:08d}", model, optimizer, wires, step)
    if step < args.steps:
        say(f"stopped after step {step}; --resume goes on")
        return
    report("after")
    export(args.out, args.model, model, tokenizer)
    say(f"saved {args.out}")


def join(device: str) -> torch.device:
    """Join the other processes: nccl between GPUs, gloo between CPUs."""
    gpu = device != "cpu" and torch.cuda.is_available()
    backend = "nccl" if gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not gpu:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def load(args: argparse.Namespace) -> tuple[Any, nn.Module]:
    """Load tokenizer and model, one process after another, so that a disk serves one at a time."""
    import transformers

    found = None
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    args.model, dtype=torch.float32
                )
            except (OSError, ValueError) as error:
                fail(f"cannot load {args.model!r}: {str(error).splitlines()[0]}")
            found = tokenizer, model
        dist.barrier()
    assert found is not None
    longest = getattr(found[1].config, "max_position_embeddings", args.length)
    if args.length > longest:
        fail(f"--length {args.length}: this model reads at most {longest} tokens")
    return found


def blocks(path: Path, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Pack a file's texts into blocks of tokens, ``[n, length]``: to train on, and a held-out tenth.

    Every tenth text is held out. What does not fill the last block is dropped, so no block has
    padding and the mean over blocks is the mean over tokens.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["text"] for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            fail(f'{path}: each line must be JSON with a field "text" ({error!r})')
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    packed = []
    for part in (
        [t for i, t in enumerate(lines) if i % 10 != 9],
        [t for i, t in enumerate(lines) if i % 10 == 9],
    ):
        ids = tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        stream = [token for text in ids for token in (*text, *end)]
        count = len(stream) // length
        if count == 0:
            fail(f"{path}: {len(lines)} texts fill no block of {length} tokens, a tenth held out: "
                 "give more text or a shorter --length")  # fmt: skip
        packed.append(torch.tensor(stream[: count * length]).view(count, length))
    return packed[0], packed[1]


def shard(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """Shard each decoder layer, then what is left (embeddings, final norm, head) as one more group."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        fail(f"{type(model).__name__} does not say which of its modules are decoder layers")
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def regularizers(args: argparse.Namespace) -> list[gw.Regularizer]:
    """Return what holds the weights."""
    if args.method == "l2":
        return [gw.L2(args.strength, anchor="initial")]
    if args.method == "ewc":
        # True labels: the default's expectation is over the whole vocabulary, position by position.
        return [gw.EWC(args.strength, labels="true")]
    return []


def fisher_batches(old: Tensor, device: torch.device, size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Yield this process's part of the old text; every process yields equally often."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = old[: len(old) // world * world][rank::world]
    if len(mine) == 0:
        fail(
            f"{len(old)} blocks of old text are fewer than processes: give more, or fewer of these"
        )
    for part in mine.split(size):
        part = part.to(device)
        yield {"input_ids": part, "labels": part}


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    data: Tensor,
    step: int,
    args: argparse.Namespace,
    device: torch.device,
) -> float:
    """Do one step; which blocks it sees depends on its number alone, not on who computes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wanted = range(step * args.batch_size, (step + 1) * args.batch_size)
    chosen = torch.stack([data[order(len(data), i // len(data), args.seed)[i % len(data)]]
                          for i in wanted])  # fmt: skip
    total = torch.zeros((), device=device)
    model.train()
    for i, part in enumerate(chosen[rank::world].chunk(args.accumulate)):
        # Gradients stay whole and local until the last micro-batch, then are reduced once.
        model.set_requires_gradient_sync(i == args.accumulate - 1)
        part = part.to(device)
        loss = model(input_ids=part, labels=part).loss / args.accumulate
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()  # the wires pull in here
    optimizer.zero_grad()
    dist.all_reduce(total)
    value = float(total) / world
    if not math.isfinite(value):
        fail(f"the loss is {value} at step {step + 1}: lower --lr or --strength")
    return value


_ORDERS: dict[tuple[int, int, int], Tensor] = {}


def order(length: int, epoch: int, seed: int) -> Tensor:
    """Return an epoch's order of blocks."""
    key = (length, epoch, seed)
    if key not in _ORDERS:
        _ORDERS.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _ORDERS[key] = torch.randperm(length, generator=generator)
    return _ORDERS[key]


@torch.no_grad()
def evaluate(model: Any, data: Tensor, device: torch.device, size: int = 8) -> float:
    """Return the mean loss over blocks, the same on every process."""
    world, rank = dist.get_world_size(), dist.get_rank()
    total = torch.zeros(2, dtype=torch.float32, device=device)
    model.eval()
    for i in range(0, len(data), size * world):
        mine = data[i : i + size * world][rank::world]
        # A forward pass gathers weights from all: who has no block left runs along for nothing.
        part = (mine if len(mine) else data[:1]).to(device)
        loss = model(input_ids=part, labels=part).loss
        total += torch.tensor([float(loss) * len(mine), len(mine)], device=device)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def checkpoints(out: Path) -> list[Path]:
    """Return the whole checkpoints, the oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def save(folder: Path, model: Any, optimizer: Any, wires: gw.Wires, step: int) -> None:
    """Save model, optimiser and wires: each process its shards, into a folder that appears whole."""
    aside = folder.with_name(f".{folder.name}.tmp")
    weights, moments = states.get_state_dict(model, optimizer)
    tree = {
        "model": weights,
        "optimizer": moments,
        "wires": gw.sharded_state(wires),
        "step": torch.tensor(step),
    }
    dcp.save(tree, checkpoint_id=aside)
    if dist.get_rank() == 0:
        aside.rename(folder)
        for older in checkpoints(folder.parent.parent)[:-1]:
            shutil.rmtree(older)
    dist.barrier()


def restore(folder: Path, model: Any, optimizer: Any, wires: gw.Wires) -> int:
    """Take back what ``save`` wrote, on any number of processes."""
    weights, moments = states.get_state_dict(model, optimizer)
    step = torch.tensor(0)
    tree = {
        "model": weights,
        "optimizer": moments,
        "wires": gw.sharded_state(wires, folder),
        "step": step,
    }
    dcp.load(tree, checkpoint_id=folder)
    states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(step)


def export(out: Path, name: str, model: Any, tokenizer: Any) -> None:
    """Write a plain Hugging Face folder from the first process."""
    import transformers

    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = states.get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        # Not model.save_pretrained: its class is FSDP's now, and config.json would say so.
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(name), dtype=torch.float32
            )
        plain.load_state_dict(whole, assign=True)
        plain.tie_weights()
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
    dist.barrier()


def say(text: str) -> None:
    """Print once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def fail(text: str) -> NoReturn:
    """Say once what is wrong, and leave with code 1."""
    if dist.get_rank() == 0:
        sys.stderr.write(f"finetune_fsdp2: {text}\n")
    raise SystemExit(1)


if __name__ == "__main__":
    main()
