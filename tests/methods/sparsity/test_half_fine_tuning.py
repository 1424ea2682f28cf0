"""Half fine-tuning in loops: what is frozen, what it costs, rounds, and the sheet's exact checks."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import AttachError, CheckpointError, UsageError
from guywire.testing import run_processes

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)
tiny = tiny_models.tiny


def batch_of(kind, seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {
            "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
            "labels": torch.randint(3, (rows,), generator=generator),
        }
    ids = torch.randint(3, 50, (rows, 8), generator=generator)
    labels = torch.randint(3, (rows,), generator=generator) if kind == "bert" else ids
    return {"input_ids": ids, "labels": labels}


def train(model, optimizer, kind="llama", steps=4, clip=1.0, first=0, norms=None):
    model.train()
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(**batch_of(kind, step)).loss.backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            if norms is not None:
                norms.append(float(norm))
        optimizer.step()


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def frozen_rows(model, frozen):
    """Yield each frozen tensor or block of the model's parameters now."""
    from guywire.methods.sparsity._pieces import parse

    params = dict(model.named_parameters())
    for name in frozen:
        whole, index = parse(name)
        yield name, params[whole].detach() if index is None else params[whole].detach()[index]


ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("llama", lambda p: torch.optim.AdamW(p, **ADAMW, foreach=False)),
        ("llama", lambda p: torch.optim.AdamW(p, **ADAMW, foreach=True)),
        ("llama", lambda p: torch.optim.AdamW(p, **ADAMW, fused=True)),
        ("llama", lambda p: torch.optim.Adam(p, **ADAMW, amsgrad=True)),
        ("llama", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
        ("llama", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True)),
        ("llama", lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1)),
        ("gpt2", lambda p: torch.optim.AdamW(p, **ADAMW, foreach=True)),
        ("gpt2", lambda p: torch.optim.AdamW(p, **ADAMW, fused=True)),
        ("gpt2", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
        ("bert", lambda p: torch.optim.AdamW(p, **ADAMW)),
        ("vit", lambda p: torch.optim.AdamW(p, **ADAMW)),
        ("t5", lambda p: torch.optim.AdamW(p, **ADAMW)),
    ],
    ids=[
        "llama-adamw", "llama-foreach", "llama-fused", "llama-amsgrad", "llama-momentum",
        "llama-momentum-foreach", "llama-adafactor", "gpt2-foreach", "gpt2-fused",
        "gpt2-momentum", "bert", "vit", "t5",
    ],
)  # fmt: skip
def test_check_3_the_frozen_half_stays_bit_for_bit(kind, make):
    model = tiny(kind)
    # The optimiser is made before, and has momentum for all parameters already.
    optimizer = make(model.parameters())
    train(model, optimizer, kind, steps=2)
    hft = gw.HalfFineTuning(seed=3)
    with gw.attach(model, optimizer, hft):
        before = {name: value.clone() for name, value in frozen_rows(model, hft.frozen_)}
        whole = copies(model)
        train(model, optimizer, kind, first=2)
        for name, value in frozen_rows(model, hft.frozen_):
            assert torch.equal(value, before[name]), name
        updated = [n for n in whole if n not in before]
        params = dict(model.named_parameters())
        assert all(not torch.equal(params[n], whole[n]) for n in updated)
        for name in before:
            if name in params:
                assert params[name].grad is None
                assert not params[name].requires_grad
                assert params[name] not in optimizer.state
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_check_3_bytes_of_the_optimisers_state(fused):
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=fused)
    with gw.attach(model, optimizer, gw.HalfFineTuning()):
        train(model, optimizer)
        moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
        held = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
        assert sum(v.numel() * v.element_size() for v in held) == 2 * moving * 4
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert sum(g.numel() for g in grads) == moving
        assert moving < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_check_4_all_is_full_fine_tuning(kind):
    plain, held = tiny(kind), tiny(kind)
    for model, regularizers in ((plain, []), (held, [gw.HalfFineTuning(1.0)])):
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        wires = gw.attach(model, optimizer, regularizers)
        train(model, optimizer, kind)
        wires.consolidate()
        train(model, optimizer, kind)
        wires.detach()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True)
    )


def test_check_4_nothing_stays_as_it_is():
    model = tiny("gpt2")
    for name, p in model.named_parameters():
        p.requires_grad_(".h." in name)  # embeddings and final norm frozen too
    before = copies(model)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    with gw.attach(model, optimizer, gw.HalfFineTuning(0.0)):
        assert not any(p.requires_grad for p in model.parameters())
        for _ in range(2):
            optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # What was frozen before is not unfrozen.
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in before if ".h." in n
    }


@pytest.mark.parametrize("adam", [False, True])
def test_check_5_three_ways_of_freezing_are_one(adam):
    def optimise(params):
        if adam:
            return torch.optim.Adam(params, lr=1e-2)
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    names = set(gw.half(tiny("llama"), seed=2))
    models, norms = [tiny("llama") for _ in range(4)], [[] for _ in range(4)]
    masked, excluded, flagged, ours = models
    for name, p in masked.named_parameters():
        if name not in names:
            p.register_hook(torch.zeros_like)
    chosen = [p for n, p in excluded.named_parameters() if n in names]
    for name, p in flagged.named_parameters():
        p.requires_grad_(name in names)
    optimizers = [optimise(m.parameters()) for m in models]
    optimizers[1] = optimise(chosen)
    for name, p in excluded.named_parameters():
        p.requires_grad_(name in names)
    with gw.attach(ours, optimizers[3], gw.HalfFineTuning(seed=2)):
        for model, optimizer, norm in zip(models, optimizers, norms, strict=True):
            train(model, optimizer, clip=0.1, norms=norm)
    for other, norm in zip(models[1:], norms[1:], strict=True):
        torch.testing.assert_close(norm, norms[0], rtol=1e-6, atol=0)
        for a, b in zip(masked.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_check_5_clipping_counts_updated_blocks_only():
    model = tiny("gpt2")
    hft = gw.HalfFineTuning(seed=1)
    reference = tiny("gpt2")
    reference(**batch_of("gpt2", 0)).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gw.attach(model, optimizer, hft):
        grads = {n: p.grad.clone() for n, p in reference.named_parameters()}
        for name in hft.frozen_:
            from guywire.methods.sparsity._pieces import parse

            whole, index = parse(name)
            grads[whole][... if index is None else index] = 0
        wanted = sum(g.square().sum() for g in grads.values()).sqrt()
        norms = []
        train(model, optimizer, "gpt2", steps=1, norms=norms)
        assert norms[0] == pytest.approx(float(wanted), rel=1e-5)


class Quadratic(nn.Module):
    """1/2 (theta - w)^T H (theta - w), theta in two parameters."""

    def __init__(self, hessian, center, start):
        super().__init__()
        self.one, self.two = (nn.Parameter(part.clone()) for part in start.split([3, 2]))
        self.hessian, self.center = hessian, center

    def forward(self):
        distance = torch.cat([self.one, self.two]) - self.center
        return 0.5 * distance @ self.hessian @ distance


def test_check_6_the_constrained_optimum_of_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + 2 * torch.eye(5, dtype=torch.float64)
    center, start = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    model = Quadratic(hessian, center, start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 / float(hessian.trace()))
    categories = {"*": "feed-forward"}
    hft = gw.HalfFineTuning(level="model", categories=categories)
    with gw.attach(model, optimizer, hft):
        assert len(hft.frozen_) == 1
        for _ in range(4000):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    one, two = torch.arange(3), torch.arange(3, 5)
    free, held = (one, two) if hft.frozen_ == ["two"] else (two, one)
    ff, fh, hh = (hessian[a][:, b] for a, b in ((free, free), (free, held), (held, held)))
    theta = torch.cat([model.one, model.two]).detach()
    gap = start[held] - center[held]
    wanted = center[free] - torch.linalg.solve(ff, fh @ gap)
    torch.testing.assert_close(theta[free], wanted, rtol=0, atol=1e-10)
    assert torch.equal(theta[held], start[held])
    schur = hh - fh.T @ torch.linalg.solve(ff, fh)
    assert float(model().detach()) == pytest.approx(float(0.5 * gap @ schur @ gap), abs=1e-12)
    # Full fine-tuning under lambda ||(I - M)(theta - theta^0)||^2 comes to it as 1/lambda.
    errors = []
    for strength in (1e2, 1e4, 1e6):
        pull = torch.zeros(5, dtype=torch.float64)
        pull[held] = 2 * strength
        solution = torch.linalg.solve(hessian + torch.diag(pull), hessian @ center + pull * start)
        errors.append(float((solution - theta).norm()) * strength)
    assert errors[1] == pytest.approx(errors[2], rel=1e-3)
    assert errors[0] == pytest.approx(errors[2], rel=0.2)


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


def test_check_9_flops_fall_from_six_to_five_units():
    model = tiny("llama", layers=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = batch_of("llama", 0)
    tokens = batch["input_ids"].numel()

    def matmuls():
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        counted = counter.get_flop_counts()["Global"]
        # Not attention's own products, which no weight takes part in.
        return sum(
            v for op, v in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
        )

    full = matmuls()
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    inside = sum(size for name, size in sizes.items() if ".layers." in name)
    head = sizes["lm_head.weight"]
    assert full == 6 * tokens * (inside + head)
    with gw.attach(model, optimizer, gw.HalfFineTuning()):
        half = matmuls()
    assert half - 6 * tokens * head == 5 * tokens * inside


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


def test_the_model_is_left_alone_but_for_its_flags():
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    hft = gw.HalfFineTuning()
    wires = gw.attach(model, optimizer, hft)
    train(model, optimizer)
    before, state = copies(model), torch.get_rng_state()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    wires.consolidate()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad and name in grads:
            assert torch.equal(p.grad, grads[name])
        else:
            assert p.grad is None


def test_what_was_frozen_before_stays_frozen():
    model = tiny("llama")
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    with gw.attach(model, optimizer, gw.HalfFineTuning()) as wires:
        train(model, optimizer)
        wires.consolidate()
        assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert all(p.requires_grad for p in model.model.layers[1].parameters())


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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16(kind):
    model = tiny(kind).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    hft = gw.HalfFineTuning()
    with gw.attach(model, optimizer, hft):
        before = {n: v.clone() for n, v in frozen_rows(model, hft.frozen_)}
        train(model, optimizer, kind)
        assert all(torch.equal(v, before[n]) for n, v in frozen_rows(model, hft.frozen_))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_errors():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="'step'"):
        gw.attach(model, optimizer, gw.HalfFineTuning(reselect="step"))
    with pytest.raises(UsageError, match=r"ratio is 1\.5"):
        gw.attach(model, optimizer, gw.HalfFineTuning(1.5))
    assert all(p.requires_grad for p in model.parameters())
    hft = gw.HalfFineTuning(seed=1)
    with gw.attach(model, optimizer, hft) as wires:
        state = wires.state_dict()
    other = tiny("bert")
    with pytest.raises(AttachError, match="which the model lacks"):
        gw.attach(other, torch.optim.SGD(other.parameters(), lr=0.1), hft)
    with (
        gw.attach(model, optimizer, gw.HalfFineTuning(seed=2)) as wires,
        pytest.raises(CheckpointError, match="seed 1"),
    ):
        wires.load_state_dict(state)
    with (
        gw.attach(
            other, torch.optim.SGD(other.parameters(), lr=0.1), gw.HalfFineTuning(seed=1)
        ) as w,
        pytest.raises(CheckpointError, match="lacks"),
    ):
        w.load_state_dict(state)


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


def test_deep_copies_of_a_held_model_can_be_made():
    model = tiny("gpt2")
    with gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), gw.HalfFineTuning()):
        twin = copy.deepcopy(model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
