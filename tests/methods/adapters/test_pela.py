"""PELA in loops: its two terms, what the original costs and keeps, and the sheet's exact checks."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.errors import AttachError, DataError, SelectionError, UsageError
from guywire.methods.adapters import pela as module

_spec = importlib.util.spec_from_file_location(
    "tiny", Path(__file__).parents[1] / "sparsity" / "tiny.py"
)
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


def train(model, wires, optimizer, kind, steps=4):
    losses = []
    for step in range(steps):
        batch = batch_of(kind, step)
        optimizer.zero_grad()
        outputs = model(**batch)
        loss = outputs.loss + (0 if wires is None else wires.loss(batch, outputs))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama", "t5"])
def test_check_3_all_losses_are_zero_at_full_rank(kind):
    teacher = tiny(kind).double()
    model = gw.factorize(teacher, rank=10_000)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(kind, 0).items()}
    with gw.attach(model, adamw(model), gw.PELA(teacher, epsilon=0.0)) as wires:
        assert float(wires.loss(batch, model(**batch)).detach()) < 1e-20


def test_check_4_nothing_to_distil_where_weights_have_low_rank():
    teacher = gw.fold_factors(gw.factorize(tiny("bert").double(), 1.5))
    model = gw.factorize(teacher, 1.5)
    batch = batch_of("bert", 0)
    pela = gw.PELA(teacher, perturbation=0.0)
    with gw.attach(model, adamw(model), pela) as wires:
        assert float(wires.loss(batch, model(**batch)).detach()) < 1e-20


def test_check_6_the_perturbation_term():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    # With W1 the identity, W2 - W is the deviation, and its gradient is that of W2.
    second = (weight + torch.randn(9, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    first = torch.eye(7, dtype=torch.float64)
    gaps = (second - weight).detach()
    value = gw.perturbation_loss(first, second, weight, 0.1)
    assert float(value.detach()) == pytest.approx(float((gaps.abs().max() - 0.1) ** 2), abs=1e-14)
    (gradient,) = torch.autograd.grad(value, second)
    assert int((gradient != 0).sum()) == 1
    index = int(gaps.abs().argmax())
    wanted = 2 * (gaps.abs().max() - 0.1) * gaps.flatten()[index].sign()
    torch.testing.assert_close(gradient.flatten()[index], wanted)
    # At the aim, and at no deviation at all, there is no gradient and no NaN.
    for start, epsilon in ((second, float(gaps.abs().max())), (weight.requires_grad_(), 0.0)):
        value = gw.perturbation_loss(first, start, weight.detach(), epsilon)
        (gradient,) = torch.autograd.grad(value, start)
        assert float(value.detach()) < 1e-30
        assert float(gradient.abs().max()) < 1e-15


@pytest.mark.parametrize("chunk", [1, 20, 1 << 20])
def test_check_6_in_chunks_as_autograd_on_the_whole(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    first, second, weight = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 8), (11, 3), (11, 8))
    )
    pair = [first.requires_grad_(), second.requires_grad_()]
    ours = torch.autograd.grad(gw.perturbation_loss(*pair, weight, 0.05), pair)
    whole = ((second @ first - weight).abs().max() - 0.05).square()
    for a, b in zip(ours, torch.autograd.grad(whole, pair), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(DataError, match="do not make"):
        gw.perturbation_loss(first, second, weight.T)


def test_check_6_is_the_mean_over_layers():
    teacher = tiny("bert")
    model = gw.factorize(teacher, 1.5)
    with gw.attach(model, adamw(model), gw.PELA(teacher, feature=0.0, perturbation=3.0)) as wires:
        value = float(wires.loss(batch_of("bert", 0)).detach())
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "LowRank"}
    gaps = [
        (m.second.weight @ m.first.weight - teacher.get_submodule(n).weight).detach().abs().max()
        for n, m in layers.items()
    ]
    wanted = 3.0 * sum(float((g - 1e-3) ** 2) for g in gaps) / len(gaps)
    assert value == pytest.approx(wanted, rel=1e-5)


def test_check_7_the_original_is_run_in_eval_mode_and_left_alone():
    teacher = tiny("bert")
    for m in teacher.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.5
    teacher.train()
    model = gw.factorize(teacher, 1.5)
    optimizer = adamw(model)
    batch = batch_of("bert", 0)
    model.eval()  # its own dropout off, so that two passes can be compared
    with gw.attach(model, optimizer, gw.PELA(teacher)) as wires:
        outputs = model(**batch)
        one = float(wires.loss(batch, outputs).detach())
        outputs = model(**batch)
        assert float(wires.loss(batch, outputs).detach()) == one
        # The order of the batch does not matter.
        order = torch.tensor([2, 0, 3, 1])
        turned = {k: v[order] for k, v in batch.items()}
        again = wires.loss(turned, model(**turned))
        assert float(again.detach()) == pytest.approx(one, rel=1e-6)
        teacher.eval()
        before = teacher(**batch).logits
        teacher.train()
        model.train()
        train(model, wires, optimizer, "bert", steps=10)
        assert all(m.training for m in teacher.modules())
        assert all(p.grad is None for p in teacher.parameters())
        assert not any(m._forward_hooks for m in teacher.modules())
        teacher.eval()
        assert torch.equal(teacher(**batch).logits, before)
    assert not any(m._forward_hooks for m in model.modules())


def test_check_8_off_it_is_plain_training():
    teacher = tiny("bert")
    plain, held = (gw.factorize(teacher, 1.5) for _ in range(2))
    wanted = train(plain, None, adamw(plain), "bert")
    optimizer = adamw(held)
    with gw.attach(held, optimizer, gw.PELA(teacher, feature=0.0, perturbation=0.0)) as wires:
        assert train(held, wires, optimizer, "bert") == wanted
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True)
    )


def test_check_8_a_copy_has_nothing_to_learn():
    model = gw.factorize(tiny("bert"), 1.5)
    batch = batch_of("bert", 0)
    with pytest.raises(AttachError, match="factorised"):
        gw.attach(model, adamw(model), gw.PELA(copy.deepcopy(model)))
    dense = gw.fold_factors(model).double()
    twin = gw.factorize(dense, rank=10_000)
    with gw.attach(twin, adamw(twin), gw.PELA(dense, perturbation=0.0)) as wires:
        assert float(wires.loss(batch, twin(**batch)).detach()) < 1e-20


@pytest.mark.parametrize("white", [True, False])
def test_check_9_a_linear_net_ends_at_the_best_map_for_its_inputs(white):
    generator = torch.Generator().manual_seed(0)
    wide, rank = 12, 4
    weight = torch.randn(wide, wide, generator=generator, dtype=torch.float64)
    root = torch.eye(wide, dtype=torch.float64)
    if not white:
        turn = torch.linalg.qr(torch.randn(wide, wide, generator=generator, dtype=torch.float64)).Q
        root = turn @ torch.diag(torch.linspace(0.4, 2.0, wide, dtype=torch.float64)) @ turn.T

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleList([nn.Sequential(nn.Linear(wide, wide, bias=False))])

        def forward(self, x):
            return self.body[0](x)

    teacher = Net().double()
    with torch.no_grad():
        teacher.body[0][0].weight.copy_(weight)
    model = gw.factorize(teacher, rank=rank)
    inputs = root * wide**0.5  # rows whose covariance is root^2 exactly
    batch = (inputs, None)
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1.0, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    wires = gw.attach(model, optimizer, gw.PELA(teacher, perturbation=0.0))

    def closure():
        optimizer.zero_grad()
        loss = wires.loss(batch, model(inputs))
        loss.backward()
        return loss

    closure()
    if white:  # the start by SVD is optimal already
        assert all(float(p.grad.abs().max()) < 1e-6 for p in model.parameters())
        return
    assert any(float(p.grad.abs().max()) > 1e-3 for p in model.parameters())
    optimizer.step(closure)
    u, s, vt = torch.linalg.svd(weight @ root)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
    product = model.body[0][0].weight.dense().detach()
    torch.testing.assert_close(product, best, rtol=0, atol=1e-3)


def test_blocks_are_found_and_named():
    names = {
        "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        "gpt2": ["transformer.h.0", "transformer.h.1"],
        "t5": [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)],
        "torch": ["layers.0", "layers.1"],
    }
    for kind, wanted in names.items():
        assert module._blocks(gw.factorize(tiny(kind), 1.5), None) == wanted
    flat = gw.factorize(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)), 1.5)
    with pytest.raises(SelectionError, match=r"blocks=\[\.\.\.\]"):
        module._blocks(flat, None)
    assert module._blocks(flat, ["1"]) == ["1"]
    with pytest.raises(SelectionError, match="near misses"):
        module._blocks(flat, ["2"])


def test_padding_does_not_count():
    teacher = tiny("bert")
    model = gw.factorize(teacher, 1.5).eval()
    batch = batch_of("bert", 0)
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 3)),
        "attention_mask": nn.functional.pad(torch.ones(4, 8, dtype=torch.long), (0, 3)),
        "labels": batch["labels"],
    }
    with gw.attach(model, adamw(model), gw.PELA(teacher, perturbation=0.0)) as wires:
        short, long = (float(wires.loss(b, model(**b)).detach()) for b in (batch, longer))
    assert long == pytest.approx(short, rel=1e-5)


def test_without_outputs_the_model_runs_once_more():
    teacher = tiny("bert")
    model = gw.factorize(teacher, 1.5)
    batch = batch_of("bert", 0)
    runs = []
    model.bert.register_forward_hook(lambda *_: runs.append(1))
    with gw.attach(model, adamw(model), gw.PELA(teacher)) as wires:
        given = wires.loss(batch, model(**batch)).detach()
        assert len(runs) == 1
        assert torch.equal(wires.loss(batch).detach(), given)
        assert len(runs) == 2


def test_repair_brings_the_blocks_nearer_and_bounds_the_weights():
    teacher = tiny("bert")
    with torch.no_grad():
        for p in teacher.bert.encoder.parameters():
            if p.dim() == 2:
                p.mul_(15.0)  # as large as trained ones

    def largest(model):
        pairs = [(n, m) for n, m in model.named_modules() if type(m).__name__ == "LowRank"]
        return max(
            float((m.weight.dense() - teacher.get_submodule(n).weight).detach().abs().max())
            for n, m in pairs
        )

    ends = {}
    for bound in (0.0, 1.0):
        model = gw.factorize(teacher, 3.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        losses = []
        with gw.attach(model, optimizer, gw.PELA(teacher, perturbation=bound)) as wires:
            for step in range(40):
                batch = batch_of("bert", step % 4)
                optimizer.zero_grad()
                loss = wires.loss(batch, model(**batch))  # no labels needed
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]
        ends[bound] = largest(model)
    assert ends[1.0] < ends[0.0]


def test_bfloat16_and_a_teacher_of_more_bits():
    teacher = tiny("bert")
    model = gw.factorize(teacher, 1.5).bfloat16()
    batch = batch_of("bert", 0)
    with gw.attach(model, adamw(model), gw.PELA(teacher)) as wires:
        loss = wires.loss(batch, model(**batch))
        loss.backward()
        assert loss.dtype == torch.float32
        assert bool(torch.isfinite(loss.detach()))


def test_checkpoint_and_resume_bit_for_bit(tmp_path):
    from guywire.core import checkpoint

    teacher = tiny("bert")

    def fresh():
        model = gw.factorize(teacher, 1.5)
        optimizer = adamw(model)
        return model, optimizer, gw.attach(model, optimizer, gw.PELA(teacher))

    model, optimizer, wires = fresh()
    train(model, wires, optimizer, "bert")
    saved = {"m": model.state_dict(), "o": optimizer.state_dict(), "w": wires.state_dict()}
    checkpoint.save(tmp_path / "state", saved)
    wanted = train(model, wires, optimizer, "bert")
    model, optimizer, wires = fresh()
    saved = checkpoint.load(tmp_path / "state")
    model.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    wires.load_state_dict(saved["w"])
    assert train(model, wires, optimizer, "bert") == wanted


def test_errors_at_attach():
    teacher = tiny("bert")
    model = gw.factorize(teacher, 1.5)
    with pytest.raises(SelectionError, match="no factorised layers"):
        gw.attach(teacher, adamw(teacher), gw.PELA(teacher))
    with pytest.raises(AttachError, match="teacher"):
        gw.attach(model, adamw(model), gw.PELA(tiny("gpt2")))
    wide = gw.factorize(nn.Sequential(nn.Linear(20, 30)), 1.5)
    with pytest.raises(AttachError, match="shape"):
        gw.attach(wide, adamw(wide), gw.PELA(nn.Sequential(nn.Linear(20, 20)), blocks=["0"]))
    with pytest.raises(UsageError, match="-1"):
        gw.attach(model, adamw(model), gw.PELA(teacher, feature=-1.0))
    with gw.attach(model, adamw(model), gw.PELA(lambda student: teacher)) as wires:
        assert float(wires.loss(batch_of("bert", 0)).detach()) > 0


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
def test_in_the_trainer_as_in_a_plain_loop(tmp_path):
    import transformers

    from guywire.integrations.transformers import GuywireCallback

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {k: v[0] for k, v in batch_of("bert", i, rows=1).items()}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    teacher = tiny("bert")
    trained, plain = (gw.factorize(teacher, 1.5) for _ in range(2))
    callback = GuywireCallback(gw.PELA(teacher))

    def loss(outputs, labels, num_items_in_batch=None):
        task = nn.functional.cross_entropy(outputs.logits, labels)
        return task + callback.loss(outputs, labels, num_items_in_batch)

    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, learning_rate=0.01, weight_decay=0.0,
        per_device_train_batch_size=4, lr_scheduler_type="constant", max_grad_norm=0.0,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, optim="adamw_torch",
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = InOrder(
        trained, options, train_dataset=Rows(), callbacks=[callback], compute_loss_func=loss
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    callback.detach()

    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    plain.train()
    with gw.attach(plain, optimizer, gw.PELA(teacher)) as wires:
        for start in (0, 4):
            rows = [Rows()[i] for i in range(start, start + 4)]
            batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
            optimizer.zero_grad()
            outputs = plain(**batch)
            (outputs.loss + wires.loss(batch, outputs)).backward()
            optimizer.step()
    for (name, a), b in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
