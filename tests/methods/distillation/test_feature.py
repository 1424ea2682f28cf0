from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import CheckpointError, DataError, SelectionError, UsageError


def make(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def batch(seed=0, size=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator), torch.arange(size) % 3


def attach(model, *regularizers):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return gw.attach(model, optimizer, list(regularizers)), optimizer


def shake(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def test_the_term_is_zero_at_the_teacher_and_the_squared_distance_away_from_it():
    model = make()
    wires, _ = attach(model, gw.FeatureDistillation(0.5))
    x, y = batch()
    assert wires.loss((x, y), model(x)).item() == 0.0  # no teacher yet
    wires.consolidate()
    teacher = copy.deepcopy(model)
    assert wires.loss((x, y), model(x)).item() == 0.0
    shake(model)
    expected = 0.5 * ((model[1](model[0](x)) - teacher[1](teacher[0](x))) ** 2).sum(1).mean()
    torch.testing.assert_close(wires.loss((x, y), model(x)), expected)
    (by_hand,) = torch.autograd.grad(expected, model[0].weight)
    (found,) = torch.autograd.grad(wires.loss((x, y), model(x)), model[0].weight)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize(
    ("layer", "at", "features"),
    [
        (None, "input", lambda m, x: m[:3](x)),
        (None, "output", lambda m, x: m(x)),
        ("0", "output", lambda m, x: m[0](x)),
        ("1", "input", lambda m, x: m[0](x)),
        ("0", "input", lambda m, x: x),
    ],
)
def test_any_layer_and_side(layer, at, features):
    model = make()
    wires, _ = attach(model, gw.FeatureDistillation(layer=layer, at=at))
    wires.consolidate()
    teacher = copy.deepcopy(model)
    shake(model)
    x, y = batch()
    expected = (features(model, x) - features(teacher, x)).square().sum(1).mean()
    torch.testing.assert_close(wires.loss((x, y), model(x)), expected)


def test_the_features_are_those_of_the_pass_that_gave_the_outputs():
    """With dropout a second pass would give other features."""
    model = make(dropout=0.5)
    wires, _ = attach(model, gw.FeatureDistillation())
    wires.consolidate()
    x, y = batch()
    seen = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    outputs = model(x)
    features = seen[-1]
    model.eval()
    with torch.no_grad():
        model(x * 2)  # an evaluation in between goes unheard
        teacher = model[:3](x)
    model.train()
    expected = (features - teacher).square().sum(1).mean()
    torch.testing.assert_close(wires.loss((x, y), outputs), expected)


def test_replay_before_it_does_not_disturb_the_capture():
    model = make()
    replay = gw.Replay(50, batch_size=10)
    wires, _ = attach(model, replay, gw.FeatureDistillation())
    wires.consolidate()
    shake(model)
    wires.loss(batch(1), model(batch(1)[0]))  # fills the memory
    x, y = batch(2)
    outputs = model(x)
    total = wires.loss((x, y), outputs)
    alone, _ = attach(model, feature := gw.FeatureDistillation())
    feature.teacher_ = wires.regularizers[1].teacher_
    term = alone.loss((x, y), model(x))
    assert float(term.detach()) > 0
    # What is left is replay's: a cross entropy on ten memory samples drawn by a known generator.
    other = gw.Replay(50, batch_size=10)
    other.setup(model)
    other.loss(batch(1), None)
    torch.testing.assert_close(total - term, other.loss((x, y), None))


def test_without_outputs_and_for_another_batch_the_model_runs_once_more():
    model = make()
    wires, _ = attach(model, gw.FeatureDistillation())
    wires.consolidate()
    shake(model)
    x, y = batch()
    expected = wires.loss((x, y), model(x))
    torch.testing.assert_close(wires.loss((x, y)), expected)
    model(x[:4])
    torch.testing.assert_close(wires.loss((x, y), model(x)), expected)


def test_a_growing_head_takes_the_input_of_its_last_block(tmp_path):
    class Growing(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.backbone = nn.Linear(5, 6)
            self.blocks = nn.ModuleList(nn.Linear(6, 2) for _ in range(blocks))

        def forward(self, x):
            return torch.cat([block(self.backbone(x).tanh()) for block in self.blocks], 1)

    model = Growing(1)
    distil = gw.FeatureDistillation()
    wires, _ = attach(model, distil)
    wires.consolidate()
    teacher = copy.deepcopy(model)
    wires.detach()
    model.blocks.append(nn.Linear(6, 2))
    shake(model)
    wires, _ = attach(model, distil)
    x, y = batch()
    expected = (model.backbone(x).tanh() - teacher.backbone(x).tanh()).square().sum(1).mean()
    torch.testing.assert_close(wires.loss((x, y), model(x)), expected)
    checkpoint.save(tmp_path / "s.safetensors", wires.state_dict())
    again, _ = attach(model, gw.FeatureDistillation())
    again.load_state_dict(checkpoint.load(tmp_path / "s.safetensors"))
    assert torch.equal(again.loss((x, y), model(x)), wires.loss((x, y), model(x)))


def test_padding_does_not_count():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            return {"logits": self.head(self.table(input_ids))}

    model = Encoder()
    wires, _ = attach(model, gw.FeatureDistillation())
    wires.consolidate()
    shake(model)
    ids = torch.tensor([[1, 2], [3, 4]])
    wide = F.pad(ids, (0, 3))
    terms = [
        wires.loss({"input_ids": i, "attention_mask": (i > 0).long(), "labels": None})
        for i in (ids, wide)
    ]
    torch.testing.assert_close(*terms)


def test_hooks_go_at_detach_and_are_not_copied():
    model = make()
    distil = gw.FeatureDistillation()
    wires, _ = attach(model, distil)
    assert len(model[3]._forward_hooks) == 1
    user = model[1].register_forward_hook(lambda module, args, output: None)
    wires.consolidate()
    assert not distil.teacher_[3]._forward_hooks
    assert len(distil.teacher_[1]._forward_hooks) == 1  # the user's own stay
    x, y = batch()
    outputs = model(x)
    shake(model)
    copy.deepcopy(model)(x + 5.0)  # a copy that the user made is not listened to
    captured = distil._seen.features
    torch.testing.assert_close(captured, make()[:3](x))
    wires.loss((x, y), outputs)
    assert distil._seen.features is None
    user.remove()
    wires.detach()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_compiled_model_falls_back_to_one_more_pass():
    model = make()
    compiled = torch.compile(model, backend="eager")
    x, y = batch()
    compiled(x)  # compiled before the hooks are there
    wires, _ = attach(compiled, gw.FeatureDistillation())
    wires.consolidate()
    teacher = copy.deepcopy(model)
    shake(model)
    expected = (model[:3](x) - teacher[:3](x)).square().sum(1).mean()
    torch.testing.assert_close(wires.loss((x, y), compiled(x)), expected)


def test_wrong_words():
    with pytest.raises(SelectionError, match="no module 'backbon'"):
        attach(make(), gw.FeatureDistillation(layer="backbon"))
    with pytest.raises(SelectionError, match=r"no nn\.Linear"):
        attach(nn.Conv1d(1, 1, 1), gw.FeatureDistillation())
    with pytest.raises(UsageError, match="at='middle'"):
        attach(make(), gw.FeatureDistillation(at="middle"))
    with pytest.raises(DataError, match="cannot be held to"):
        gw.feature_distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_layer_that_is_never_called_is_named():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0].mean(1)

    model = Attends()
    wires, _ = attach(model, gw.FeatureDistillation())
    wires.consolidate()
    with pytest.raises(DataError, match=r"last nn\.Linear was not called"):
        wires.loss((torch.randn(2, 3, 4), torch.tensor([0, 1])))


def test_a_layer_that_returns_a_tuple_gives_its_first_tensor_and_states_need_a_model():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(5, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    model = Recurrent()
    distil = gw.FeatureDistillation(layer="cell", at="output")
    wires, _ = attach(model, distil)
    empty = distil.state_dict()
    wires.consolidate()
    teacher = copy.deepcopy(model)
    shake(model)
    x = torch.randn(4, 7, 5)
    expected = (model.cell(x)[0] - teacher.cell(x)[0]).square().flatten(1).sum(1).mean()
    found = wires.loss((x, torch.zeros(4).long()), model(x))
    torch.testing.assert_close(found, expected)
    with pytest.raises(CheckpointError, match="attach first"):
        gw.FeatureDistillation().load_state_dict(distil.state_dict())
    distil.load_state_dict(empty)
    assert distil.teacher_ is None
    wires.detach()
    assert distil.loss((x, None), None) is None
