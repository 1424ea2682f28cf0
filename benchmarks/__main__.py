"""Cost beside peers, from one run: `make bench`. Writes JSON, a table, and figures of growth.

python -m benchmarks [--quick] [--only NAME ...] [--out FOLDER] [--page] [--list]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks import draw, growth, own, page
from benchmarks.comparisons import COMPARISONS, Plan
from benchmarks.driver import Row
from benchmarks.environments import NAMES as ENVIRONMENTS
from benchmarks.environments import EnvironmentFailed, environment
from benchmarks.sides.protocol import reason, versions

ROOT = Path(__file__).resolve().parent.parent
GROWTH = {"parameters": growth.parameters, "tasks": growth.tasks, "batch": growth.batch}
NAMES = (*own.SCRIPTS, *COMPARISONS, *GROWTH)
STATIC = ROOT / "docs" / "_static"


def machine() -> dict[str, Any]:
    """What it ran on; no names of hosts, no paths."""
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
        memory = Path("/proc/meminfo").read_text().splitlines()
        gb = next(int(x.split()[1]) / 2**20 for x in memory if x.startswith("MemTotal"))
    except (OSError, StopIteration):
        gb = None
    return {
        "cores": os.cpu_count(),
        "processor": processor,
        "memory_gb": gb and round(gb, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def measure(names: list[str], plan: Plan) -> dict[str, Any]:
    """Run what is named, in order; nothing that fails stops the rest."""
    start, load = time.monotonic(), os.getloadavg()[0]
    plan.versions["ours"] = versions("guywire", "torch", "numpy", "safetensors", "transformers")
    rows: list[Row] = []
    series: list[growth.Series] = []
    for name in names:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            if name in own.SCRIPTS:
                found = own.run(name, plan)
            elif name in COMPARISONS:
                found = COMPARISONS[name](plan)
            else:
                found, more = GROWTH[name](plan)
                series += more
                print("\n".join(growth.summary(more)))
        except Exception as error:
            found = [
                Row(name, name, "", "", None, None, None, None, f"not measured: {reason(error)}")
            ]
        rows += found
        if found:
            print(page.table([dataclasses.asdict(r) for r in found]))
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    return {
        "format": 1,
        "date": time.strftime("%Y-%m-%d"),
        "quick": plan.quick,
        "repeats": plan.repeats,
        "threads": plan.threads,
        "seconds": round(time.monotonic() - start, 1),
        "load": load,
        "machine": machine(),
        "versions": plan.versions,
        "own": list(own.SCRIPTS),
        "rows": [dataclasses.asdict(r) for r in rows],
        "growth": series,
        "about": plan.about,
        "answers": plan.answers,
    }


def write(results: dict[str, Any], folder: Path) -> list[str]:
    """Write ``results.json``, ``table.md`` and the figures; return the figures' names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    drawn = figures(results, folder)
    text = page.section(results, drawn).replace("(_static/", "(")
    (folder / "table.md").write_text(text + "\n")
    return drawn


def figures(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw what has points; return names."""
    drawn = []
    for s in results["growth"]:
        try:
            (folder / f"{s['name']}.svg").write_text(draw.figure(s))
        except ValueError as error:
            print(error)
            continue
        drawn.append(s["name"])
    return drawn


def to_page(folder: Path) -> None:
    """Renew docs/costs.md, its figures and its JSON from a run."""
    results = json.loads((folder / "results.json").read_text())
    page.put(ROOT / "docs" / "costs.md", page.section(results, figures(results, STATIC)))
    # every repetition of every line is in the rows; the raw answers stay with the run
    kept = {k: v for k, v in results.items() if k != "answers"}
    (STATIC / "bench.json").write_text(json.dumps(kept, indent=1) + "\n")
    print("renewed docs/costs.md, docs/_static/bench.json and the figures beside it")


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a minute or two, without peers' environments"
    )
    parser.add_argument("--peers", action="store_true", help="use them with --quick, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench", help="folder; bench/ if not given"
    )
    parser.add_argument("--repeats", type=int, help="of every comparison; 5, and 3 with --quick")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument(
        "--page", action="store_true", help="renew docs/costs.md from OUT, measure nothing"
    )
    parser.add_argument(
        "--environments", action="store_true", help="only make the peers' environments"
    )
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    args = parser.parse_args(words)
    if args.list:
        print("\n".join(NAMES))
        return 0
    if args.page:
        if not (args.out / "results.json").is_file():
            parser.error(f"no {args.out.name}/results.json: run `make bench` first")
        to_page(args.out)
        return 0
    if unknown := sorted(set(args.only or ()) - set(NAMES)):
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    if (args.repeats is not None and args.repeats < 1) or args.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    peers = args.peers or not args.quick
    if peers or args.environments:
        for name in ENVIRONMENTS:
            try:
                environment(name)
            except EnvironmentFailed as error:
                print(f"{name}: {error}; its lines will say so")
    if args.environments:
        return 0
    chosen = [n for n in NAMES if args.only is None or n in args.only]
    repeats = args.repeats or (3 if args.quick else 5)
    plan = Plan(args.quick, peers, repeats, args.threads)
    results = measure(chosen, plan)
    drawn = write(results, args.out)
    print(f"\n{page.table(results['rows'])}\n")
    for line in page.losses(results["rows"]):
        print(f"lost: {line}")
    print(
        f"{results['seconds']:.0f} s; {args.out.name}/results.json, table.md and {len(drawn)} figures"
    )
    missed = any("missed" in r["verdict"] for r in results["rows"])
    return 1 if missed and not args.quick else 0


if __name__ == "__main__":
    raise SystemExit(main())
