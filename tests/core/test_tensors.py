"""The kernels against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core import tensors

BLOCK = tensors._BLOCK
SHAPES = [(), (0,), (1,), (7,), (3, 5), (BLOCK,), (BLOCK + 3,), (3, BLOCK // 2 + 1), (2, 1, BLOCK)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def make(shape, dtype=torch.float64, seed=0, layout="contiguous"):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        t = t.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "channels_last":
        t = t.to(memory_format=torch.channels_last)
    elif layout == "strided":
        wide = torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype)
        wide[..., ::2] = t
        t = wide[..., ::2]
    return t


def close(found, wanted, dtype):
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def check_all(p, a, f, g, dtype):
    """Every kernel on one tensor each, against the formula in float64."""
    P, A, F, G = (t.double() for t in (p, a, f, g))
    for anchor, AA in ((a, A), (None, torch.zeros_like(A))):
        for weight, W in ((f, F), (None, torch.ones_like(F))):
            weights = None if weight is None else [weight]
            grad = g.clone()
            tensors.add_pull([grad], [p], [anchor], [0.5], weights)
            close(grad, G + 0.5 * W * (P - AA), dtype)
            param = p.clone()
            tensors.pull_towards([param], [anchor], [0.25], weights)
            close(param, P - 0.25 * W * (P - AA), dtype)
            for power in (1, 2):
                value = tensors.distance(p, anchor, weight, power=power)
                wanted = (W * (P - AA).abs() ** power).sum()
                loose = max(TOLERANCE[dtype], 1e-5 if dtype != torch.float64 else 1e-12)
                torch.testing.assert_close(value.double(), wanted, rtol=loose, atol=loose)
                assert value.dim() == 0
        grad = g.clone()
        tensors.add_sign([grad], [p], [anchor], [0.5])
        close(grad, G + 0.5 * (P - AA).sign(), dtype)
        param = p.clone()
        tensors.shrink_towards([param], [anchor], [0.3])
        wanted = AA + (P - AA).sign() * ((P - AA).abs() - 0.3).clamp(min=0)
        close(param, wanted, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_formulas(shape):
    p, a, g = (make(shape, seed=i) for i in range(3))
    check_all(p, a, make(shape, seed=3).abs(), g, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (4, 9), (BLOCK + 1,)], ids=str)
def test_kernels_in_every_precision(shape, dtype):
    p, a, g = (make(shape, dtype, seed=i) for i in range(3))
    check_all(p, a, make(shape, dtype, seed=3).abs(), g, dtype)


@pytest.mark.parametrize("layouts", ["tttt", "tccc", "cctc", "sscc", "ssss"])
@pytest.mark.parametrize("shape", [(5, 3), (3, BLOCK // 2), (BLOCK // 2, 3), (1, BLOCK + 5)])
def test_kernels_on_mixed_layouts(shape, layouts):
    kinds = {"t": "transposed", "c": "contiguous", "s": "strided"}
    p, a, f, g = (make(shape, seed=i, layout=kinds[c]) for i, c in enumerate(layouts))
    check_all(p, a, f.abs(), g, torch.float64)


def test_one_dimension_with_gaps_goes_in_blocks():
    p = make((3 * BLOCK,), layout="strided")
    a, g = make((3 * BLOCK,), seed=1), make((3 * BLOCK,), seed=2)
    pieces = list(tensors._blocks(g, p, a))
    assert len(pieces) == 3
    check_all(p, a, a.abs(), g, torch.float64)


def test_channels_last_goes_flat():
    shape = (64, 64, 9, 9)
    p, a, f, g = (make(shape, seed=i, layout="channels_last") for i in range(4))
    assert all(piece[0].dim() == 1 for piece in tensors._blocks(g, p, a, f))
    check_all(p, a, f.abs(), g, torch.float64)


def test_wide_anchors_under_narrow_parameters():
    # Anchors in float32 keep what bfloat16 would lose: the difference is taken in float32.
    p = torch.full((BLOCK + 1,), 1.0, dtype=torch.bfloat16)
    a = torch.full((BLOCK + 1,), 1.001)
    g = torch.zeros_like(p)
    tensors.add_pull([g], [p], [a], [1.0])
    assert g.dtype == torch.bfloat16
    torch.testing.assert_close(g.float(), (p.float() - a), rtol=1e-2, atol=0)
    f = torch.full((BLOCK + 1,), 2.0)
    tensors.add_pull([g], [p], [a], [1.0], [f])
    torch.testing.assert_close(g.float(), 3 * (p.float() - a), rtol=1e-2, atol=0)
    assert tensors.distance(p, a).item() == pytest.approx((BLOCK + 1) * 1e-6, rel=1e-3)


def test_several_tensors_share_the_buffers():
    shapes = [(3,), (BLOCK + 9,), (2, 4), (BLOCK,)]
    p, a, f, g = ([make(s, seed=10 * i + j) for j, s in enumerate(shapes)] for i in range(4))
    wanted = [
        gg + s * ff * (pp - aa) for s, gg, pp, aa, ff in zip(range(4), g, p, a, f, strict=True)
    ]
    tensors.add_pull(g, p, a, list(range(4)), f)
    for found, want in zip(g, wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_decay_to_zero_is_the_product_that_adamw_takes():
    p = make((1000,), torch.float32)
    wanted = p * (1 - 0.1 * 0.3)
    tensors.pull_towards([p], [None], [0.1 * 0.3])
    assert torch.equal(p, wanted)


number = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(number, number), min_size=1, max_size=20), st.floats(0, 50))
def test_shrinking_never_passes_the_anchor(pairs, rate):
    p, a = (torch.tensor(v, dtype=torch.float64) for v in zip(*pairs, strict=True))
    moved = p.clone()
    tensors.shrink_towards([moved], [a], [rate])
    assert bool(((moved - a).abs() <= (p - a).abs() + 1e-12).all())
    assert bool(((moved - a) * (p - a) >= -1e-12).all())
    assert bool(((moved - p).abs() <= rate + 1e-12).all())


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 3), st.booleans())
def test_blocks_cover_every_element_once(shape, seed, transpose):
    small, tensors._BLOCK = tensors._BLOCK, 7
    try:
        p = make(tuple(shape), seed=seed)
        a = make(tuple(shape), seed=seed + 1)
        if transpose and len(shape) > 1:
            p = p.transpose(0, -1).contiguous().transpose(0, -1)
        g = torch.zeros_like(a)
        tensors.add_pull([g], [p], [a], [1.0])
        torch.testing.assert_close(g, p - a)
        assert all(piece[0].numel() <= 7 for piece in tensors._blocks(g, p, a))
    finally:
        tensors._BLOCK = small


def test_clone_shares_nothing_and_keeps_the_layout():
    p = make((4, 3), layout="transposed").requires_grad_()
    copy = tensors.clone(p)
    assert not copy.requires_grad
    assert copy.stride() == p.stride()
    with torch.no_grad():
        p.zero_()
    assert copy.abs().sum() > 0
    assert tensors.clone(p, torch.float32).dtype == torch.float32


def test_place_like_leaves_what_is_in_place():
    t = torch.ones(3)
    assert tensors.place_like(t, torch.zeros(3)) is t


def test_reduce_shards_sums_plain_values():
    assert tensors.reduce_shards([]) is None
    parts = [(torch.zeros(2), torch.tensor(1.5)), (torch.zeros(3), torch.tensor(2.0))]
    assert float(tensors.reduce_shards(parts)) == 3.5


def test_distance_of_large_float32_tensors_stays_accurate():
    p = torch.full((2_000_000,), 0.1)
    assert tensors.distance(p, None).item() == pytest.approx(2_000_000 * 0.1**2, rel=1e-5)
    assert not math.isnan(tensors.distance(torch.empty(0), None).item())
