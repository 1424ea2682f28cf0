"""The vectors in a user's model: what they must leave alone, and what must reach them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import AttachError, CheckpointError


class Tied(nn.Module):
    """Attention, which reads a weight without calling its layer; a tied weight; a 0-d parameter."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(()))
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight
        self.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def forward(self, ids, again=False):
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        mixed = recompute(self.mix, x, use_reentrant=False) if again else self.mix(x)
        return self.out(mixed.tanh() * self.gain)


IDS = torch.arange(12).reshape(3, 4) % 9


def loss_of(model, **options):
    return nn.functional.cross_entropy(model(IDS, **options).flatten(0, 1), IDS.flatten())


def prepared(model, **options):
    sara = gw.SaRA(**{"share": 0.4} | options)
    return sara, sara.prepare(model)


def step(model, optimizer, count=1, **options):
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, **options).backward()
        optimizer.step()


@pytest.mark.parametrize("again", [False, True])
def test_every_use_of_a_weight_reaches_its_vector(again):
    whole = Tied()
    model = copy.deepcopy(whole)
    _, vectors = prepared(model)
    limit = gw.threshold_of_share(whole.parameters(), 0.4)
    masks = gw.smallest_masks(dict(whole.named_parameters()), limit)
    loss_of(whole).backward()
    loss_of(model, again=again).backward()
    for (name, p), vector in zip(whole.named_parameters(), vectors, strict=True):
        if vector.numel() == 0:
            assert vector.grad is None
            continue
        torch.testing.assert_close(vector.grad, p.grad[masks[name]], rtol=1e-12, atol=1e-15)


def test_the_model_looks_as_before():
    plain = Tied()
    model = copy.deepcopy(plain)
    prepared(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model.mix) is nn.Linear
    assert isinstance(model.mix.weight, nn.Parameter)
    assert model.out.weight is model.embed.weight
    model.load_state_dict(plain.state_dict())
    loss_of(model)
    assert isinstance(model.mix.weight, nn.Parameter)
    own = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert all(name.startswith("_sara.") for name in own)
    assert len(own) == len(list(plain.parameters()))


def test_a_sequential_as_the_root():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model = copy.deepcopy(plain)
    _, vectors = prepared(model)
    x = torch.ones(2, 4)
    assert torch.equal(model(x), plain(x))
    model(x).sum().backward()
    assert any(v.grad is not None for v in vectors)
    model.load_state_dict({n: t + 1.0 for n, t in plain.state_dict().items()})
    assert torch.equal(model(x), gw.sara_fold(model)(x))


def test_a_forward_pass_that_fails_leaves_the_weights_in_place():
    model = Tied()
    prepared(model)
    with pytest.raises(RuntimeError):
        model.mix(torch.zeros(2, 3, dtype=torch.float64))
    assert isinstance(model.mix.weight, nn.Parameter)
    assert "weight" not in vars(model.mix)


def test_folding_leaves_an_ordinary_model():
    plain = Tied()
    plain.mix.bias.requires_grad_(False)
    model = copy.deepcopy(plain)
    _, vectors = prepared(model)
    optimizer = torch.optim.SGD(vectors, lr=0.5)
    step(model, optimizer, 2)  # nothing attached: the last step is not written yet
    with torch.no_grad():
        wanted = model(IDS)
    model = gw.sara_fold(model)
    with torch.no_grad():  # attention takes another kernel where weights want gradients
        torch.testing.assert_close(model(IDS), wanted, rtol=1e-14, atol=1e-15)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [p.requires_grad for p in plain.parameters()]
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    with pytest.raises(AttachError, match="no vectors"):
        gw.sara_fold(model)


def test_the_state_dict_holds_the_last_step_without_wires():
    model = Tied()
    _, vectors = prepared(model)
    optimizer = torch.optim.SGD(vectors, lr=0.5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    step(model, optimizer)
    after = model.state_dict()
    assert any(not torch.equal(after[n], before[n]) for n in before)


def test_a_deep_copy_trains_by_itself():
    model = Tied()
    _, vectors = prepared(model)
    optimizer = torch.optim.SGD(vectors, lr=0.5)
    step(model, optimizer, 2)
    twin = copy.deepcopy(model)
    own = [p for n, p in twin.named_parameters() if n.startswith("_sara.")]
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    step(twin, torch.optim.SGD(own, lr=0.5), 2)
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    step(model, optimizer, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
    ],
)
def test_any_optimiser_in_two_stages(build):
    model = Tied()
    sara, vectors = prepared(model, reselect_at=3, rank_above=4, strength=0.01)
    optimizer = build(vectors)
    losses = []
    lbfgs = isinstance(optimizer, torch.optim.LBFGS)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    if lbfgs:  # it keeps flat directions of the old length: choose again with a fresh one
        sara.reselect_at = None
    with gw.attach(model, optimizer, sara):
        for _ in range(8):
            closure()
            losses.append(float(loss_of(model).detach()))
            optimizer.step(closure)
    assert losses[-1] < losses[0]
    assert sara.reselected_ is not lbfgs


def test_only_vectors_of_the_optimiser_are_pulled():
    model = Tied()
    sara, vectors = prepared(model, rank_of="all", rank_above=4, strength=1.0)
    mine = model.get_parameter("_sara.v:mix:weight")
    with gw.attach(model, torch.optim.SGD([mine], lr=0.1), sara) as wires:
        wires.optimizer.step()
    assert [v is mine for v in vectors] == [v.grad is not None for v in vectors]


def test_drawn_matrix_follows_from_the_step_and_the_seed():
    def pulled(seed, rank_of):
        model = Tied()
        sara, vectors = prepared(
            model, rank_of=rank_of, rank_above=4, strength=1.0, seed=seed, share=0.9
        )
        optimizer = torch.optim.SGD(vectors, lr=0.0)
        steps = []
        with gw.attach(model, optimizer, sara) as wires:
            for _ in range(40):
                optimizer.zero_grad()
                value = float(wires.penalty())
                optimizer.step()
                (one,) = [i for i, v in enumerate(vectors) if v.grad is not None]
                steps.append((one, float(vectors[one].grad.norm()), value))
        return steps

    one, again, other = (pulled(seed, "one") for seed in (1, 1, 2))
    assert one == again
    assert [s[0] for s in one] != [s[0] for s in other]
    matrices = {s[0] for s in one}
    assert len(matrices) == 4  # embedding, attention's two, mix
    for (i, norm, value), (j, scaled, sum_value) in zip(one, pulled(1, "sum"), strict=True):
        assert i == j
        assert scaled == pytest.approx(4 * norm)
        assert sum_value == pytest.approx(4 * value)
    # On average over the matrices, "sum" is the penalty over all of them.
    model = Tied()
    sara, vectors = prepared(model, rank_of="all", rank_above=4, strength=1.0, share=0.9)
    with gw.attach(model, torch.optim.SGD(vectors, lr=0.0), sara) as wires:
        total = float(wires.penalty())
    assert sum({s[0]: s[2] for s in one}.values()) == pytest.approx(total)


def test_a_closure_sees_value_and_pull_of_one_matrix():
    model = Tied()
    sara, vectors = prepared(model, rank_above=4, strength=1.0, share=0.9)
    optimizer = torch.optim.SGD(vectors, lr=0.0)
    with gw.attach(model, optimizer, sara) as wires:
        for _ in range(5):
            optimizer.zero_grad()
            wanted = float(wires.penalty())
            assert float(optimizer.step(lambda: torch.zeros(()))) == pytest.approx(wanted)
            (pulled,) = [v for v in vectors if v.grad is not None]
            # A norm is the inner product of its argument with its subgradient.
            assert float((pulled.grad * pulled.detach()).sum()) == pytest.approx(wanted)


def test_half_precision_weights_have_vectors_in_full():
    model = Tied(dtype=torch.bfloat16)
    sara, vectors = prepared(model)
    assert {v.dtype for v in vectors} == {torch.float32}
    # 1e-4 a step is lost in bfloat16 at 0.3, and adds up in float32.
    optimizer = torch.optim.SGD(vectors, lr=1.0)
    before = [v.detach().clone() for v in vectors]
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    with gw.attach(model, optimizer, sara):
        for _ in range(50):
            for v in vectors:
                v.grad = torch.full_like(v, -1e-4)
            optimizer.step()
    for v, old in zip(vectors, before, strict=True):
        torch.testing.assert_close(v.detach(), old + 5e-3, rtol=0, atol=1e-5)
    moved = [not torch.equal(t, weights[n]) for n, t in model.state_dict().items()]
    assert any(moved)
    model.float().bfloat16()
    for v, old in zip(vectors, before, strict=True):
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.detach(), old + 5e-3, rtol=0, atol=1e-5)


def test_other_precision_and_memory_format_keep_the_vectors():
    model = Tied(dtype=torch.float32)
    _, vectors = prepared(model)
    model.double()
    assert {v.dtype for v in vectors} == {torch.float64}
    loss_of(model).backward()
    assert all(v.grad is not None for v in vectors if v.numel())


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(fused):
    wanted, found = Tied(dtype=torch.float32), Tied(dtype=torch.float32)
    for model, scale in ((wanted, None), (found, 256.0)):
        sara, vectors = prepared(model, rank_of="all", rank_above=4, strength=0.1)
        optimizer = torch.optim.Adam(vectors, lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with gw.attach(model, optimizer, sara):
            for _ in range(4):
                optimizer.zero_grad()
                scaler.scale(loss_of(model)).backward()
                scaler.step(optimizer)
                scaler.update()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[name], rtol=0, atol=1e-6)


def test_autocast():
    model = Tied(dtype=torch.float32)
    _, vectors = prepared(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    grads = [v.grad for v in vectors if v.numel()]
    assert {None if g is None else g.dtype for g in grads} == {torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    plain, model = Tied(), Tied()
    for net in (plain, model):
        sara, vectors = prepared(net, reselect_at=2)
        optimizer = torch.optim.SGD(vectors, lr=0.5)
        run = torch.compile(net, backend="eager") if net is model else net
        with gw.attach(run, optimizer, sara):
            step(run, optimizer, 4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [2, 5])
def test_resumed_bit_for_bit_before_and_after_the_second_choice(tmp_path, dtype, at):
    def start():
        model = Tied(dtype=dtype)
        sara, vectors = prepared(model, reselect_at=4, rank_above=4, strength=0.01)
        optimizer = torch.optim.AdamW(vectors, lr=0.02)
        return model, optimizer, gw.attach(model, optimizer, sara)

    model, optimizer, wires = start()
    step(model, optimizer, at)
    parts = {"model": model, "optimizer": optimizer, "wires": wires}
    checkpoint.save(tmp_path / "s.safetensors", {k: v.state_dict() for k, v in parts.items()})
    step(model, optimizer, 8 - at)
    again, optimizer, wires = start()
    saved = checkpoint.load(tmp_path / "s.safetensors")
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    wires.load_state_dict(saved["wires"])
    step(again, optimizer, 8 - at)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    one, two = gw.sara_adaptation(model), gw.sara_adaptation(again)
    assert all(torch.equal(one.values[n], two.values[n]) for n in one.values)


def test_state_of_another_model_is_refused():
    model = Tied()
    sara, vectors = prepared(model)
    with gw.attach(model, torch.optim.SGD(vectors, lr=0.1), sara):
        state = copy.deepcopy(sara.state_dict())
        state["index"]["mix.bias"] = torch.tensor([8], dtype=torch.int32)
        with pytest.raises(CheckpointError, match="reach place 8"):
            sara.load_state_dict(state)
        del state["index"]["mix.bias"]
        with pytest.raises(CheckpointError, match="other tensors"):
            sara.load_state_dict(state)


def test_tensors_outside_the_selection_are_left_alone():
    model = Tied()
    sara, vectors = prepared(model, select="attention.*")
    head = [model.embed.weight, model.gain]
    optimizer = torch.optim.SGD([*vectors, *head], lr=0.5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with gw.attach(model, optimizer, sara):
        step(model, optimizer)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed >= {"embed.weight", "gain", "attention.in_proj_weight"}
    assert not any(name.startswith("mix.") for name in changed)
