"""How much ``import guywire`` adds to ``import torch``: medians over fresh processes, interleaved.

python benchmarks/import_time.py [--json] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

LIMIT = 0.15
# Both times are taken in one process, so that a slow start of Python does not count.
MEASURE = """
import time
a = time.perf_counter(); import torch
b = time.perf_counter(); import guywire
c = time.perf_counter(); print(b - a, c - b)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch, ours = [], []
    # As installed packages run: with compiled bytecode, which the first round leaves behind.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for number in range(args.rounds + 1):
        out = subprocess.run(
            [sys.executable, "-c", MEASURE],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        a, b = map(float, out.stdout.split())
        if number:  # the first one fills the file cache
            torch.append(a)
            ours.append(b)
    result = {
        "torch_seconds": statistics.median(torch),
        "guywire_seconds": statistics.median(ours),
        "limit": LIMIT,
        "met": statistics.median(ours) <= LIMIT,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"import torch {result['torch_seconds']:.2f} s, ", end="")
        print(f"import guywire on top {result['guywire_seconds']:.3f} s; limit {LIMIT} s: ", end="")
        print("met" if result["met"] else "MISSED")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
