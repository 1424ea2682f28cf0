from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from guywire.lab.report.figures.svg import Scale, element, marker, polyline, thin, ticks
from guywire.lab.report.palette import SHAPES


def test_text_and_attributes_are_escaped() -> None:
    found = element("text", "<b>&", aria_label='"><script>', class_=None)
    assert found == '<text aria-label="&#34;&gt;&lt;script&gt;">&lt;b&gt;&amp;</text>'


def test_values_outside_the_range_stay_in_the_frame() -> None:
    scale = Scale(0, 10, 100, 0)
    assert [scale(v) for v in (-5, 0, 5, 10, 99)] == [100, 100, 50, 0, 0]


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(2, 9))
def test_ticks_are_inside_even_and_neither_few_nor_many(low: float, span: float, n: int) -> None:
    found = ticks(low, low + span, n)
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in found)
    assert len(found) <= n + 1
    gaps = np.diff(found)
    assert gaps == pytest.approx(np.full(len(gaps), gaps[0]), rel=1e-6) if len(gaps) else True


@given(
    arrays(np.float64, st.integers(1, 800), elements=st.floats(0, 1)),
    st.integers(1, 40),
)
def test_a_thinned_line_keeps_its_ends_and_every_extreme(y: np.ndarray, most: int) -> None:
    x = np.arange(len(y))
    px, py = thin(x, y, most)
    assert len(px) <= max(4 * most, 1)
    assert (px[0], px[-1]) == (x[0], x[-1])
    assert (py.min(), py.max()) == (y.min(), y.max())
    assert (y[px] == py).all()
    assert (np.diff(px) > 0).all()


def test_a_drop_of_one_step_survives() -> None:
    y = np.ones(100_000)
    y[54_321] = 0.0
    px, py = thin(np.arange(len(y)), y, 50)
    assert py[px.tolist().index(54_321)] == 0.0


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 200)), min_size=1, max_size=50))
def test_relative_moves_add_up_to_the_points(points: list[tuple[float, float]]) -> None:
    path = re.search(r'd="M([^l]*)l([^"]*)"', polyline(*zip(*points, strict=True)))
    assert path is not None
    numbers = [
        [float(v) for v in re.findall(r"-?[\d.]+(?:e-?\d+)?", part)] for part in path.groups()
    ]
    x, y = numbers[0]
    reached = [(x, y)]
    for dx, dy in zip(numbers[1][::2], numbers[1][1::2], strict=True):
        x, y = x + dx, y + dy
        reached.append((x, y))
    # One decimal is kept, and rounding does not add up along the line.
    for (a, b), (c, d) in zip(points, reached, strict=False):
        assert abs(a - c) <= 0.051
        assert abs(b - d) <= 0.051


def test_every_shape_is_another_drawing() -> None:
    drawn = {re.sub(r"c\d+", "", marker(i, 0, 0)) for i in range(len(SHAPES))}
    assert len(drawn) == len(SHAPES)
