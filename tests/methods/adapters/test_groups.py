"""Groups of LoRA adapters: how they begin, what they add up to, and how they are merged."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.errors import SelectionError, UsageError
from guywire.methods.adapters._lora import sites

TARGETS = ("q_proj", "v_proj")
KINDS = {"injected": {"wrap": False}, "wrapped": {"wrap": True}}


class Block(nn.Module):
    """Attention of one head without softmax, so that any change shows."""

    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        weights = torch.tanh(self.q_proj(x) @ self.k_proj(x).transpose(-1, -2))
        return x + weights @ self.v_proj(x)


class Net(nn.Module):
    def __init__(self, width=12, blocks=2, classes=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(1))


def net(seed=0, **more):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Net(**more)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stir(model, seed=1, scale=0.3):
    """Give the factors B values, as training would."""
    with torch.no_grad():
        for site in sites(model):
            site.B.copy_(scale * torch.randn(site.B.shape, generator=generator(seed)))
            seed += 1
    return model


X = torch.randn(5, 4, 12, generator=generator(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_check_1_a_group_begins_as_the_pretrained_model_bit_for_bit(kind, n):
    plain = net()
    model = gw.lora_group(copy.deepcopy(plain), n, 3, target_modules=TARGETS, **KINDS[kind])
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("kind", KINDS)
def test_check_1_one_module_is_a_standard_lora(kind):
    model = gw.lora_group(net(), 1, 3, target_modules=TARGETS, **KINDS[kind])
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(TARGETS))
    wanted = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for mine, theirs in zip(sites(model), sites(wanted), strict=True):
            theirs.A.copy_(mine.A)
            mine.B.copy_(0.3 * torch.randn(mine.B.shape, generator=generator(1)))
            theirs.B.copy_(mine.B)
    for one in (model, wanted):
        one(X).square().sum().backward()
    torch.testing.assert_close(model(X), wanted(X), rtol=0, atol=1e-6)
    for mine, theirs in zip(sites(model), sites(wanted), strict=True):
        torch.testing.assert_close(mine.A.grad, theirs.A.grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine.B.grad, theirs.B.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_group_is_the_sum_of_its_modules(kind):
    plain = net()
    model = stir(gw.lora_group(copy.deepcopy(plain), 3, 2, target_modules=TARGETS, **KINDS[kind]))
    with torch.no_grad():
        for i, block in enumerate(plain.blocks):
            for name in TARGETS:
                mine = [s for s in sites(model) if s.name.endswith(f"blocks.{i}.{name}")]
                assert [s.adapter for s in mine] == ["group_0", "group_1", "group_2"]
                assert {s.scaling for s in mine} == {1.0}
                block.get_submodule(name).weight.add_(sum(s.B @ s.A for s in mine))
    torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)


def test_without_a_penalty_a_group_is_one_lora_of_its_size():
    group, single = (
        gw.lora_group(net(), n, r, target_modules=TARGETS, generator=generator(5))
        for n, r in ((4, 2), (1, 8))
    )
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (group, single)]
    for model, optimizer in zip((group, single), optimizers, strict=True):
        for _ in range(5):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(group(X), single(X), rtol=1e-4, atol=1e-5)
    stacked = torch.cat([s.A for s in sites(group)[:4]])
    torch.testing.assert_close(stacked, sites(single)[0].A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_check_8_merging_keeps_the_logits_and_gives_the_plain_model_back(kind):
    plain = net()
    model = stir(gw.lora_group(copy.deepcopy(plain), 3, 2, target_modules=TARGETS, **KINDS[kind]))
    wanted = model(X).detach()
    merged = gw.merge_lora_group(model)
    assert (merged(X) - wanted).abs().max() < 1e-5
    assert (merged(X) - plain(X)).abs().max() > 1e-2
    assert type(merged) is Net
    assert list(merged.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        touched = any(f"{target}.weight" in name for target in TARGETS)
        assert torch.equal(tensor, merged.state_dict()[name]) != touched, name
    with pytest.raises(SelectionError, match="no adapters to merge"):
        gw.merge_lora_group(merged)


@pytest.mark.parametrize("kind", KINDS)
def test_check_8_the_trainable_count(kind):
    blocks, width, n, r = 2, 12, 3, 2
    model = gw.lora_group(net(), n, r, target_modules=TARGETS, **KINDS[kind])
    head = model.get_submodule("base_model.model.classifier" if kind == "wrapped" else "classifier")
    head.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == blocks * 2 * n * 2 * width * r + head.weight.numel() + head.bias.numel()


def test_the_seed_decides_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    one, same, other = (
        gw.lora_group(net(), 2, 2, target_modules=TARGETS, generator=generator(s))
        for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(sites(one), sites(same), sites(other), strict=True):
        assert torch.equal(a.A, b.A)
        assert not torch.equal(a.A, c.A)
        assert not a.B.any()
    first, second = sites(one)[:2]
    assert not torch.equal(first.A, second.A)
    # Kaiming-uniform with a = sqrt 5: within 1 / sqrt(in).
    wide = gw.lora_group(net(width=64), 4, 8, target_modules=TARGETS)
    values = torch.cat([s.A.flatten() for s in sites(wide)])
    assert 0.99 / 8 < values.abs().max() <= 1 / 8
    assert abs(values.std() * 8 * 3**0.5 - 1) < 0.03


def test_a_peft_model_gets_the_group_beside_its_own_adapter():
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=list(TARGETS)))
    stir(model)
    plain = net()
    grouped = gw.lora_group(model, 2, 2, target_modules=TARGETS)
    assert grouped is model
    assert torch.equal(model(X), plain(X)), "the adapter that was there is off"
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    mine = sites(model, ["group_0", "group_1"])
    assert trained == {id(p) for s in mine for p in (s.A, s.B)}


def test_a_wrapped_group_is_saved_and_loaded_by_peft(tmp_path):
    model = stir(gw.lora_group(net(), 2, 2, target_modules=TARGETS, wrap=True))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "group_0", adapter_name="group_0")
    loaded.load_adapter(tmp_path / "group_1", "group_1")
    loaded.base_model.set_adapter(["group_0", "group_1"])
    torch.testing.assert_close(loaded(X), model(X))


def test_bfloat16_and_transposed_layers():
    transformers = pytest.importorskip("transformers")
    conv = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 4)).to(torch.bfloat16)
    x = torch.randn(3, 4, generator=generator()).to(torch.bfloat16)
    wanted = conv(x)
    model = gw.lora_group(conv, 2, 2, target_modules=["0"])
    assert torch.equal(model(x), wanted)
    assert [tuple(s.base.shape) for s in sites(model)] == [(6, 4)] * 2


@pytest.mark.parametrize("keywords", [{"n": 0}, {"r": 0}])
def test_a_group_of_nothing_is_refused(keywords):
    with pytest.raises(UsageError, match="at least 1"):
        gw.lora_group(net(), target_modules=TARGETS, **keywords)


def test_layers_that_are_not_there_and_names_that_are_taken():
    with pytest.raises(SelectionError, match="nowhere"):
        gw.lora_group(net(), target_modules=["nowhere"])
    model = gw.lora_group(net(), 1, 2, target_modules=TARGETS)
    with pytest.raises(UsageError, match="group_0"):
        gw.lora_group(model, 1, 2, target_modules=TARGETS)
