"""Lightning with our callback against a plain loop with the same penalty."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.errors import AttachError

L = pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]

from guywire.integrations.lightning import GuywireCallback  # noqa: E402

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


class Module(L.LightningModule):
    def __init__(self, callback=None, seed=0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.ours = [callback]

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        outputs = self(batch[0])
        loss = nn.functional.cross_entropy(outputs, batch[1])
        return loss if self.ours[0] is None else loss + self.ours[0].loss(batch, outputs)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def loader(batch):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=batch)


def fit(module, callback, folder, batch=4, epochs=1, resume=None, **options):
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=folder,
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, loader(batch), ckpt_path=resume)
    return trainer


def plain(module, extra, batch=4):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for x, y in loader(batch):
        optimizer.zero_grad()
        outputs = module(x)
        (nn.functional.cross_entropy(outputs, y) + extra(module, x, outputs)).backward()
        optimizer.step()


def same(one, two):
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_side_equals_a_plain_loop(tmp_path, accumulation):
    one, two = Module(), Module()
    anchors = {n: p.detach() + 0.2 for n, p in one.named_parameters()}
    callback = GuywireCallback(gw.L2(0.3, anchor=anchors))
    fit(two, callback, tmp_path, 4 // accumulation, accumulate_grad_batches=accumulation)
    plain(one, lambda m, x, z: 0.3 * gw.l2_penalty(dict(m.named_parameters()), anchors))
    same(one, two)
    assert callback.wires.steps == 6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_side_counts_once(tmp_path, accumulation):
    teacher = Module(seed=1)
    distil = gw.PredictionDistillation(2.0)
    with gw.attach(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), distil) as wires:
        wires.consolidate()
    callback = GuywireCallback(distil)
    one, two = Module(), Module(callback)
    fit(two, callback, tmp_path, 4 // accumulation, accumulate_grad_batches=accumulation)

    def extra(module, x, outputs):
        with torch.no_grad():
            wanted = teacher(x)
        return 2.0 * gw.prediction_distillation_loss(outputs, wanted)

    plain(one, extra)
    same(one, two)


def test_consolidate(tmp_path):
    ewc = gw.EWC(1.0)
    callback = GuywireCallback(ewc)
    with pytest.raises(AttachError, match="comes after trainer"):
        callback.consolidate([])
    module = Module()
    fit(module, callback, tmp_path)
    callback.consolidate(loader(8))
    assert ewc.tasks_ == 1
    assert callback.wires is None
    fit(module, GuywireCallback(ewc, consolidate=True), tmp_path)
    assert ewc.tasks_ == 2


def test_resume_equals_no_interruption(tmp_path):
    def ewc():
        made, module = gw.EWC(3.0), Module(seed=2)
        with gw.attach(module, torch.optim.SGD(module.parameters(), lr=0.1), made) as wires:
            wires.consolidate([(X, Y)])
        return made

    whole, half = Module(), Module()
    fit(whole, GuywireCallback(ewc()), tmp_path, epochs=2)
    trainer = fit(half, GuywireCallback(ewc()), tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = Module(seed=7)
    callback = GuywireCallback(gw.EWC(3.0))
    fit(again, callback, tmp_path, epochs=2, resume=tmp_path / "half.ckpt")
    same(whole, again)
    assert callback.wires.steps == 12


def test_an_exception_detaches(tmp_path):
    class Broken(Module):
        def training_step(self, batch, index):
            raise ZeroDivisionError

    callback = GuywireCallback(gw.L2(0.5))
    module = Broken()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ZeroDivisionError):
        fit(module, callback, tmp_path)
    assert callback.wires is None
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
