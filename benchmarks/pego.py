"""What PEGO costs: its penalty beside dense products, its forward pass beside one adapter.

Rows are measured interleaved, round by round in one process, and compared by medians of ratios
within a round, so that a noisy machine disturbs all rows alike.

    python benchmarks/pego.py [--json] [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core.regularizer import Step
from guywire.methods.adapters._lora import sites

WIDTH, MODULES, RANK, TOKENS = 768, 4, 4, 32 * 50
DENSE_LIMIT = 3.0  # dense products take at least this many times as long


def layer() -> nn.Module:
    """Return one projection of a ViT-B."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH))


def dense(base: Tensor, A: list[Tensor], B: list[Tensor]) -> Tensor:
    """Return the penalty as written in the paper."""
    updates = [b @ a for a, b in zip(A, B, strict=True)]
    total = sum((base @ d.T).abs().sum() for d in updates)
    for one, two in itertools.combinations(updates, 2):
        total = total + (one @ two.T).abs().sum()
    return total  # pyright: ignore[reportReturnType]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    plain = layer()
    group = gw.lora_group(layer(), MODULES, RANK, target_modules=["0"])
    config = peft.LoraConfig(r=MODULES * RANK, lora_alpha=MODULES * RANK, target_modules=["0"])
    single = peft.inject_adapter_in_model(config, layer())
    found = sites(group)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in (*found, *sites(single)):
            site.B.copy_(0.01 * torch.randn(site.B.shape, generator=generator))
    factors = [p for site in found for p in (site.A, site.B)]
    optimizer = torch.optim.SGD(factors, lr=0.0)
    pego = gw.PEGO(1e-3)
    pego.setup(group)
    step = Step(optimizer)
    x = torch.randn(TOKENS, WIDTH, generator=generator)

    def pull() -> None:
        with torch.no_grad():
            pego.before_step(step)

    def dense_pull() -> None:
        dense(found[0].base, [s.A for s in found], [s.B for s in found]).backward()

    def learn(model: nn.Module) -> Callable[[], None]:
        inputs = x.clone().requires_grad_()
        return lambda: model(inputs).sum().backward()

    rows = {
        "pull, factored": pull,
        "pull, dense": dense_pull,
        "layer": learn(plain),
        "layer, group of 4": learn(group),
        "layer, one LoRA of equal size": learn(single),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(args.rounds + 2):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(time.perf_counter() - start)

    def ratio(one: str, two: str) -> list[float]:
        return [a / b for a, b in zip(times[one], times[two], strict=True)]

    each = {
        "dense_over_factored": ratio("pull, dense", "pull, factored"),
        "pull_over_layer": ratio("pull, factored", "layer"),
        "group_over_layer": ratio("layer, group of 4", "layer"),
        "group_over_one_lora": ratio("layer, group of 4", "layer, one LoRA of equal size"),
    }
    medians = {name: statistics.median(found) for name, found in each.items()}
    result = {
        "width": WIDTH,
        "modules": MODULES,
        "rank": RANK,
        "tokens": TOKENS,
        "threads": args.threads,
        "pull_seconds": statistics.median(times["pull, factored"]),
        **medians,
        "limit": DENSE_LIMIT,
        "met": medians["dense_over_factored"] >= DENSE_LIMIT,
    }
    if args.json:
        print(json.dumps(result | {"each": each}))
    else:
        for name, value in result.items():
            print(f"{name:22s} {value:.4g}" if isinstance(value, float) else f"{name:22s} {value}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
