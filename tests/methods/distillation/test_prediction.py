"""Exact checks 2, 5 and 6 of the rehearsal-free-cl sheet, and the life of a teacher."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import AttachError, CheckpointError, DataError, UsageError


class Growing(nn.Module):
    """A backbone and a head of one block a task."""

    def __init__(self, blocks=1, seed=0, norm=True):
        super().__init__()
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(8)] if norm else []
        self.backbone = nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Dropout(0.2))
        self.blocks = nn.ModuleList(nn.Linear(8, 2) for _ in range(blocks))

    def grow(self):
        self.blocks.append(nn.Linear(8, 2))

    def forward(self, x):
        features = self.backbone(x)
        return torch.cat([block(features) for block in self.blocks], 1)


def batch(task, seed=0, size=12):
    generator = torch.Generator().manual_seed(100 * task + seed)
    x = torch.randn(size, 5, generator=generator)
    return x, torch.randint(2, (size,), generator=generator) + 2 * task


def attach(model, regularizer, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return gw.attach(model, optimizer, regularizer), optimizer


# The pure function


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.5, 8.0), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_softmax_distillation_at_equality_is_the_mean_entropy_with_zero_gradient(b, c, t, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(b, c, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = gw.prediction_distillation_loss(z, z.detach(), temperature=t)
    entropy = torch.distributions.Categorical(logits=z.detach() / t).entropy().mean()
    assert float(loss.detach()) == pytest.approx(float(entropy), abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(gradient.abs().max()) < 1e-7


def test_sigmoid_distillation_at_equality_is_the_summed_binary_entropy_with_zero_gradient():
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    loss = gw.prediction_distillation_loss(z, z.detach(), kind="sigmoid")
    entropy = torch.distributions.Bernoulli(logits=z.detach()).entropy().sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(entropy), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(gradient.abs().max()) < 1e-7


def test_new_columns_do_not_count_and_get_no_gradient():
    student = torch.randn(3, 5, requires_grad=True)
    teacher = torch.randn(3, 2)
    for kind in ("softmax", "sigmoid"):
        loss = gw.prediction_distillation_loss(student, teacher, kind=kind)
        expected = gw.prediction_distillation_loss(student[:, :2], teacher, kind=kind)
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, student)
        assert bool((gradient[:, 2:] == 0).all())


def test_softmax_distillation_is_torchs_cross_entropy_with_soft_targets():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    expected = F.cross_entropy(student / 2, (teacher / 2).softmax(1))
    torch.testing.assert_close(gw.prediction_distillation_loss(student, teacher), expected)


def test_the_push_down_of_old_logits_by_new_samples():
    """Without distillation sigma(z)/B, with it (sigma(z) - sigma(zhat))/B, masked exactly 0."""
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 3, dtype=torch.float64)  # classes 0, 1, 2 are old, 3 and 4 new
    labels = torch.tensor([3, 4, 3, 4, 4, 3])
    (plain,) = torch.autograd.grad(gw.sigmoid_cross_entropy(z, labels), z)
    torch.testing.assert_close(plain[:, :3], z[:, :3].detach().sigmoid() / 6)
    assert bool((plain[:, :3] > 0).all())
    both = gw.sigmoid_cross_entropy(z, labels, [3, 4])
    both = both + gw.prediction_distillation_loss(z, teacher, kind="sigmoid")
    (held,) = torch.autograd.grad(both, z)
    expected = (z[:, :3].detach().sigmoid() - teacher.sigmoid()) / 6
    torch.testing.assert_close(held[:, :3], expected)
    torch.testing.assert_close(held[:, 3:], plain[:, 3:])
    (masked,) = torch.autograd.grad(gw.masked_cross_entropy(z, labels, [3, 4]), z)
    assert bool((masked[:, :3] == 0).all())


def test_wrong_words():
    z = torch.zeros(1, 2)
    with pytest.raises(UsageError, match="kind='hinge'"):
        gw.prediction_distillation_loss(z, z, kind="hinge")
    with pytest.raises(UsageError, match="temperature=0"):
        gw.prediction_distillation_loss(z, z, temperature=0)
    with pytest.raises(DataError, match="may grow but not shrink"):
        gw.prediction_distillation_loss(z, torch.zeros(1, 3))
    for wrong in ({"kind": "x"}, {"temperature": -1}, {"strength": -1.0}):
        with pytest.raises(UsageError):
            attach(Growing(), gw.PredictionDistillation(**wrong))


# The regularizer


def test_nothing_is_added_before_the_first_consolidate():
    model = Growing()
    wires, _ = attach(model, gw.PredictionDistillation())
    assert float(wires.loss(batch(0), model(batch(0)[0]))) == 0.0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_term_is_the_pure_function_of_the_old_classes_of_a_frozen_copy(kind):
    model = Growing(2)
    distil = gw.PredictionDistillation(0.7, kind=kind, temperature=3.0)
    wires, optimizer = attach(model, distil)
    wires.consolidate([batch(0), batch(0, 1)])
    frozen = copy.deepcopy(model).eval()
    F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    optimizer.step()
    x, y = batch(1, 5)
    outputs = model(x)
    expected = gw.prediction_distillation_loss(
        outputs[:, :2], frozen(x)[:, :2], kind=kind, temperature=3.0
    )
    torch.testing.assert_close(wires.loss((x, y), outputs), 0.7 * expected, rtol=0, atol=0)
    assert not distil.teacher_.training
    assert not any(p.requires_grad for p in distil.teacher_.parameters())


def test_old_classes_are_the_union_of_the_labels_consolidated():
    model = Growing(3)
    distil = gw.PredictionDistillation()
    wires, _ = attach(model, distil)
    x = batch(0)[0]
    wires.consolidate([(x, torch.full((12,), 4)), (x, torch.full((12,), 0))])
    assert distil.old_classes_.tolist() == [0, 4]
    wires.consolidate([(x, torch.tensor([5, 2] * 6))])
    assert distil.old_classes_.tolist() == [0, 2, 4, 5]


def test_without_data_all_outputs_of_the_teacher_are_old():
    model = Growing(2, norm=False)
    model.backbone[-1].p = 0.0
    distil = gw.PredictionDistillation()
    wires, _ = attach(model, distil)
    wires.consolidate()
    model.grow()
    wires.refresh()
    x, y = batch(2)
    outputs = model(x)
    expected = gw.prediction_distillation_loss(outputs, outputs[:, :4])
    torch.testing.assert_close(wires.loss((x, y), outputs), expected)
    wires.consolidate([batch(2)])  # everything stays old
    assert distil.old_classes_ is None


def test_a_growing_head_leaves_the_old_columns_alone():
    model = Growing(1)
    wires, _ = attach(model, gw.PredictionDistillation())
    wires.consolidate([batch(0)])
    wires.detach()
    model.grow()
    wires, _ = attach(model, wires.regularizers[0])
    x, y = batch(1)
    wires.loss((x, y), model(x)).backward()
    assert model.blocks[1].weight.grad is None or not model.blocks[1].weight.grad.any()
    assert model.blocks[0].weight.grad.any()


def test_without_outputs_the_model_runs_once_more():
    model = Growing(norm=False)
    model.backbone[-1].p = 0.0
    wires, _ = attach(model, gw.PredictionDistillation())
    wires.consolidate([batch(0)])
    with torch.no_grad():
        model.blocks[0].weight.add_(0.1)
    x, y = batch(0, 3)
    torch.testing.assert_close(wires.loss((x, y)), wires.loss((x, y), model(x)))


@pytest.mark.parametrize(
    "regularizer", [gw.PredictionDistillation(0.0), gw.FeatureDistillation(0.0)]
)
def test_strength_zero_is_plain_training_bit_for_bit(regularizer):
    plain, held = Growing(2), Growing(2)
    wires, optimizer = attach(held, regularizer)
    wires.consolidate([batch(0)])
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for model, opt in ((plain, reference), (held, optimizer)):
        torch.manual_seed(5)
        for step in range(20):
            x, y = batch(1, step)
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            if model is held:
                loss = loss + wires.loss((x, y), outputs)
            opt.zero_grad()
            loss.backward()
            opt.step()
    for a, b in zip(plain.state_dict().values(), held.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_of_the_strength_follows_the_steps():
    model = Growing(2, norm=False)
    model.backbone[-1].p = 0.0
    wires, optimizer = attach(model, gw.PredictionDistillation(lambda step: float(step)), lr=0.0)
    wires.consolidate([batch(0)])
    values = []
    for _ in range(3):
        values.append(float(wires.loss(batch(1)).detach()))
        optimizer.step()
    assert values[0] == 0.0
    assert values[2] == pytest.approx(2 * values[1], rel=1e-6)


def test_hugging_face_dicts_and_tokens_that_do_not_count():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, input_ids, attention_mask):
            return {"logits": self.table(input_ids)}

    model = Tagger()
    wires, _ = attach(model, gw.PredictionDistillation())
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    labels = torch.tensor([[0, 1, 1], [2, -100, -100]])
    data = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    wires.consolidate([data])
    assert wires.regularizers[0].old_classes_.tolist() == [0, 1, 2]
    teacher = model.table.weight.detach().clone()
    with torch.no_grad():
        model.table.weight.add_(torch.randn(9, 4))
    kept = torch.tensor([1, 2, 3, 4])
    expected = gw.prediction_distillation_loss(model.table.weight[kept, :3], teacher[kept, :3])
    torch.testing.assert_close(wires.loss(data), expected)


def test_saved_and_rebuilt_after_the_head_grew_the_old_columns_are_bit_identical(tmp_path):
    model = Growing(1)
    distil = gw.PredictionDistillation()
    wires, optimizer = attach(model, distil)
    wires.consolidate([batch(0)])
    model.grow()
    wires.refresh()
    optimizer.add_param_group({"params": list(model.blocks[1].parameters())})
    for step in range(3):
        x, y = batch(1, step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + wires.loss((x, y))).backward()
        optimizer.step()
    checkpoint.save(tmp_path / "s.safetensors", {"wires": wires.state_dict()})
    other = Growing(2, seed=9)
    other.load_state_dict(model.state_dict())
    again, _ = attach(other, gw.PredictionDistillation())
    again.load_state_dict(checkpoint.load(tmp_path / "s.safetensors")["wires"])
    x, y = batch(1, 9)
    outputs = model(x)
    assert torch.equal(again.loss((x, y), outputs), wires.loss((x, y), outputs))
    rebuilt = again.regularizers[0].teacher_
    assert torch.equal(rebuilt(x)[:, :2], distil.teacher_(x))
    assert torch.equal(rebuilt.backbone[1].running_mean, distil.teacher_.backbone[1].running_mean)
    assert not rebuilt.training


def test_a_state_without_a_teacher_and_states_that_do_not_fit():
    model = Growing(1)
    distil = gw.PredictionDistillation()
    wires, _ = attach(model, distil)
    empty = distil.state_dict()
    wires.consolidate([batch(0)])
    state = distil.state_dict()
    distil.load_state_dict(empty)
    assert distil.teacher_ is None
    with pytest.raises(CheckpointError, match="attach first"):
        gw.PredictionDistillation().load_state_dict(state)
    other = gw.PredictionDistillation()
    attach(nn.Sequential(nn.Linear(5, 8)), other)
    with pytest.raises(CheckpointError, match="which the attached model lacks"):
        other.load_state_dict(state)
    wide = Growing(1)
    wide.blocks[0] = nn.Linear(8, 3)
    other = gw.PredictionDistillation()
    attach(wide, other)
    with pytest.raises(CheckpointError, match="has the shape"):
        other.load_state_dict(state)
    other = gw.PredictionDistillation()
    attach(Growing(2), other)
    with pytest.raises(CheckpointError, match="consolidate with data"):
        other.load_state_dict({**state, "old_classes": None})


def test_the_teacher_shares_no_memory_and_survives_a_new_attachment():
    model = Growing(1)
    distil = gw.PredictionDistillation()
    wires, _ = attach(model, distil)
    wires.consolidate([batch(0)])
    x = batch(0, 4)[0]
    before = distil.teacher_(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    wires.detach()
    assert distil._model is None
    attach(model, distil)
    assert torch.equal(distil.teacher_(x), before)


def test_data_without_class_numbers_is_refused():
    model = Growing(1)
    wires, _ = attach(model, gw.PredictionDistillation())
    x = batch(0)[0]
    with pytest.raises(DataError, match="no class numbers"):
        wires.consolidate([(x, torch.rand(12))])
    for data in ([], iter(()), [(x, torch.full((12,), -100))]):
        with pytest.raises(DataError, match="has no labels"):
            wires.consolidate(data)
    wires.consolidate([(x, torch.full((12,), 7))])
    with pytest.raises(DataError, match="old class 7 lies outside a head of 2"):
        wires.loss((x, torch.zeros(12).long()))


def test_models_that_cannot_be_copied_are_refused_with_a_reason():
    model = Growing(1)
    model.cache = model(batch(0)[0])  # a tensor with a graph
    wires, _ = attach(model, gw.PredictionDistillation())
    with pytest.raises(AttachError, match="cannot be copied for a teacher"):
        wires.consolidate([batch(0)])


def test_compiled_and_wrapped_models_are_unwrapped():
    model = Growing(1)
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    distil = gw.PredictionDistillation()
    wires, _ = attach(wrapped, distil)
    wires.consolidate([batch(0)])
    assert type(distil.teacher_) is Growing
    assert torch.isfinite(wires.loss(batch(0), wrapped(batch(0)[0])))


def test_facts_and_words():
    for method in (gw.PredictionDistillation, gw.FeatureDistillation):
        assert method.slug == "rehearsal-free-cl"
        assert method.place == "loss"
        assert method.memory
        assert method.passes
        assert method.title
        assert method.arxiv
    assert repr(gw.PredictionDistillation(2.0, kind="sigmoid")) == (
        "PredictionDistillation(strength=2.0, kind='sigmoid')"
    )
