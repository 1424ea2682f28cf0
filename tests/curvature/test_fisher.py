"""What the Fisher information is, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import DataError, SelectionError, UsageError
from guywire.curvature import diagonal_fisher


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)
    ).to(dtype)  # fmt: skip


def data(n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=g).to(dtype), torch.randint(4, (n,), generator=g)


class Tagger(nn.Module):
    """Tokens that see each other: logits [B, T, 3]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.mix = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        z = self.embed(ids)
        return self.head(z + self.mix(z, z, z, need_weights=False)[0])


def test_logistic_regression_has_a_closed_form() -> None:
    """Check 1 with the noise model this library has: p = sigmoid(w x) as logits (0, w x) has F = mean p(1-p) x^2."""
    torch.manual_seed(0)
    x = torch.randn(50, 7, dtype=torch.float64)
    model = nn.Linear(7, 2, bias=False).double()
    with torch.no_grad():
        model.weight[0] = 0
    p = torch.sigmoid(x @ model.weight[1].detach())
    found = diagonal_fisher(model, [(x, torch.zeros(50, dtype=torch.long))])["weight"]
    expected = ((p * (1 - p))[:, None] * x**2).mean(0)
    torch.testing.assert_close(found, expected.expand(2, 7), rtol=1e-8, atol=0)


def test_expected_is_the_hessian_of_a_softmax_regression_and_true_is_not() -> None:
    """Check 2: the true Fisher equals the diagonal of the Hessian of the mean loss."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(4, (30,))
    model = nn.Linear(3, 4, bias=False).double()

    def loss(w):
        return F.cross_entropy(x @ w.T, y)

    w = model.weight.detach()
    hessian = torch.autograd.functional.hessian(loss, w).reshape(12, 12).diag().view(4, 3)
    found = diagonal_fisher(model, [(x, y)])["weight"]
    torch.testing.assert_close(found, hessian, rtol=1e-6, atol=0)
    empirical = diagonal_fisher(model, [(x, y)], labels="true")["weight"]
    assert float((empirical - hessian).norm() / hessian.norm()) > 0.05


@pytest.mark.parametrize("labels", ["expected", "sampled", "true"])
@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 15)))
def test_batch_size_changes_nothing(labels, cuts) -> None:
    """Check 3: no shrinkage, whatever the split."""
    x, y = data(16)
    model = small()
    whole = diagonal_fisher(model, [(x, y)], labels=labels)
    edges = [0, *sorted(cuts), 16]
    parts = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    for name, f in diagonal_fisher(model, parts, labels=labels).items():
        torch.testing.assert_close(f, whole[name], rtol=1e-5, atol=1e-6 * float(whole[name].max()))


def test_expected_is_the_mean_over_all_labels_weighted() -> None:
    x, y = data(1, torch.float64)
    model = small(torch.float64).eval()
    p = model(x).softmax(1)[0].detach()
    found = diagonal_fisher(model, [(x, y)])
    for name, f in found.items():
        terms = [
            diagonal_fisher(model, [(x, torch.tensor([c]))], labels="true")[name] for c in range(4)
        ]
        torch.testing.assert_close(f, sum(q * t for q, t in zip(p, terms, strict=True)))


def test_sampled_tends_to_expected_and_follows_its_generator() -> None:
    x, y = data(4)
    model = small()
    many = [(x.repeat(2000, 1, 1, 1), y.repeat(2000))]
    sampled = diagonal_fisher(model, many, labels="sampled")["5.weight"]
    expected = diagonal_fisher(model, [(x, y)])["5.weight"]
    assert float((sampled - expected).norm() / expected.norm()) < 0.05
    one, two, three = (
        diagonal_fisher(
            model, [(x, y)], labels="sampled", generator=torch.Generator().manual_seed(s)
        )["5.weight"]
        for s in (3, 3, 4)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_tokens_and_sequences_against_autograd() -> None:
    model = Tagger().double().eval()
    g = torch.Generator().manual_seed(0)
    ids, y = torch.randint(9, (3, 4), generator=g), torch.randint(3, (3, 4), generator=g)
    y[0, 2:] = -100
    y[2] = -100  # nothing to say: not counted
    w = model.head.weight
    tokens, samples, expected = [], [], []
    for n in range(3):
        logp = model(ids[n : n + 1])[0].log_softmax(-1)
        per_token = []
        for t in range(4):
            if y[n, t] == -100:
                continue
            of = [torch.autograd.grad(-logp[t, c], w, retain_graph=True)[0] for c in range(3)]
            per_token.append(of[int(y[n, t])])
            expected.append(sum(logp[t, c].exp().detach() * of[c] ** 2 for c in range(3)))
        tokens += [s**2 for s in per_token]
        if per_token:
            samples.append(sum(per_token) ** 2)
    assert len(samples) == 2
    assert len(tokens) == 6

    def found(labels, unit):
        return diagonal_fisher(model, [(ids, y)], labels=labels, unit=unit)["head.weight"]

    torch.testing.assert_close(found("true", "sample"), torch.stack(samples).mean(0))
    torch.testing.assert_close(found("true", "token"), torch.stack(tokens).mean(0))
    torch.testing.assert_close(found("expected", "token"), torch.stack(expected).mean(0))
    torch.testing.assert_close(found("expected", "sample"), torch.stack(expected).sum(0) / 2)


def test_pixels_with_classes_in_dimension_one() -> None:
    model = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(2, 2, 4, 5), torch.randint(3, (2, 4, 5))
    found = diagonal_fisher(model, [(x, y)], labels="true")["weight"]
    grads = []
    for n in range(2):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1], reduction="sum")
        grads.append(torch.autograd.grad(loss, model.weight)[0] ** 2)
    torch.testing.assert_close(found, torch.stack(grads).mean(0))


def traces(model: nn.Module) -> tuple:
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        ["forward" in m.__dict__ for m in model.modules()],
        torch.get_rng_state(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def unchanged(before: tuple, after: tuple) -> bool:
    def same(a, b):
        if isinstance(a, list):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return all(same(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("labels", ["expected", "sampled", "true"])
def test_the_model_is_left_as_it_was(labels) -> None:
    model = small()
    model[5].bias.requires_grad_(False)
    model[1].eval()
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    before = traces(model)
    found = diagonal_fisher(model, [(x, y)], labels=labels)
    assert "5.bias" not in found  # frozen
    assert unchanged(before, traces(model))


def test_an_error_leaves_no_trace_either() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 4)), nn.TransformerEncoderLayer(4, 1, 4), nn.Flatten(), nn.Linear(16, 4))  # fmt: skip
    x, y = data()
    before = traces(model)
    with pytest.raises(DataError, match="label 9 is outside the head of 4 classes"):
        diagonal_fisher(model, [(x, y), (x, y + 9 - y.max())])
    assert unchanged(before, traces(model))


def test_only_what_is_selected() -> None:
    model, (x, y) = small(), data()
    whole = diagonal_fisher(model, [(x, y)], labels="true")
    part = diagonal_fisher(model, [(x, y)], labels="true", select="5.*")
    assert list(part) == ["5.weight", "5.bias"]
    torch.testing.assert_close(part["5.weight"], whole["5.weight"])
    with pytest.raises(SelectionError):
        diagonal_fisher(model, [(x, y)], select="nothing.*")


def test_types_of_sums() -> None:
    x, y = data()
    reference = diagonal_fisher(small(torch.float64), [(x.double(), y)], labels="true")
    assert all(f.dtype == torch.float64 for f in reference.values())
    half = diagonal_fisher(small(torch.bfloat16), [(x.bfloat16(), y)], labels="true")
    for name, f in half.items():
        assert f.dtype == torch.float32
        assert float((f - reference[name]).norm() / reference[name].norm()) < 0.1


def test_nan_is_not_hidden() -> None:
    model, (x, y) = small(), data()
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    assert diagonal_fisher(model, [(x, y)], labels="true")["0.weight"].isnan().any()


def test_compiled_and_deep_copied_models_give_the_same() -> None:
    model, (x, y) = small(), data()
    expected = diagonal_fisher(copy.deepcopy(model), [(x, y)])
    found = diagonal_fisher(torch.compile(model, backend="eager"), [(x, y)])
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


def test_ewc_consolidates_with_it() -> None:
    model, (x, y) = small(), data()
    ewc = gw.EWC(strength=1.0, labels="true")
    with gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), ewc) as wires:
        wires.consolidate([(x, y)])
    torch.testing.assert_close(
        dict(ewc.precision_), diagonal_fisher(model, [(x, y)], labels="true")
    )


X, Y = data()


@pytest.mark.parametrize(
    ("batches", "arguments", "error", "match"),
    [
        ([], {}, DataError, "there is no data"),
        ([(X[:0], Y[:0])], {}, DataError, "there is no data"),
        ([(X, torch.full_like(Y, -100))], {}, DataError, "every label is ignored"),
        ([(X, Y - 3)], {"labels": "true"}, DataError, "label -3 is outside the head of 4 classes"),
        ([(X, Y.float())], {}, DataError, "regression and sigmoid outputs are out of scope"),
        ([(X, Y[:, None])], {"labels": "true"}, DataError, "do not fit logits of shape"),
        ([(X, Y)], {"labels": "batch"}, UsageError, "labels='batch'"),
        ([(X, Y)], {"unit": "word"}, UsageError, "unit='word'"),
    ],
)
def test_bad_input(batches, arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        diagonal_fisher(small(), batches, **arguments)


def test_too_many_classes_names_the_remedy() -> None:
    batch = (torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match=r"1001 classes .* use labels='sampled'"):
        diagonal_fisher(nn.Linear(3, 1001), [batch])
    assert diagonal_fisher(nn.Linear(3, 1001), [batch], labels="sampled")["bias"].any()


def test_one_output_and_mixed_samples_are_refused() -> None:
    batch = (torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(DataError, match="single output"):
        diagonal_fisher(nn.Linear(3, 1), [batch])
    mixing = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(UsageError, match="mixes the samples"):
        diagonal_fisher(mixing, [batch])
