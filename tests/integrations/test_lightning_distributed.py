"""Lightning's Trainer under DDP, on two gloo processes: it ends where one process ends."""

from __future__ import annotations

import logging
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw
from guywire.testing import run_processes

pl = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.multiprocess

from guywire.integrations.lightning import GuywireCallback  # noqa: E402

METHODS = {
    "EWC": lambda: gw.EWC(30.0, labels="true"),
    "GEM": lambda: gw.GEM(24, margin=0.1),
    "PredictionDistillation": lambda: gw.PredictionDistillation(3.0),
}


def task_data(seed, rank, count):
    """This process's part: of two, one gets only the label 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(1, 3, (24,), generator=generator)
    y[::2] = 0
    return torch.utils.data.TensorDataset(x[rank::count], y[rank::count])


class Module(pl.LightningModule):
    """Holds its callback, as many do: a teacher must not copy what hangs on that."""

    def __init__(self, net, callback):
        super().__init__()
        self.net, self.callback = net, callback

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        outputs = self(batch[0])
        return F.cross_entropy(outputs, batch[1]) + self.callback.loss(batch, outputs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(name, folder, rank=0, count=1):
    warnings.simplefilter("ignore")  # of Lightning's: few workers, few batches
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    method = METHODS[name]()
    for task in (1, 2):
        callback = GuywireCallback(method)
        module = Module(net, callback)
        trainer = pl.Trainer(
            accelerator="cpu", devices=count, strategy="ddp" if count > 1 else "auto",
            max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback], default_root_dir=folder,
            use_distributed_sampler=False,
        )  # fmt: skip
        part = task_data(task, rank, count)
        trainer.fit(module, torch.utils.data.DataLoader(part, batch_size=8 // count))
        if task == 1:
            callback.consolidate(trainer.train_dataloader)
        else:
            callback.detach()
    if name == "PredictionDistillation":
        assert method.teacher_.callback.regularizers is method  # shared, not copied
        assert method.old_classes_.tolist() == [0, 1, 2]
    return [p.detach() for p in net.parameters()]


def in_two(rank, folder):
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0")
    os.environ.update(LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for; the group is there
    return {name: train(name, folder, rank, 2) for name in METHODS}


@pytest.fixture(scope="module")
def found_in_two(tmp_path_factory):
    return run_processes(in_two, 2, folder=str(tmp_path_factory.mktemp("two")))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(found_in_two, name, tmp_path):
    one = train(name, str(tmp_path))
    for found in found_in_two:
        torch.testing.assert_close(found[name], one, rtol=1e-7, atol=1e-9)
