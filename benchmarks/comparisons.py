"""The comparisons with peers: which sides, which things, which lines of the table.

Each function takes the run's sizes and returns lines and what the growth figures need. A peer whose
environment fails leaves lines that say so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import adapters, merge
from benchmarks.driver import Cost, Row, Side, SideFailed, alternate, limited, row
from benchmarks.environments import EnvironmentFailed, environment

__all__ = ["COMPARISONS", "Plan"]


WITHOUT = "peers are left out with --quick"


@dataclass
class Plan:
    """Sizes of a run.

    Attributes:
        quick: small sizes.
        peers: use the peers' environments.
        repeats: of everything, at least.
        threads: of every process.
        versions: filled with what the sides say they are.
        about: filled with what else they say.
        answers: filled with every answer.
    """

    quick: bool = False
    peers: bool = True
    repeats: int = 5
    threads: int = 1
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)


@contextmanager
def processes(
    plan: Plan,
    wanted: Mapping[str, tuple[str | None, str, Mapping[str, Any]]],
    *,
    watch: bool = False,
) -> Iterator[tuple[dict[str, Side], dict[str, str]]]:
    """Start sides by name from (environment or ours, script, parameters); say which could not be."""
    out: dict[str, str] = {}
    sides: dict[str, Side] = {}
    with ExitStack() as stack:
        for name, (env, script, given) in wanted.items():
            if env is not None and not plan.peers:
                out[name] = WITHOUT
                continue
            try:
                python = sys.executable if env is None else environment(env)
                side = Side(python, script, {"threads": plan.threads} | dict(given), watch=watch)
            except (EnvironmentFailed, SideFailed) as error:
                out[name] = str(error)
                continue
            stack.callback(side.close)
            sides[name] = side
            plan.versions[name] = side.about.get("versions", {})
        yield sides, out


def _keep(plan: Plan, group: str, sides: Mapping[str, Side], answers: Any) -> None:
    plan.answers[group] = answers
    plan.about[group] = {n: {k: v for k, v in s.about.items() if k != "versions"} for n, s in sides.items()}  # fmt: skip


def ewc(plan: Plan) -> list[Row]:
    """EWC's step after 1 to 50 tasks beside Avalanche's plugin, each over a plain step of its own."""
    tasks = [1, 3, 10] if plan.quick else [1, 2, 3, 5, 10, 20, 50]
    given = {"tasks": tasks, "width": 200 if plan.quick else 1000, "batch": 50, "steps": 5}
    wanted = {
        "guywire": (None, "ewc.py", given),
        "avalanche": ("avalanche", "avalanche_ewc.py", given),
    }
    order = ["plain", *(f"ewc{k}" for k in tasks), "online"]
    with processes(plan, wanted) as (sides, out):
        answers, dropped = alternate(sides, max(plan.repeats, 7), order)
        _keep(plan, "ewc", sides, answers)
    out |= dropped
    note = (
        "each over a plain step in its own process and torch; Avalanche's own loop is not counted"
    )
    rows = [
        row(
            answers, out, "ewc", f"step with EWC after {k} task{'s' * (k > 1)}", "plain steps",
            Cost("guywire", f"ewc{k}", "plain"), "Avalanche", Cost("avalanche", f"ewc{k}", "plain"),
            note=note,
        )
        for k in tasks if k in (1, 3, 10, 50)
    ]  # fmt: skip
    most = max(tasks)
    rows.append(
        row(
            answers, out, "ewc", f"step with EWC after {most} tasks", "plain steps",
            Cost("guywire", f"ewc{most}", "plain"), "Avalanche, mode=online",
            Cost("avalanche", "online", "plain"),
            note="online EWC is another method: one quadratic with a decay; ours is exact at this cost",
        )
    )  # fmt: skip
    rows.append(
        row(
            answers, out, "ewc", f"anchors and importances after {most} tasks", "bytes",
            Cost("guywire", f"ewc{most}", key="held_bytes"), "Avalanche",
            Cost("avalanche", f"ewc{most}", key="held_bytes"), note="counted, not timed",
        )
    )  # fmt: skip
    return rows


def fisher(plan: Plan) -> list[Row]:
    """The exact diagonal Fisher beside three peers, over a plain pass over the same samples."""
    cases = {"mlp": (1000, 200, 50, 1.3), "resnet18": (64, 16, 16, 1.6)}
    if plan.quick:
        cases = {"mlp": (300, 200, 50, 1.3), "resnet18": (8, 32, 16, 1.6)}
    rows = []
    for model, (width, samples, batch, limit) in cases.items():
        given = {"model": model, "width": width, "samples": samples, "batch": batch}
        wanted = {
            "guywire": ("fisher" if plan.peers else None, "fisher.py", given),
            "avalanche": ("avalanche", "avalanche_fisher.py", given),
        }
        with processes(plan, wanted) as (sides, out):
            if "guywire" not in sides and plan.peers:  # ours does not depend on the peers
                with processes(plan, {"guywire": (None, "fisher.py", given)}) as (own, _):
                    answers, dropped = alternate(own | sides, plan.repeats)
                    _keep(plan, f"fisher {model}", own | sides, answers)
                out = {"nngeometry": out["guywire"], "backpack": out["guywire"]} | {
                    k: v for k, v in out.items() if k != "guywire"
                }
            else:
                answers, dropped = alternate(sides, plan.repeats)
                _keep(plan, f"fisher {model}", sides, answers)
        out |= dropped
        about = plan.about[f"fisher {model}"]
        size = about.get("guywire", {}).get("parameters", 0)
        what = f"Fisher, {model}, {size / 1e6:.1f}M, batch {batch}"
        out |= {f"guywire/{k}": v for k, v in about.get("guywire", {}).get("notes", {}).items()}
        quality = about.get("avalanche", {}).get("quality")
        wrong = "squares of batch means, not of samples"
        if quality:
            wrong += (
                f": they sum to {quality['share_of_sum']:.0%} of the true ones, "
                f"cosine {quality['cosine']:.2f}"
            )
        for peer, cost, note in (
            ("nngeometry", Cost("guywire", "nngeometry", "plain"), "same process, same torch"),
            ("BackPACK", Cost("guywire", "backpack", "plain"), "same process, same torch"),
            ("Avalanche, batch 1", Cost("avalanche", "avalanche1", "plain"), "its exact setting"),
            (f"Avalanche, batch {batch}", Cost("avalanche", "avalanche", "plain"), wrong),
        ):
            rows.append(
                row(
                    answers, out, "fisher", what, "plain passes",
                    Cost("guywire", "guywire", "plain"), peer, cost,
                    limit=None if plan.quick else limit, note=note,
                )
            )  # fmt: skip
    return rows


def replay(plan: Plan) -> list[Row]:
    """An epoch with a memory of 500 beside Avalanche's."""
    given = {
        "width": 200 if plan.quick else 1000,
        "samples": 500 if plan.quick else 2000,
        "batch": 50,
        "capacity": 500,
    }
    wanted = {
        "guywire": (None, "replay.py", given),
        "avalanche": ("avalanche", "avalanche_replay.py", given),
    }
    with processes(plan, wanted) as (sides, out):
        answers, dropped = alternate(sides, plan.repeats)
        _keep(plan, "replay", sides, answers)
    out |= dropped
    return [
        row(
            answers, out, "replay", "epoch with Replay", "plain epochs",
            Cost("guywire", "replay", "plain"), "Avalanche", Cost("avalanche", "replay", base),
            note=note,
        )
        for base, note in (
            ("plain", "both over a plain torch loop; Avalanche's loop is part of what one pays"),
            ("naive", "Avalanche's over its own strategy without the plugin"),
        )
    ]  # fmt: skip


def merging(plan: Plan) -> list[Row]:
    """Merging two checkpoints beside mergekit: time, and private memory beyond the start."""
    size = merge.Size(2000, 128, 2, 256) if plan.quick else merge.Size(32_000, 768, 8, 3072)
    pairs = {
        "dare_linear": ("dare", 0.9),
        "dare_ties": ("dare-ties", 0.9),
        "ties": ("ties", 0.8),
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        merge.make(Path(name), size)
        given = {"folder": name, "models": ["a", "b"]}
        wanted = {
            "guywire": (None, "merge.py", given | {"methods": dict(pairs.values())}),
            "mergekit": (
                "mergekit",
                "mergekit_merge.py",
                given | {"methods": {k: rate for k, (_, rate) in pairs.items()}},
            ),
        }
        with processes(plan, wanted, watch=True) as (sides, out):
            answers, dropped = _pairwise(
                sides,
                plan.repeats,
                [(m, t) for t, (m, _) in pairs.items()],
                ("guywire", "mergekit"),
            )
            _keep(plan, "merging", sides, answers)
        out |= dropped
    million = sum(int(merge.math.prod(s)) for s in merge.shapes(size).values()) / 1e6
    for theirs, (ours, rate) in pairs.items():
        for what, key, unit in (("time", "seconds", "s"), ("memory", "grown_mb", "MB")):
            rows.append(
                row(
                    answers, out, "merging", f"{theirs} of 2 at {rate:g}, {million:.0f}M bf16, {what}",
                    unit, Cost("guywire", ours, key=key), "mergekit",
                    Cost("mergekit", theirs, key=key),
                    note="" if key == "seconds" else "highest private memory beyond that of the process when it was ready",
                )
            )  # fmt: skip
    return rows


def _pairwise(
    sides: Mapping[str, Side], repeats: int, pairs: list[tuple[str, str]], names: tuple[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """As ``alternate``, for things that have different names on the two sides."""
    answers: dict[str, Any] = {n: {} for n in sides}
    out: dict[str, str] = {}
    for _ in range(repeats + 1):
        for pair in pairs:
            got, dropped = alternate({}, 0)
            for name, thing in zip(names, pair, strict=True):
                if name not in sides or name in out or f"{name}/{thing}" in out:
                    continue
                got, dropped = alternate({name: sides[name]}, 1, [thing])
                out |= dropped
                for what, found in got[name].items():
                    answers[name].setdefault(what, []).extend(found)
    # the first round fills the file cache
    return {n: {t: a[1:] for t, a in things.items()} for n, things in answers.items()}, out


def lora(plan: Plan) -> list[Row]:
    """Merging two LoRA adapters into their base beside PEFT."""
    size = merge.Size(2000, 128, 2, 256) if plan.quick else merge.Size(32_000, 768, 8, 3072)
    pairs = [("dare", "dare_linear", 0.9), ("ties", "ties", 0.8), ("dare", "dare_linear_svd", 0.9)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        merge.make(Path(name), size)
        adapters.make(Path(name), size)
        given = {"folder": name, "models": ["lora-a", "lora-b"]}
        wanted = {
            "guywire": (None, "merge.py", given | {"methods": {m: r for m, _, r in pairs}}),
            "peft": ("peft", "peft_merge.py", given | {"methods": {t: r for _, t, r in pairs}}),
        }
        with processes(plan, wanted, watch=True) as (sides, out):
            order = [(m, t) for m, t, _ in pairs] + [("", f"memory {t}") for _, t, _ in pairs]
            order[2:3] = [("", "dare_linear_svd")]
            answers, dropped = _pairwise(sides, plan.repeats, order, ("guywire", "peft"))
            _keep(plan, "lora", sides, answers)
        out |= dropped
    factors = "PEFT prunes the factors A and B, ours the product B A: not the same result"
    for ours, theirs, rate in pairs:
        rows.append(
            row(
                answers, out, "lora", f"two adapters into a model on disk, {theirs} at {rate:g}", "s",
                Cost("guywire", ours), "PEFT", Cost("peft", theirs),
                note="both prune the product" if theirs.endswith("svd") else factors,
            )
        )  # fmt: skip
    for _, theirs, rate in pairs:
        rows.append(
            row(
                answers, out, "lora", f"two adapters into one adapter in memory, {theirs} at {rate:g}",
                "s", Cost("guywire", f"memory {theirs}"), "PEFT", Cost("peft", f"memory {theirs}"),
                note="Guywire merges adapters into weights, not into an adapter: PEFT alone has this",
            )
        )  # fmt: skip
        if rows[-1].theirs:
            rows[-1].verdict = "we lose: we have no such operation"
    return rows


IMPORT = """
import sys, time
a = time.perf_counter(); import torch
b = time.perf_counter(); __import__(sys.argv[1])
c = time.perf_counter(); print(b - a, c - b)
"""


def importing(plan: Plan) -> list[Row]:
    """What an import adds to torch's, in fresh processes."""
    modules = {
        "Avalanche": ("avalanche", "avalanche.training.plugins"),
        "mergekit": ("mergekit", "mergekit.merge"),
        "PEFT": ("peft", "peft"),
        "nngeometry": ("fisher", "nngeometry.metrics"),
        "BackPACK": ("fisher", "backpack"),
    }
    out: dict[str, str] = {}
    pythons: dict[str, tuple[str, str]] = {"guywire": (sys.executable, "guywire")}
    for name, (env, module) in modules.items():
        if not plan.peers:
            out[name] = WITHOUT
            continue
        try:
            pythons[name] = (str(environment(env)), module)
        except EnvironmentFailed as error:
            out[name] = str(error)
    answers: dict[str, Any] = {n: {"import": []} for n in pythons}
    surroundings = limited(plan.threads)
    surroundings.pop("PYTHONDONTWRITEBYTECODE", None)
    for number in range(plan.repeats + 1):  # the first fills the file cache
        for name, (python, module) in pythons.items():
            if name in out:
                continue
            done = subprocess.run(
                [python, "-W", "ignore", "-c", IMPORT, module],
                capture_output=True, text=True, env=surroundings, cwd=os.sep,
            )  # fmt: skip
            if done.returncode:
                out[name] = (done.stderr.splitlines() or ["no message"])[-1][:200]
                continue
            if number:
                took = float(done.stdout.split()[-1])
                answers[name]["import"].append({"seconds": took})
    plan.answers["importing"] = answers
    return [
        row(
            answers, out, "importing", "import, beyond that of torch", "s",
            Cost("guywire", "import"), name, Cost(name, "import"),
            limit=0.15 if number == 0 else None, note=f"the module {modules[name][1]}",
        )
        for number, name in enumerate(modules)
    ]  # fmt: skip


COMPARISONS: dict[str, Callable[[Plan], list[Row]]] = {
    "importing": importing,
    "ewc": ewc,
    "fisher": fisher,
    "replay": replay,
    "merging": merging,
    "lora": lora,
}
