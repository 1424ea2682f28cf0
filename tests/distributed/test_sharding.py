"""FSDP2: exact against one process, and saved and resumed with another number of processes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import guywire as gw
from guywire.core.errors import CheckpointError
from guywire.testing import run_processes

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

HALF, WHOLE = 5, 9  # saved after the first, compared after the second


class Net(nn.Module):
    """7 and 5 rows divide by no number of processes used here; one row leaves some of them empty."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.gate = nn.Linear(7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(h * torch.sigmoid(self.gate(h)))


def net(kind):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Net().double()
        if kind in ("PEGO", "AlignGuardLoRA"):
            model = gw.lora_group(model, 2, 3, target_modules=["first", "head"]).double()
    return model


def make(kind):
    halves = {"head.*": "feed-forward", "first.*": "feed-forward", "*": "norm"}
    return {
        "L2": lambda: gw.L2(0.3),
        "L2 decoupled": lambda: gw.L2(0.3, anchor="initial", decoupled=True),
        "L1 decoupled": lambda: gw.L1(0.05, decoupled=True),
        "L2 on the CPU": lambda: gw.L2(0.3, keep="cpu"),
        "EWC": lambda: gw.EWC(20.0),
        "EWC on disk": lambda: gw.EWC(20.0, keep="disk"),
        "EWC online": lambda: gw.EWC(2.0, decay=0.9, normalise="mean", labels="true"),
        "HalfFineTuning": lambda: gw.HalfFineTuning(categories=halves),
        "AdamR": lambda: gw.AdamR(0.3),
        "PEGO": lambda: gw.PEGO(0.02),
        "AlignGuardLoRA": lambda: gw.AlignGuardLoRA(2.0, collision=1.0, large="weight"),
        "PredictionDistillation": lambda: gw.PredictionDistillation(2.0),
        "FeatureDistillation": lambda: gw.FeatureDistillation(2.0, layer="gate", at="output"),
    }[kind]()


KINDS = [
    "L2", "L2 on the CPU", "L2 decoupled", "L1 decoupled", "EWC", "EWC on disk", "EWC online",
    "HalfFineTuning", "AdamR", "PEGO", "AlignGuardLoRA", "PredictionDistillation",
    "FeatureDistillation",
]  # fmt: skip

FEW = ["L2 on the CPU", "EWC on disk", "HalfFineTuning", "AdamR", "PredictionDistillation"]


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (12,), generator=generator)


class Run:
    """One training, on one process or sharded over several."""

    def __init__(self, kind, rank, world):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.kind, self.rank, self.world = kind, rank, world
        self.model = net(kind)
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            for part in (self.model.get_submodule("first"), self.model):
                fully_shard(part, mesh=mesh)
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(params, lr=0.01)
        self.wires = gw.attach(self.model, self.optimizer, make(kind))

    def batch(self, step):
        return tuple(t.chunk(self.world)[self.rank] for t in data(step))

    def train(self, start, stop):
        for step in range(start, stop):
            self.optimizer.zero_grad()
            x, y = self.batch(step)
            outputs = self.model(x)
            loss = nn.functional.cross_entropy(outputs, y) + self.wires.loss((x, y), outputs)
            loss.backward()
            self.optimizer.step()
            if step in (1, 3):
                self.wires.consolidate([self.batch(100 + step), self.batch(200 + step)])
        return self

    def save(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optim": optimizer, "wires": gw.sharded_state(self.wires)}
        dcp.save(state, checkpoint_id=folder)
        return self

    def load(self, folder):
        dcp.load({"wires": gw.sharded_state(self.wires, folder)}, checkpoint_id=folder)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optim": optimizer}, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        return self

    def result(self):
        value = float(self.wires.penalty())
        return {"penalty": value, "steps": self.wires.steps} | gw.gathered(
            {"model": dict(self.model.state_dict()), "wires": self.wires.state_dict()}
        )


def shares(wires):
    """The share of the numbers in sharded anchors and importances that this process holds."""
    held = local = 0
    for _, value in leaves(wires.state_dict()):
        if hasattr(value, "to_local"):
            held, local = held + value.numel(), local + value.to_local().numel()
    return local / held if held else None


def share_of_parameters(model):
    """What :func:`shares` should be: sharded like the parameters, so as uneven as they are."""
    parameters = list(model.parameters())
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in parameters)
    return local / sum(p.numel() for p in parameters)


def remote(rank, world, kinds, folder, given):
    warnings.filterwarnings("error", message=".*guywire.*")
    results = {}
    for kind in kinds:
        mine, theirs = Path(folder) / kind, Path(given) / kind
        run = Run(kind, rank, world).train(0, HALF).save(mine).train(HALF, WHOLE)
        results[kind] = {
            "share": shares(run.wires),
            "share of parameters": share_of_parameters(run.model),
            "through": run.result(),
            "again": Run(kind, rank, world).load(mine).train(HALF, WHOLE).result(),
            "from the other": Run(kind, rank, world).load(theirs).train(HALF, WHOLE).result(),
        }
    return results


def leaves(tree, path=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{path}/{i}")
    else:
        yield path, tree


def assert_same(found, wanted, tolerance):
    found, wanted = dict(leaves(found)), dict(leaves(wanted))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        if not isinstance(value, torch.Tensor | float):
            assert found[path] == value, path
        elif "/basis/" in path:  # eigenvectors: up to sign
            torch.testing.assert_close(found[path].abs(), value.abs(), rtol=0, atol=tolerance)
        else:
            torch.testing.assert_close(
                torch.as_tensor(found[path]), torch.as_tensor(value), rtol=tolerance,
                atol=tolerance, msg=lambda m, p=path: f"{p}: {m}",
            )  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    runs = {}
    for kind in KINDS:
        run = Run(kind, 0, 1).train(0, HALF).save(folder / kind)
        runs[kind] = run.train(HALF, WHOLE).result()
    return folder, runs


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    arguments = {"kinds": FEW, "folder": str(folder), "given": str(one[0])}
    return folder, run_processes(remote, 2, timeout=240, world=2, **arguments)


def check(kinds, ranks, wanted):
    for kind in kinds:
        for result in ranks:
            assert_same(result[kind]["through"], wanted[kind], 1e-8)
            assert_same(result[kind]["again"], result[kind]["through"], 0.0)  # bit for bit
            assert_same(result[kind]["from the other"], wanted[kind], 1e-8)
        # (That results are whole is seen above: they went through core.checkpoint, from either
        # process.)
        shares = [result[kind]["share"] for result in ranks]
        if kind in ("HalfFineTuning", "PEGO", "AlignGuardLoRA"):
            assert set(shares) == {None}  # names, nothing, and small tensors of other shapes
        else:
            assert sum(shares) == pytest.approx(1.0)
            assert shares == pytest.approx([r[kind]["share of parameters"] for r in ranks])


def check_one(kinds, folder, wanted):
    for kind in kinds:
        alone = Run(kind, 0, 1).load(folder / kind).train(HALF, WHOLE)
        assert_same(alone.result(), wanted[kind], 1e-8)
        assert alone.wires.steps == WHOLE


def test_two_processes_equal_one_and_resume_each_others_state(one, two):
    check(FEW, two[1], one[1])
    check_one(FEW, two[0], one[1])


@pytest.mark.slow
def test_every_method_on_two_three_and_four_processes(one, tmp_path):
    given, wanted = one
    for world in (2, 3, 4):
        folder = tmp_path / str(world)
        arguments = {"kinds": KINDS, "folder": str(folder), "given": str(given)}
        ranks = run_processes(remote, world, timeout=280, world=world, **arguments)
        check(KINDS, ranks, wanted)
        for result in ranks:  # where anchors are kept changes nothing
            for kind, like in (("L2 on the CPU", "L2"), ("EWC on disk", "EWC")):
                assert_same(result[kind]["through"], result[like]["through"], 0.0)
        given = folder  # 1 to 2, 2 to 3, 3 to 4
    check_one(KINDS, given, wanted)  # 4 to 1


def test_errors(one, tmp_path):
    folder, _ = one
    fresh = Run("EWC", 0, 1)
    with pytest.raises(CheckpointError, match="under 'w'; there is one under 'wires'"):
        dcp.load({"w": gw.sharded_state(fresh.wires, folder / "EWC", key="w")},
                 checkpoint_id=folder / "EWC")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"no checkpoint of torch\.distributed in"):
        gw.sharded_state(fresh.wires, tmp_path / "none").state_dict()
    with pytest.raises(CheckpointError, match=r"of \['L2'\], but attached are \['EWC'\]"):
        fresh.load(folder / "L2")
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load({"wires": gw.sharded_state(fresh.wires)}, checkpoint_id=folder / "EWC")
    # DCP itself cannot load the bare wires into ones that have learnt nothing: not silently.
    run = Run("EWC", 0, 1).train(0, 3)
    dcp.save({"wires": run.wires}, checkpoint_id=tmp_path / "bare")
    with pytest.raises(CheckpointError, match="without importances"):
        dcp.load({"wires": fresh.wires}, checkpoint_id=tmp_path / "bare")


def fisher(rank, world, whole):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from guywire.curvature import _shards

    model = net("L2")
    mesh = init_device_mesh("cpu", (world,))
    for part in (model.first, model.head, model):
        fully_shard(part, mesh=mesh)
    _shards._WHOLE = whole
    most = []
    shard = _shards.Processes.shard

    def counted(self, total, parameter):
        most.append(sum(t.numel() for t in sums[0].totals.values()) + total.numel())
        return shard(self, total, parameter)

    sums = []
    begin = _shards.Shards.__init__

    def noted(self, recorder, *rest):
        sums.append(recorder)
        begin(self, recorder, *rest)

    _shards.Processes.shard, _shards.Shards.__init__ = counted, noted
    shares = [tuple(t.chunk(world)[rank] for t in data(s)) for s in range(2 if rank else 3)]
    return {"fisher": gw.gathered(gw.curvature.diagonal_fisher(model, shares)), "most": most}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_whole_sums_of_one_block_at_a_time(world):
    model = net("L2")
    shares = [data(step) for step in range(3)]
    shares = [tuple(t.chunk(world)[r] for t in shares[s])
              for r in range(world) for s in range(2 if r else 3)]  # fmt: skip
    wanted = gw.curvature.diagonal_fisher(model, shares)
    size = sum(p.numel() for p in model.parameters())
    largest = sum(p.numel() for m in (model.first, model.gate) for p in m.parameters())
    for whole, limit in ((0, largest), (1 << 28, size)):
        for result in run_processes(fisher, world, world=world, whole=whole):
            assert_same(result["fisher"], wanted, 1e-10)
            assert max(result["most"]) == limit  # the head's are gone when the first layer's come
            # 5 classes, 3 batches, 6 parameters, and once more at the end; or only there.
            assert len(result["most"]) == (6 * (5 * 3 + 1) if whole == 0 else 6)
