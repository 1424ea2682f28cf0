"""Anchors and importances on the CPU or on disk: the same numbers, and less memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import CheckpointError, UsageError
from guywire.core.shelf import Item, Shelf

KEEPS = ["cpu", "disk", "folder"]
MAKES = {
    "L2": lambda keep: gw.L2(0.3, keep=keep),
    "L2 given, decoupled": lambda keep: gw.L2(
        0.3, anchor={"0.weight": torch.ones(4, 3, 3, 3)}, decoupled=True, keep=keep
    ),
    "L1 in bfloat16": lambda keep: gw.L1(0.05, anchor_dtype=torch.bfloat16, keep=keep),
    "EWC": lambda keep: gw.EWC(5.0, keep=keep),
    "EWC online, decoupled": lambda keep: gw.EWC(
        5.0, decay=0.9, decoupled=True, anchor_dtype=torch.bfloat16, keep=keep
    ),
}


def place(keep, folder):
    return folder if keep == "folder" else keep


def net():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(36, 3)
        )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 3, 5, 5, generator=generator)
    return x, torch.randint(3, (6,), generator=generator)


def train(model, wires, start, stop):
    values = []
    for step in range(start, stop):
        wires.optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        wires.optimizer.step()
        if step in (1, 3):
            wires.consolidate([batch(100 + step)])
        values.append(float(wires.penalty()))
    return values


def attach(model, regularizer):
    return gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.05), regularizer)


@pytest.mark.parametrize("name", MAKES)
def test_the_same_numbers_as_in_memory_and_after_resuming(name, tmp_path):
    wanted = net()
    values = train(wanted, attach(wanted, MAKES[name](None)), 0, 8)
    for keep in KEEPS:
        model = net()
        wires = attach(model, MAKES[name](place(keep, tmp_path)))
        found = train(model, wires, 0, 5)
        file = tmp_path / f"{keep}.ckpt"
        checkpoint.save(file, {"model": model.state_dict(), "wires": wires.state_dict()})
        # Detached and attached again, and in other objects from the checkpoint.
        regularizer = wires.regularizers[0]
        wires.detach()
        again = attach(model, regularizer)
        other = net()
        state = checkpoint.load(file)
        other.load_state_dict(state["model"])
        resumed = attach(other, MAKES[name](place(keep, tmp_path)))
        resumed.load_state_dict(state["wires"])
        for one, these in ((model, again), (other, resumed)):
            assert found + train(one, these, 5, 8) == pytest.approx(values, rel=1e-6)
            for key, value in wanted.state_dict().items():
                assert torch.equal(one.state_dict()[key], value), (keep, key)  # bit for bit


def anonymous():
    gc.collect()
    with contextlib.suppress(AttributeError):  # what earlier tests freed is given back first
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(6))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


class Largest(TorchDispatchMode):
    """The largest tensor made anew."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("keep", "copies"), [(None, 1), ("disk", 0), ("folder", 0)])
def test_memory(keep, copies, tmp_path):
    model = Wide()
    size = sum(4 * p.numel() for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    attach(nn.Linear(2, 2), gw.L2()).optimizer.step()  # what the first step loads
    before = anonymous()
    wires = attach(model, gw.L2(0.1, keep=place(keep, tmp_path)))
    with Largest() as made:
        wires.optimizer.step()
    assert made.bytes <= 4 << 18  # one block, not one of the parameters' 4 MiB
    if keep is not None:
        wires.consolidate()
        wires.optimizer.step()
    grown = anonymous() - before
    assert abs(grown - copies * size) < 0.1 * size, (grown, size)


def test_nothing_is_left_behind_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = nn.Linear(3, 2)
    wires = attach(model, gw.L2(0.1, keep="disk"))
    assert list(tmp_path.iterdir()) == []
    anchor = wires.regularizers[0].anchors_["weight"]
    assert torch.equal(anchor, model.weight)
    anchor += 1  # a private mapping: ours to write


def test_a_folder_holds_files_that_others_read(tmp_path):
    model = nn.Linear(3, 2).to(torch.bfloat16)
    wires = attach(model, [gw.EWC(keep=tmp_path, anchor_dtype=torch.float32), gw.L2(keep=tmp_path)])
    wires.consolidate([(torch.randn(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 0, 1]))])
    names = ["ewc-mean", "ewc-precision", "l2-anchors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}-0-of-1.safetensors" for n in names]
    with safe_open(tmp_path / "ewc-mean-0-of-1.safetensors", "pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
        assert torch.equal(file.get_tensor("weight"), model.weight.float())
    with safe_open(tmp_path / "l2-anchors-0-of-1.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("bias"), model.bias)
    # What is mapped stays as it was when the file is replaced.
    kept = wires.regularizers[1].anchors_["bias"]
    was = kept.clone()
    attach(nn.Linear(3, 2), gw.L2(keep=tmp_path))
    assert torch.equal(kept, was)


def test_odd_tensors(tmp_path):
    given = {
        "number": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "strided": torch.arange(12.0).view(3, 4).T,
        "bits": torch.tensor([True, False, True]),
        "half": torch.tensor([1.5], dtype=torch.float16),
    }
    items = {n: Item(t, t.dtype, lambda t=t: t) for n, t in given.items()}
    for keep in (None, "cpu", "disk", tmp_path):
        for name, kept in Shelf(keep, "odd").put(items).items():
            assert kept.dtype == given[name].dtype
            assert torch.equal(kept, given[name])


def test_errors(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="keep='tape' is none of 'cpu', 'disk'"):
        attach(model, gw.L2(keep="tape"))
    with pytest.raises(UsageError, match="is no folder: make it first"):
        attach(model, gw.EWC(keep=tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"cannot keep l1-anchors in .*TMPDIR"):
        attach(model, gw.L1(keep="disk"))
    wires = attach(model, gw.EWC())
    with pytest.raises(
        CheckpointError, match=r"of 2 tasks, but without importances.*sharded_state"
    ):
        wires.regularizers[0].load_state_dict({"tasks": 2, "mean": {}, "precision": {}})
