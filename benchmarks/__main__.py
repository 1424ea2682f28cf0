"""All benchmarks, one after the other: `make bench`. Writes a JSON file with versions and machine.

python -m benchmarks [--out bench.json] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("import_time", "penalty", "data", "fisher", "merge", "pego", "half_fine_tuning", "pela")
PACKAGES = ("torch", "numpy", "guywire", "nngeometry", "backpack-for-pytorch")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    unknown = set(args.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {sorted(unknown)[0]!r}; there are {', '.join(NAMES)}")
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in PACKAGES},
        "benchmarks": {},
    }
    failed = []
    for name in args.names or NAMES:
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), "--json"], stdout=subprocess.PIPE, text=True
        )
        try:
            found = json.loads(done.stdout)
        except ValueError:
            found = {"error": f"exit code {done.returncode}"}
        results["benchmarks"][name] = found
        print(json.dumps(found, indent=2), flush=True)
        if done.returncode:
            failed.append(name)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {args.out}")
    if failed:
        print(f"missed or failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
