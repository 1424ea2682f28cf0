"""Every layer type against a batch-of-one autograd loop, in float32."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from guywire.curvature import diagonal_fisher
from guywire.curvature._pieces import Outer


class Tokens(nn.Module):
    """Embeddings, both kinds of attention layout, a projection of other widths, extra keys."""

    def __init__(self, sequence_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.position = nn.Embedding(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=not sequence_first)
        self.cross = nn.MultiheadAttention(
            8,
            2,
            kdim=4,
            vdim=6,
            add_bias_kv=True,
            add_zero_attn=True,
            batch_first=not sequence_first,
        )
        self.head = nn.Linear(8, 5)
        self.sequence_first = sequence_first

    def forward(self, ids: Tensor) -> Tensor:
        z = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        if self.sequence_first:
            z = z.transpose(0, 1)
        z = self.layer(z)
        z = z + self.cross(z, z[..., :4], z[..., 2:])[0]
        return self.head(z.mean(0 if self.sequence_first else 1))


def conv1d() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm1d(6),
        nn.ReLU(inplace=True),
        nn.Conv1d(6, 6, 3, dilation=2, padding="same", padding_mode="replicate"),
        nn.Flatten(),
        nn.Linear(6 * 6, 5),
    ), torch.randn(6, 4, 12)


def conv2d() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding="same", padding_mode="circular"),
        nn.GroupNorm(3, 12),
        nn.Conv2d(12, 12, 2, groups=12),
        nn.Conv2d(12, 9, (2, 3), stride=(1, 2)),
        nn.Flatten(),
        nn.Linear(18, 20),
        nn.LayerNorm(20),
        nn.RMSNorm(20),
        nn.Linear(20, 5),
    ), torch.randn(6, 3, 8, 8)


def conv3d() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv3d(2, 4, (3, 2, 1), padding=(1, 0, 0), groups=2),
        nn.BatchNorm3d(4),
        nn.Tanh(),
        nn.Conv3d(4, 3, 2, stride=(2, 1, 1), bias=False),
        nn.Flatten(),
        nn.Linear(3 * 2 * 2 * 3, 5),
    ), torch.randn(6, 2, 4, 4, 4)


CASES = {
    "conv1d": conv1d,
    "conv2d": conv2d,
    "conv3d": conv3d,
    # 6 samples of 6 tokens: sizes do not tell the batch from the positions
    "batch-first": lambda: (Tokens(False), torch.randint(11, (6, 6))),
    "sequence-first": lambda: (Tokens(True), torch.randint(11, (6, 6))),
    "unruled": lambda: (
        nn.Sequential(nn.ConvTranspose1d(3, 4, 2), nn.PReLU(4), nn.Flatten(), nn.Linear(24, 5)),
        torch.randn(6, 3, 5),
    ),
}


@pytest.mark.parametrize("split", [6, 4, 1])
@pytest.mark.parametrize("case", CASES)
def test_layers_equal_a_loop_over_samples(case, split, brute, same) -> None:
    torch.manual_seed(0)
    model, x = CASES[case]()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    y = torch.randint(5, (6,))
    expected = brute(model, [(x, y)])
    found = diagonal_fisher(
        model, list(zip(x.split(split), y.split(split), strict=True)), labels="true"
    )
    same(found, expected)


def test_a_layer_without_a_rule_is_served_alone_and_logged(caplog, brute, same) -> None:
    torch.manual_seed(0)
    model, x = CASES["unruled"]()
    with caplog.at_level(logging.WARNING, logger="guywire.curvature"):
        diagonal_fisher(model, [(x, torch.zeros(6, dtype=torch.long))], labels="true")
    assert "ConvTranspose1d '0' has no rule" in caplog.text
    assert "one sample at a time" not in caplog.text


class Tied(nn.Module):
    """An embedding that is also the head, and a layer used twice."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.functional = functional
        if not functional:
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        z = self.inner(torch.tanh(self.inner(self.embed(ids))))
        return z @ self.embed.weight.T if self.functional else self.head(z)


@pytest.mark.parametrize("functional", [False, True])
def test_tied_and_reused_weights_square_the_sum(functional, brute, same, caplog) -> None:
    torch.manual_seed(0)
    model, ids = Tied(functional), torch.randint(7, (5, 6))
    batches = [(ids, torch.randint(7, (5, 6)))]
    with caplog.at_level(logging.WARNING, logger="guywire.curvature"):
        found = diagonal_fisher(model, batches, labels="true")
    assert list(found) == ["embed.weight", "inner.weight", "inner.bias"]
    same(found, brute(model, batches))
    assert ("used outside its layer" in caplog.text) == functional


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shift, self.unused = (
            nn.Linear(3, 4),
            nn.Parameter(torch.ones(4)),
            nn.Linear(2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.shift


def test_bare_and_unused_parameters(brute, same) -> None:
    torch.manual_seed(0)
    model, batches = Bare(), [(torch.randn(5, 3), torch.randint(4, (5,)))]
    found = diagonal_fisher(model, batches, labels="true")
    same(found, brute(model, batches))
    assert not found["unused.weight"].any()


def test_folded_positions_in_either_order(brute, same) -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            z = torch.tanh(self.a(x.reshape(n * t, -1))).view(n, t, -1)  # samples outermost
            z = self.b(z.transpose(0, 1).reshape(t * n, -1)).view(t, n, -1)  # positions outermost
            return self.head(z.square().mean(0))

    torch.manual_seed(0)
    model, batches = Folded(), [(torch.randn(4, 3, 3), torch.randint(5, (4,)))]
    same(diagonal_fisher(model, batches, labels="true"), brute(model, batches))


@pytest.mark.parametrize(
    "shape", [(3, 1, 5, 1, 4), (3, 1, 5, 3, 4), (3, 2, 5, 9, 4), (2, 1, 300, 20, 300)]
)
def test_every_way_of_squaring_an_outer_product(shape) -> None:
    n, groups, m, t, k = shape
    g = torch.Generator().manual_seed(0)
    left = torch.randn(n, groups, m, t, generator=g, dtype=torch.float64)
    right = torch.randn(n, groups, k, t, generator=g, dtype=torch.float64)
    total = torch.ones(groups * m, k, dtype=torch.float64)
    Outer(left, lambda lo, hi: right[lo:hi], total.shape, torch.float64).square_into(total)
    expected = 1 + torch.einsum("ngmt,ngkt->ngmk", left, right).square().sum(0).view_as(total)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
