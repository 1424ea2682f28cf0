"""What a factorised model costs: forward time, size on disk, and a repair step, beside its original.

A BERT of MiniLM's shape with random weights: times do not depend on what the weights are. Forward
passes are interleaved in one process and compared by medians of the ratio within a round; so are
repair steps, in rounds of their own.

    python benchmarks/pela.py [--json] [--rounds 15] [--steps 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import guywire as gw

RATIOS = (2.0, 3.0)
LIMIT_TIME = 0.8
"""At a ratio of 3."""


def bert() -> nn.Module:
    """Return a BERT of MiniLM's shape, 6 layers of width 384."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertModel(config, add_pooling_layer=False).eval()


def linear_weights(model: nn.Module) -> int:
    """Return how many weights the blocks' matrices have."""
    return sum(p.numel() for n, p in model.named_parameters() if "layer." in n and p.dim() == 2)


def file_size(model: nn.Module) -> int:
    """Return the bytes of the model's safetensors file."""
    from safetensors.torch import save_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        return path.stat().st_size


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="rounds of repair steps")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    original = bert()
    ids = torch.randint(1000, 2000, (8, 64))
    models = {"original": original}
    for ratio in RATIOS:
        start = time.perf_counter()
        models[f"c={ratio:g}"] = gw.factorize(original, ratio).eval()
        factorising = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for number in range(args.rounds + 2):
            for name, model in models.items():
                seconds = timed(lambda model=model: model(input_ids=ids))
                if number >= 2:
                    times[name].append(seconds)

    student = models["c=2"].train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    weights = {"plain": (0.0, 0.0), "FD": (1.0, 0.0), "FD and WP": (1.0, 1.0)}
    steps: dict[str, list[float]] = {name: [] for name in weights}
    for _ in range(args.steps):
        for name, (feature, perturbation) in weights.items():
            pela = gw.PELA(original, feature=feature, perturbation=perturbation)
            with gw.attach(student, optimizer, pela) as wires:

                def step(wires: gw.Wires = wires) -> None:
                    optimizer.zero_grad()
                    outputs = student(input_ids=ids)
                    loss = outputs.last_hidden_state.square().mean()
                    (loss + wires.loss({"input_ids": ids}, outputs)).backward()
                    optimizer.step()

                step()  # after attaching, the first one warms up
                steps[name].append(timed(step))

    def against(found: dict[str, list[float]], base: str) -> dict[str, list[float]]:
        return {n: [a / b for a, b in zip(t, found[base], strict=True)] for n, t in found.items()}

    forward, repair = against(times, "original"), against(steps, "plain")
    result = {
        "threads": args.threads,
        "factorise_seconds": factorising,
        "forward_ratio": {name: statistics.median(found) for name, found in forward.items()},
        "forward_ratios": forward,
        "weights_ratio": {
            name: linear_weights(model) / linear_weights(original) for name, model in models.items()
        },
        "file_ratio": {name: file_size(m) / file_size(original) for name, m in models.items()},
        "step_ratio": {name: statistics.median(found) for name, found in repair.items()},
        "step_ratios": repair,
        "limit_time": LIMIT_TIME,
    }
    result["met"] = result["forward_ratio"]["c=3"] <= LIMIT_TIME
    if args.json:
        print(json.dumps(result))
    else:
        print("ratios to the original:      time  weights of blocks  whole file")
        for name in models:
            row = [result[f"{what}_ratio"][name] for what in ("forward", "weights", "file")]
            print(f"  {name:22s} {row[0]:9.2f} {row[1]:18.2f} {row[2]:11.2f}")
        print("a repair step at c=2, by a plain one:")
        for name, ratio in result["step_ratio"].items():
            print(f"  {name:22s} {ratio:9.2f}")
        print(f"limit {LIMIT_TIME} at c=3: {'met' if result['met'] else 'MISSED'}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
