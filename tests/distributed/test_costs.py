"""Bytes are counted, and compared with the tables of docs/costs.md and the facts on the classes."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import guywire as gw
from guywire.core import tensors
from guywire.testing import run_processes

PAGE = Path(__file__).parents[2] / "docs" / "costs.md"
WIDTH, CLASSES, BATCH = 600, 600, 4
MIB = 2**20
HALVES = {"*.weight": "feed-forward"}

METHODS: dict[str, Any] = {
    "L2": lambda: gw.L2(0.1),
    "L1": lambda: gw.L1(0.1),
    "EWC": lambda: gw.EWC(1.0, labels="true"),
    "AdamR": lambda: gw.AdamR(),
    "HalfFineTuning": lambda: gw.HalfFineTuning(seed=0, categories=HALVES),
    "PredictionDistillation": lambda: gw.PredictionDistillation(),
    "FeatureDistillation": lambda: gw.FeatureDistillation(layer="head"),
    "Replay": lambda: gw.Replay(capacity=8),
    "GEM": lambda: gw.GEM(memory_per_task=8),
}
SHARDED = [
    "L2", "L1", "EWC", "AdamR", "HalfFineTuning", "PredictionDistillation", "FeatureDistillation", "GEM",
]  # fmt: skip


def table(heading: str) -> dict[str, dict[str, str]]:
    """Read the page's table below a heading: class to column to cell."""
    text = PAGE.read_text(encoding="utf-8")
    part = text.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    names = [name.strip() for name in rows[0]]
    cells = [dict(zip(names, map(str.strip, row), strict=True)) for row in rows[2:]]
    return {row["method"].strip("`").removeprefix("gw."): row for row in cells}


def number(cell: str) -> float:
    found = re.match(r"[\d.]+", cell)
    assert found, f"{cell!r} does not begin with a number"
    return float(found.group())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False)
        )
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def samples(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [
        (
            torch.randn(BATCH, WIDTH, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def size(parameters: Any) -> int:
    return sum(tensors.local(p).numel() * p.element_size() for p in parameters)


class Peak(TorchDispatchMode):
    """The most bytes of new tensors that lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self.known:
                self.known[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


class Traffic(TorchDispatchMode):
    """Bytes that one process sends in a ring: all-gather and reduce-scatter once, all-reduce twice."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.sent = world, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.lower().replace("_", "")
            largest = max(
                (t.numel() * t.element_size() for t in tensors_in((args, result))), default=0
            )
            if "wait" not in name and "barrier" not in name:
                twice = 2 if "allreduce" in name else 1
                self.sent += twice * largest * (self.world - 1) / self.world
        return result


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def held(regularizer: gw.Regularizer, model: nn.Module) -> int:
    """Bytes of all tensors that a regularizer can reach, the model's own apart."""
    own = {tensors.local(t).untyped_storage().data_ptr()
           for t in (*model.parameters(), *model.buffers())}  # fmt: skip
    seen: set[int] = set()
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if id(value) in seen or value is model or isinstance(value, gw.Wires | type):
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = tensors.local(value).untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in (*value.keys(), *value.values()):
                walk(inner)
        elif isinstance(value, list | tuple | set):
            for inner in value:
                walk(inner)
        elif isinstance(value, nn.Module) or type(value).__module__.startswith("guywire"):
            for inner in vars(value).values():
                walk(inner)

    walk(regularizer)
    return sum(found.values())


def measure(name: str) -> dict[str, float]:
    """Held bytes, the step's peak, and passes of one method on one process."""
    torch.manual_seed(0)
    model = Net()
    method = METHODS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    found: dict[str, float] = {}
    with gw.attach(model, optimizer, method) as wires:  # a first task
        for x, y in samples(2):
            wires.loss((x, y), model(x))
        wires.consolidate(samples(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gw.attach(model, optimizer, method) as wires:
        # Copies of the model (a teacher) count as well: every module that is this class's.
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: count() if isinstance(module, Net) else None
        )
        try:
            ((x, y),) = samples(1)
            outputs = model(x)
            passes = 0
            (nn.functional.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
            inner = type(method).before_step
            peak = Peak()

            def watched(step: Any) -> None:
                with peak:
                    inner(method, step)

            method.__dict__["before_step"] = watched
            optimizer.step()
            del method.__dict__["before_step"]
            found["passes a step"] = passes
            found["peak"] = peak.peak
            found["held"] = held(method, model)
            counts = []
            for batches in (2, 3):  # a first pass that only looks at shapes falls out
                passes = 0
                wires.consolidate(samples(batches))
                counts.append(passes)
            found["passes a task"] = counts[1] - counts[0]
        finally:
            handle.remove()
    found["parameters"] = size(model.parameters())
    found["samples"] = 8 * (WIDTH * 4 + 8)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_one_process_costs_what_page_and_class_say(name: str) -> None:
    row, cls, found = table("On one process")[name], getattr(gw, name), measure(name)
    assert row["held"] == cls.memory
    assert row["extra passes"] == cls.passes
    whole = found["parameters"]
    # GEM's fact speaks of the step: gradients of past tasks live there only.
    stated = 0.0 if name == "GEM" else number(cls.memory)
    extra = found["samples"] if "samples" in cls.memory else 0.0
    assert found["held"] == pytest.approx(stated * whole + extra, abs=0.0002 * whole)
    in_step, in_task = number(cls.passes), 0.0
    if cls.passes.endswith("a task"):
        in_step, in_task = 0.0, in_step
    assert (found["passes a step"], found["passes a task"]) == (in_step, in_task)
    peak = row["peak in step()"]
    wanted = MIB if peak.startswith("1 MiB") else number(peak) * whole
    assert found["peak"] == pytest.approx(wanted, rel=0.03)


def test_every_method_of_the_table_is_counted_and_the_rest_named() -> None:
    assert set(table("On one process")) == set(METHODS)
    assert set(table("Under FSDP2")) == {"plain training", *SHARDED}
    text = PAGE.read_text(encoding="utf-8")
    others = {
        name
        for name in gw.__all__
        if isinstance(getattr(gw, name), type)
        and issubclass(getattr(gw, name), gw.Regularizer)
        and name not in ("Regularizer", *METHODS)
    }
    assert others
    for name in others:
        assert f"`gw.{name}`: {getattr(gw, name).memory}; {getattr(gw, name).passes}" in text


def test_off_a_cpu_the_pull_takes_one_tensor_at_a_time() -> None:
    made = {n: torch.empty(s, device="meta") for n, s in (("a", 1000), ("b", 5000), ("c", 3000))}
    lists = [list(made.values()) for _ in range(4)]
    grads = [torch.empty_like(t) for t in lists[0]]
    with Peak() as peak:
        tensors.add_pull(grads, lists[1], [torch.empty_like(t) for t in lists[2]], [1.0] * 3)
    anchors = sum(t.numel() * 4 for t in lists[2])
    assert 5000 * 4 <= peak.peak - anchors <= (5000 + 3000) * 4


def remote(rank: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Measure under FSDP2, in units of an all-gather of all parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, dict[str, float]] = {}
    for name in names:
        torch.manual_seed(0)
        model = Net()
        whole = size(model.parameters())
        unit = whole / 2
        for part in (model.body[0], model.body[2], model.head, model):
            fully_shard(part, mesh=mesh)
        method = None if name == "plain training" else METHODS[name]()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        wires = gw.attach(model, optimizer, [] if method is None else method)
        row: dict[str, float] = {}
        counts = []
        for batches in (1, 2, 3):
            with Traffic(2) as traffic:
                wires.consolidate(samples(batches))
            counts.append(traffic.sent / unit)
        row["a batch"] = counts[2] - counts[1]
        row["once"] = counts[1] - 2 * row["a batch"]
        ((x, y),) = samples(1)
        with Traffic(2) as traffic:
            outputs = model(x)
            (nn.functional.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
        row["the loop's"] = traffic.sent / unit
        with Traffic(2) as traffic:
            optimizer.step()
        row["in step()"] = traffic.sent / unit
        local = size(model.parameters())
        row["held"] = 0.0 if method is None else held(method, model) / local
        row["tasks"] = len(counts)
        row["samples"] = (4 + 8 + 8) * (WIDTH * 4 + 8) / local  # 1, 2 and 3 batches, at most 8
        row["share"] = local / whole
        found[name] = row
    return found


@pytest.mark.multiprocess
def test_two_processes_exchange_what_the_page_says() -> None:
    rows = table("Under FSDP2")
    for found in run_processes(remote, 2, names=list(rows)):
        for name, row in found.items():
            stated = rows[name]
            assert row["share"] == pytest.approx(0.5)
            assert row["the loop's"] == pytest.approx(number(stated["a loop's step"]), abs=0.01)
            more = stated["more in the step"]
            tasks = row["tasks"] if "a past task" in more else 1
            slack = 1e-4 if "number" in more else 1e-12
            assert row["in step()"] == pytest.approx(number(more) * tasks, abs=slack)
            samples = row["samples"] if "samples" in stated["held"] else 0.0
            assert row["held"] == pytest.approx(number(stated["held"]) + samples, abs=0.001)
            # A few numbers of bookkeeping (how many batches has each?) are bytes, not multiples.
            assert row["a batch"] == pytest.approx(number(stated["consolidate, a batch"]), abs=1e-3)
            assert row["once"] == pytest.approx(number(stated["consolidate, once"]), abs=1e-3)
