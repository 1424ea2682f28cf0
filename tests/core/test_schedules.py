"""The falling schedule of the paper's code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guywire as gw
from guywire.core.errors import UsageError
from guywire.core.regularizer import strength_at


def test_the_papers_numbers():
    falling = gw.schedules.Falling(start=0.9, floor=0.2, epochs=20, steps_per_epoch=7)
    found = [falling(7 * e) for e in (0, 5, 10, 15, 16, 20)]
    assert found == pytest.approx([0.9, 0.675, 0.45, 0.225, 0.2, 0.2], abs=1e-12)
    assert falling(6) == falling(0)
    assert strength_at(falling, 35) == pytest.approx(0.675)


@given(
    st.floats(0, 10), st.floats(0, 1), st.integers(1, 30), st.integers(1, 9), st.integers(0, 500)
)
def test_it_never_rises(start, share, epochs, steps, step):
    falling = gw.schedules.Falling(start, share * start, epochs, steps)
    assert falling(step) >= falling(step + 1) >= share * start


def test_repr_makes_it_again():
    falling = gw.schedules.Falling(2.0, 0.5, 3, 4)
    assert eval(repr(falling), {"Falling": gw.schedules.Falling}) == falling


@pytest.mark.parametrize(
    "bad",
    [
        {"start": 0.1},
        {"floor": -1.0},
        {"start": float("inf")},
        {"epochs": 0},
        {"steps_per_epoch": 0},
    ],
)
def test_numbers_out_of_range(bad):
    with pytest.raises(UsageError):
        gw.schedules.Falling(**bad)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), lambda step: -step - 1.0])
def test_a_strength_must_be_finite_and_not_negative(bad):
    with pytest.raises(UsageError, match="strength is"):
        strength_at(bad, 0)
