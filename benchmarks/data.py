"""What making batches costs, as a share of a training step: at most a tenth.

Batches and steps alternate in one process; the share is of total times within a repetition, and the
median of repetitions counts.

    python benchmarks/data.py [--repeats 5] [--steps 100] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch
from torch import nn

from guywire.lab import models, streams

LIMIT = 0.10
WARM = 5
"""Steps before the first repetition."""
CASES = (("digits", "mlp"), ("digits", "cnn"), ("mnist", "mlp"))


def measure(data: str, model_name: str, repeats: int, steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    stream = models.prepare(model_name, streams.load(streams.StreamConfig(data=data)))
    model = models.build(model_name, stream, generator)
    model.grow(len(stream.class_names), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    making: list[float] = []
    training: list[float] = []
    wanted = WARM + repeats * steps
    while len(making) < wanted:
        batches = stream.batches(stream.tasks[0].train, 32, generator)
        while len(making) < wanted:
            start = time.perf_counter()
            batch = next(batches, None)
            made = time.perf_counter()
            if batch is None:
                break
            inputs, labels = batch
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            making.append(made - start)
            training.append(time.perf_counter() - made)
    shares = []
    for first in range(WARM, wanted, steps):
        a, b = sum(making[first : first + steps]), sum(training[first : first + steps])
        shares.append(a / (a + b))
    return {
        "data": data,
        "model": model_name,
        "share": statistics.median(shares),
        "shares": shares,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of a repetition")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [c for c in CASES if c[0] == "digits" or os.environ.get("GUYWIRE_DATA")]
    rows = [measure(data, model, args.repeats, args.steps) for data, model in cases]
    met = all(row["share"] <= LIMIT for row in rows)
    if args.json:
        print(json.dumps({"rows": rows, "limit": LIMIT, "met": met}))
    else:
        for row in rows:
            print(f"{row['data']:8s} {row['model']:6s} {row['share']:6.1%} of a step")
        print(f"limit {LIMIT:.0%}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
