"""Half fine-tuning in loops: rounds, epochs, resume, DDP, the Trainer, beside penalties."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.testing import run_processes

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)
tiny = tiny_models.tiny
batch_of, train, copies = tiny_models.batch_of, tiny_models.train, tiny_models.copies
frozen_rows = tiny_models.frozen_rows

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def test_check_8_rounds_in_a_loop_and_after_resume(tmp_path):
    def run(interrupt):
        model = tiny("gpt2")
        hft = gw.HalfFineTuning(seed=5)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        wires = gw.attach(model, optimizer, hft)
        halves = [list(hft.frozen_)]
        train(model, optimizer, "gpt2", steps=2)
        wires.consolidate()
        halves.append(list(hft.frozen_))
        train(model, optimizer, "gpt2", steps=2, first=2)
        if interrupt:
            checkpoint.save(
                tmp_path / "state",
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "wires": wires.state_dict(),
                },
            )
            saved = checkpoint.load(tmp_path / "state")
            model = tiny("gpt2", seed=9)
            model.load_state_dict(saved["model"])
            hft = gw.HalfFineTuning(seed=5)
            optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
            optimizer.load_state_dict(saved["optimizer"])
            wires = gw.attach(model, optimizer, hft)
            wires.load_state_dict(saved["wires"])
            assert hft.frozen_ == halves[-1]
        train(model, optimizer, "gpt2", steps=2, first=4)
        wires.consolidate()
        halves.append(list(hft.frozen_))
        train(model, optimizer, "gpt2", steps=2, first=6)
        return halves, copies(model)

    (halves, end), (again, other) = run(False), run(True)
    assert len({tuple(h) for h in halves}) == 3
    assert halves == again
    assert all(torch.equal(end[n], other[n]) for n in end)


def test_epochs():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for reselect, halves in (("round", 1), ("epoch", 3)):
        hft = gw.HalfFineTuning(reselect=reselect)
        seen = set()
        with gw.attach(model, optimizer, hft) as wires:
            for epoch in range(3):
                hft.start_epoch(epoch)
                hft.start_epoch(epoch)
                seen.add(tuple(hft.frozen_))
            assert len(seen) == halves
            wires.consolidate()
            assert tuple(hft.frozen_) not in seen
            assert hft.epoch_ == 0
        assert hft.state_dict()["round"] == 1


def test_a_head_that_grows_between_tasks_is_free():
    from guywire.lab.models.classifier import Classifier
    from guywire.lab.models.huggingface import Encoder

    model = Classifier(Encoder(tiny("vit").vit, "image", 16), 16)
    generator = torch.Generator().manual_seed(0)
    hft = gw.HalfFineTuning()
    model.grow(2, generator)
    for task in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        with gw.attach(model, optimizer, hft) as wires:
            assert all(p.requires_grad for p in model.head.parameters())
            model(batch_of("vit", task)["pixel_values"]).square().mean().backward()
            optimizer.step()
            wires.consolidate()
        model.grow(2, generator)
    assert hft.round_ == 2


@pytest.mark.parametrize("anchor", ["previous", "zero"])
def test_beside_a_penalty_only_free_parameters_are_pulled(anchor):
    model = tiny("bert")
    hft = gw.HalfFineTuning()
    held = [hft, gw.L2(1.0, anchor=anchor)]
    for task in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gw.attach(model, optimizer, held) as wires:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1.0)
            before = copies(model)
            optimizer.step()  # no loss: only the pull acts
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name]) == (name in hft.frozen_), (task, name)
            wires.consolidate()


def wrapped_afterwards(rank, parts=1):
    model = tiny("llama").double()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    hft = gw.HalfFineTuning(seed=4)
    wires = gw.attach(model, optimizer, hft)
    for task in range(2):
        # Wrapped after the half is drawn: no gradient of the frozen half is waited for.
        outer = model if parts == 1 else nn.parallel.DistributedDataParallel(model)
        for step in range(2):
            optimizer.zero_grad()
            ids = batch_of("llama", 10 * task + step)["input_ids"][rank::parts]
            outer(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        wires.consolidate()
    return copies(model)


@pytest.mark.multiprocess
def test_two_processes_wrapped_after_attach_equal_one():
    one, two = run_processes(wrapped_afterwards, 2, parts=2)
    alone = wrapped_afterwards(0)
    for name, value in alone.items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], value, rtol=1e-8, atol=1e-8)


def wrapped_before(rank, parts=1, compiled=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    outer = model if parts == 1 else nn.parallel.DistributedDataParallel(model)
    if compiled:
        outer = torch.compile(outer, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hft = gw.HalfFineTuning(seed=4, categories={"*": "feed-forward"})
    wires = gw.attach(outer, optimizer, hft)
    for task in range(2):
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * task + step)
            x = torch.randn(8, 4, generator=generator)[rank::parts]
            optimizer.zero_grad()
            outer(x).square().mean().backward()
            optimizer.step()
        wires.consolidate()
    return copies(model) | {"frozen": sorted(hft.frozen_)}


@pytest.mark.multiprocess
@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes_wrapped_before_attach_equal_one(compiled):
    one, two = run_processes(wrapped_before, 2, parts=2, compiled=compiled)
    alone = wrapped_before(0)
    assert one.pop("frozen") == two.pop("frozen") == alone.pop("frozen")
    for name, value in alone.items():
        torch.testing.assert_close(one[name], value)
        assert torch.equal(one[name], two[name])


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
@pytest.mark.parametrize("reselect", ["round", "epoch"])
def test_in_the_trainer_as_in_a_plain_loop(tmp_path, reselect):
    import transformers

    from guywire.integrations.transformers import GuywireCallback

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {k: v[0] for k, v in batch_of("llama", i, rows=1).items()}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trained, plain = tiny("llama"), tiny("llama")
    hft = gw.HalfFineTuning(seed=6, reselect=reselect)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(tuple(hft.frozen_))

    callback = GuywireCallback(hft)
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, learning_rate=0.01, weight_decay=0.1,
        per_device_train_batch_size=4, lr_scheduler_type="constant", max_grad_norm=0.0,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, optim="adamw_torch",
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = InOrder(trained, options, train_dataset=Rows(), callbacks=[callback, Look()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert len(set(seen)) == (1 if reselect == "round" else 2)
    callback.consolidate()
    assert hft.round_ == 1

    own = gw.HalfFineTuning(seed=6, reselect=reselect)
    decay = trainer.get_decay_parameter_names(plain)
    groups = [
        {
            "params": [p for n, p in plain.named_parameters() if (n in decay) == on],
            "weight_decay": w,
        }
        for on, w in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    with gw.attach(plain, optimizer, own):
        for epoch in range(2):
            own.start_epoch(epoch)
            for start in (0, 4):
                ids = torch.stack([Rows()[i]["input_ids"] for i in range(start, start + 4)])
                optimizer.zero_grad()
                plain(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
    for (name, a), b in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_new_round_without_a_new_optimiser_and_the_old_state():
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    hft = gw.HalfFineTuning()
    wires = gw.attach(model, optimizer, hft)
    train(model, optimizer)
    first = set(hft.frozen_)
    wires.consolidate()
    second = set(hft.frozen_)
    assert first - second
    assert second - first
    before = copies(model)
    train(model, optimizer, first=4)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], before[n]) for n in second)
    assert all(not torch.equal(now[n], before[n]) for n in first - second)
    wires.detach()
    assert all(p.requires_grad for p in model.parameters())
    assert (hft.round_, set(hft.frozen_)) == (1, second)
