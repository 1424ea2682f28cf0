from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import DataError, UsageError
from guywire.diagnostics import connectivity
from guywire.diagnostics.connectivity import interpolate


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def net(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4))


def data(seed=0, n=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.randint(4, (n,), generator=generator)


@given(st.integers(0, 10_000), st.integers(2, 20))
@settings(deadline=None, max_examples=30)
def test_check_9_the_barrier_of_a_quadratic_is_that_of_its_second_difference(seed, inside):
    g = torch.Generator().manual_seed(seed)
    a, b, linear = (torch.randn(4, generator=g, dtype=torch.float64) for _ in range(3))
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    sign = 1.0 if seed % 2 else -1.0
    hessian = sign * root @ root.T
    loss = lambda p: float(0.5 * p["x"] @ hessian @ p["x"] + linear @ p["x"])  # noqa: E731
    found = connectivity(loss, {"x": a}, {"x": b}, points=inside + 1)
    d = b - a
    bend = float(d @ hessian @ d)
    wanted = max(-s * (1 - s) / 2 * bend for s in found.positions)
    assert found.barrier() == pytest.approx(wanted, abs=1e-9)
    if sign > 0:
        assert found.barrier() == 0.0  # convex: reached at the ends
    assert found.distance == pytest.approx(float(d.norm()))


def test_check_9_a_hill_between_two_minima_has_its_height():
    far, near = {"x": torch.tensor(-1.0)}, {"x": torch.tensor(1.0)}
    found = connectivity(lambda p: -(float(p["x"]) ** 2), far, near)
    assert found.barrier() == 1.0
    assert found.loss["all"][5] == 0.0
    assert found.positions[5] == 0.5
    assert found.gain() == 0.0


def test_a_model_is_evaluated_along_the_line_and_comes_back():
    model, one, two = net(2), net(0), net(1)
    before, flags = state(model), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    evals = {"first": data(0), "second": [data(1, 8), data(2, 5)]}
    seen = []
    found = connectivity(model, state(one), state(two), evals, points=5, each=seen.append)
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0] == list(found.positions)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == flags
    for name, value in state(model).items():
        assert torch.equal(value, before[name]), name
    for i, s in enumerate(found.positions):
        at = net(0).eval()
        with torch.no_grad():
            for p, a, b in zip(at.parameters(), one.parameters(), two.parameters(), strict=True):
                p.copy_((1 - s) * a + s * b)
            x, y = data(0)
            z = at(x)
            assert found.loss["first"][i] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
            right = (z.argmax(-1) == y).float().mean().item()
            assert found.accuracy["first"][i] == pytest.approx(right)
            both = (
                torch.cat([data(1, 8)[0], data(2, 5)[0]]),
                torch.cat([data(1, 8)[1], data(2, 5)[1]]),
            )
            wanted = F.cross_entropy(at(both[0]), both[1]).item()
            assert found.loss["second"][i] == pytest.approx(wanted, rel=1e-5)
        mean = (found.loss["first"][i] + found.loss["second"][i]) / 2
        assert found.loss["all"][i] == pytest.approx(mean)


def test_the_model_comes_back_after_an_error_too():
    model = net(2)
    before = state(model)
    bad = {"set": (torch.zeros(2, 3), torch.full((2,), -100))}
    with pytest.raises(DataError, match="no label that counts"):
        connectivity(model, state(net(0)), state(net(1)), bad)
    for name, value in state(model).items():
        assert torch.equal(value, before[name])


def test_ends_are_exact_and_whole_numbers_are_those_of_the_nearer_end():
    a = {"w": torch.tensor([0.1, 0.3], dtype=torch.bfloat16), "n": torch.tensor(3)}
    b = {"w": torch.tensor([0.7, -5.0], dtype=torch.bfloat16), "n": torch.tensor(8)}
    for position, wanted in ((0.0, a), (1.0, b)):
        for name, value in interpolate(a, b, position).items():
            assert torch.equal(value, wanted[name])
    assert int(interpolate(a, b, 0.4)["n"]) == 3
    assert int(interpolate(a, b, 0.6)["n"]) == 8
    assert interpolate(a, b, 0.4)["w"].dtype == torch.bfloat16


class Normed(nn.Module):
    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
            self.train()(10 * torch.randn(64, 3) + seed)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


def test_running_statistics_that_differ_are_refused_or_computed_anew():
    model, one, two = Normed(2), Normed(0), Normed(1)
    ends = state(one), state(two)
    with pytest.raises(UsageError, match="running statistics of 'norm'"):
        connectivity(model, *ends, {"set": data()})
    before = state(model)
    found = connectivity(model, *ends, {"set": data()}, points=3, statistics=[data(5, 50)])
    for name, value in state(model).items():
        assert torch.equal(value, before[name]), name
    assert model.norm.momentum == 0.1
    assert model.norm.training
    half = Normed(0)
    half.load_state_dict(interpolate(*ends, 0.5))
    with torch.no_grad():
        hidden = half.first(data(5, 50)[0])
        half.norm.running_mean.copy_(hidden.mean(0))
        half.norm.running_var.copy_(hidden.var(0))
        x, y = data()
        wanted = F.cross_entropy(half.eval()(x), y).item()
    assert found.loss["set"][1] == pytest.approx(wanted, rel=1e-4)
    same = {k: v for k, v in ends[0].items() if "norm" not in k}
    other = {k: v for k, v in ends[1].items() if "norm" not in k}
    connectivity(model, same, other, {"set": data()}, points=3)  # statistics are not on the line


def test_adapters_alone_of_a_causal_language_model_with_labels_shifted():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        base = transformers.LlamaForCausalLM(config)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        model = peft.inject_adapter_in_model(lora, base)
        ends = [
            {n: torch.randn(p.shape) for n, p in model.named_parameters() if "lora_" in n}
            for _ in range(2)
        ]
    ids = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 1, -100)}
    found = connectivity(model, *ends, {"set": batch}, points=3)
    middle = gw.interpolate_adapters(ends[0], ends[1], 0.5)
    model.load_state_dict(middle, strict=False)
    with torch.no_grad():
        wanted = model.eval()(**batch).loss.item()
    assert found.loss["set"][1] == pytest.approx(wanted, rel=1e-4)


def test_what_does_not_fit_is_refused():
    model, ends = net(0), (state(net(0)), state(net(1)))
    evals = {"set": data()}
    for words, call in {
        "points=2": lambda: connectivity(model, *ends, evals, points=2),
        "evals is missing": lambda: connectivity(model, *ends),
        "evaluates itself": lambda: connectivity(lambda p: 0.0, *ends, evals),
        "names no tensors": lambda: connectivity(model, {}, {}, evals),
        "only the end has '0.bias'": lambda: connectivity(
            model, {"0.weight": ends[0]["0.weight"]},
            {k: ends[1][k] for k in ("0.weight", "0.bias")}, evals,
        ),
        "no '9.weight'": lambda: connectivity(
            model, {"9.weight": torch.zeros(1)}, {"9.weight": torch.zeros(1)}, evals
        ),
        "different rank": lambda: connectivity(
            model, {"0.bias": torch.zeros(1)}, {"0.bias": torch.zeros(2)}, evals
        ),
        "different models": lambda: connectivity(
            model, {"0.bias": torch.zeros(1)}, {"0.bias": torch.zeros(1)}, evals
        ),
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=words):
            call()
