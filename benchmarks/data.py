"""What making batches costs, as a share of a training step: at most a tenth.

Batches and steps alternate in one process; the share is of total times.

    python benchmarks/data.py [--steps 100] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
from torch import nn

from guywire.lab import models, streams

LIMIT = 0.10
CASES = (("digits", "mlp"), ("digits", "cnn"), ("mnist", "mlp"))


def measure(data: str, model_name: str, steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    stream = models.prepare(model_name, streams.load(streams.StreamConfig(data=data)))
    model = models.build(model_name, stream, generator)
    model.grow(len(stream.class_names), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    making = training = 0.0
    done = 0
    while done < steps:
        batches = stream.batches(stream.tasks[0].train, 32, generator)
        while done < steps:
            start = time.perf_counter()
            batch = next(batches, None)
            made = time.perf_counter()
            if batch is None:
                break
            inputs, labels = batch
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if done >= 5:  # the first steps warm up
                making += made - start
                training += time.perf_counter() - made
            done += 1
    return {"data": data, "model": model_name, "share": making / (making + training)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [c for c in CASES if c[0] == "digits" or os.environ.get("GUYWIRE_DATA")]
    rows = [measure(data, model, args.steps) for data, model in cases]
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
