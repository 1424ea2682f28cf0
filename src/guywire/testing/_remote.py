"""The checks that need other processes; one start of two serves many regularizers."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from guywire.core.regularizer import Regularizer
from guywire.testing import _alone
from guywire.testing import _bench as bench
from guywire.testing._worker import find
from guywire.testing.processes import locate, run_processes

Factory = Callable[..., Regularizer]

REMOTE = ("another_process", "ddp", "fsdp2")

_results: dict[tuple[str, str], dict[str, Any]] = {}


def prepare(subjects: Mapping[Factory, list[str]]) -> None:
    """Run the checks of all subjects in one start of two processes, and keep what they gave."""
    jobs, wanted = [], {}
    for factory, names in subjects.items():
        file, name = locate(factory)
        mine = [check for check in REMOTE if check in names]
        if not mine or (file, name) in _results:
            continue
        saved = None
        if "another_process" in mine:
            with bench.dressed_as(factory):
                saved, wanted[file, name] = _alone.interrupted(factory)
        jobs.append({"file": file, "name": name, "checks": mine, "saved": saved})
    if not jobs:
        return
    by_rank = run_processes(perform, 2, timeout=60.0 + 30.0 * len(jobs), jobs=jobs)
    for i, job in enumerate(jobs):
        key = job["file"], job["name"]
        _results[key] = {"ranks": [r[i] for r in by_rank], "losses": wanted.get(key)}


def check(factory: Factory, name: str, applicable: list[str]) -> None:
    """Judge one check, running it first if nobody has."""
    key = locate(factory)
    if key not in _results:
        prepare({factory: applicable})
    ranks = _results[key]["ranks"]
    for rank, result in enumerate(ranks):
        error = result[name].get("error")
        assert error is None, f"process {rank}: {error}"
    if name == "another_process":
        assert ranks[0][name]["losses"] == _results[key]["losses"], "the losses differ"
        return
    one, two = (result[name]["state"] for result in ranks)
    bench.assert_same(one, two)
    if name == "fsdp2":
        for result in ranks:
            assert result[name]["collectives"] == 0, "it communicates in the step"
    with bench.dressed_as(factory):
        alone = bench.build(bench.Plain)
        bench.two_tasks(factory(), alone)
    bench.assert_same(one, bench.state_of(alone), 1e-8)


def perform(rank: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do all jobs in one of the processes; an error becomes a result."""
    runs = {"ddp": _ddp, "fsdp2": _fsdp2}
    results = []
    for job in jobs:
        factory = find(job["file"], job["name"])
        result: dict[str, Any] = {}
        for name in job["checks"]:
            try:
                with bench.dressed_as(factory):
                    if name == "another_process":
                        result[name] = {"losses": _alone.resumed(factory, job["saved"])}
                    else:
                        result[name] = runs[name](rank, factory)
            except Exception:
                result[name] = {"error": traceback.format_exc()}
        results.append(result)
    return results


def _ddp(rank: int, factory: Factory) -> dict[str, Any]:
    model = bench.build(bench.Plain)
    wrapped = nn.parallel.DistributedDataParallel(model)
    _two_tasks(rank, factory(), wrapped)
    return {"state": bench.state_of(model)}


def _fsdp2(rank: int, factory: Factory) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = bench.build(bench.Plain)
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.get_submodule("first"), model.get_submodule("second"), model):
        fully_shard(part, mesh=mesh)
    collectives = _two_tasks(rank, factory(), model)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole = getattr(value, "full_tensor", None)
        state[name] = (value if whole is None else whole()).detach().clone()
    return {"state": state, "collectives": collectives}


def _two_tasks(rank: int, regularizer: Regularizer, model: nn.Module) -> int:
    # Half of each batch to each process; returns how many collective calls the steps made.
    from torch.distributed.tensor.debug import CommDebugMode

    from guywire.core.attach import attach

    def half(t: Tensor) -> Tensor:
        return t.chunk(2)[rank]

    count = 0
    for number in range(2):
        optimizer = bench.sgd(model)
        step = optimizer.step

        def counted(step: Callable[[], Any] = step) -> None:
            nonlocal count
            with CommDebugMode() as mode:
                step()
            count += mode.get_total_counts()

        optimizer.step = counted  # type: ignore[method-assign]
        data = bench.task(number)
        with attach(model, optimizer, regularizer) as wires:
            bench.train(model, optimizer, wires, data * 3, share=half)
            wires.consolidate([(half(x), half(y)) for x, y in data])
    return count
