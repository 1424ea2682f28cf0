"""What a penalty costs a step, in multiples of copying the parameters once.

Rows are measured interleaved, round by round in one process, and compared by medians of the ratio
to the copy of the same round, so that a noisy machine disturbs all rows alike.

    python benchmarks/penalty.py [--json] [--rounds 31] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import nn

import guywire as gw
from guywire.core.regularizer import Step

LIMIT = 2.9


def transformer() -> nn.Module:
    """Return an encoder of 21.3M parameters in 74 tensors."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return nn.ModuleDict({"embedding": nn.Embedding(4600, 512), "body": body})


def held(model: nn.Module, optimizer: torch.optim.Optimizer, tasks: int) -> gw.EWC:
    """Return EWC bound to the model after some tasks, with random importances."""
    ewc = gw.EWC(strength=1.0)
    gw.attach(model, optimizer, ewc)
    generator = torch.Generator().manual_seed(0)
    for _ in range(tasks):
        for name, p in model.named_parameters():
            shifted = p.detach() + 0.01 * torch.randn(p.shape, generator=generator)
            ewc._add(name, torch.rand(p.shape, generator=generator), shifted)
        ewc.tasks_ += 1
    return ewc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = transformer()
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    copies = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=0.1)
    step = Step(optimizer)

    def copy() -> None:
        for to, p in zip(copies, params, strict=True):
            to.copy_(p)

    ewc = {tasks: held(model, optimizer, tasks) for tasks in (1, 3)}
    l2 = gw.L2(strength=1.0)
    gw.attach(model, optimizer, l2)
    names = [name for name, _ in model.named_parameters()]
    means = [ewc[1].mean_[name] for name in names]
    precisions = [ewc[1].precision_[name] for name in names]
    grads = [p.grad for p in params]

    def loop(tasks: int) -> None:
        # What a loop over tasks does in the loss: one graph of the penalty, one backward pass.
        total = torch.zeros(())
        for _ in range(tasks):
            for p, m, f in zip(params, means, precisions, strict=True):
                total = total + (f * (p - m).square()).sum()
        total.backward()

    def foreach() -> None:
        difference = torch._foreach_sub(params, means)
        torch._foreach_mul_(difference, precisions)
        torch._foreach_add_(grads, difference, alpha=2.0)

    def pull(regularizer: gw.Regularizer) -> None:
        with torch.no_grad():
            regularizer.before_step(step)

    rows = {
        "copy of the parameters": copy,
        "guywire EWC, 1 task": lambda: pull(ewc[1]),
        "guywire EWC, 3 tasks": lambda: pull(ewc[3]),
        "guywire L2": lambda: pull(l2),
        "_foreach with temporaries": torch.no_grad()(foreach),
        "autograd loop, 1 task": lambda: loop(1),
        "autograd loop, 3 tasks": lambda: loop(3),
    }
    with torch.no_grad():
        times: dict[str, dict[int, float]] = {name: {} for name in rows}
        for number in range(args.rounds + 2):
            for name, run in rows.items():
                slow = name.startswith("autograd")
                if slow and number % 4:
                    continue
                with torch.set_grad_enabled(slow):
                    start = time.perf_counter()
                    run()
                    if number >= 2:
                        times[name][number] = time.perf_counter() - start

    def against(name: str, other: str) -> list[float]:
        return [t / times[other][n] for n, t in times[name].items()]

    copied = "copy of the parameters"
    base = statistics.median(times[copied].values())
    each = {name: against(name, copied) for name in rows}
    ratios = {name: statistics.median(found) for name, found in each.items()}
    ours = ratios["guywire EWC, 3 tasks"]
    growing = against("guywire EWC, 3 tasks", "guywire EWC, 1 task")
    grows = statistics.median(growing)
    result = {
        "parameters": sum(p.numel() for p in params),
        "threads": args.threads,
        "copy_seconds": base,
        "ratios": ratios,
        "each": each,
        "growth_1_to_3_tasks": grows,
        "growths_1_to_3_tasks": growing,
        "limit": LIMIT,
        "met": ours <= LIMIT and grows <= 1.15,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['parameters'] / 1e6:.1f}M parameters, {args.threads} thread(s), ", end="")
        print(f"one copy {base * 1e3:.1f} ms; times in copies:")
        for name, ratio in ratios.items():
            print(f"  {name:28s} {ratio:6.2f}")
        print(f"limit {LIMIT}: {'met' if result['met'] else 'MISSED'}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
