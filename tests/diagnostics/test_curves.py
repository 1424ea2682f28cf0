from __future__ import annotations

import math

import pytest

from guywire.core.errors import UsageError
from guywire.diagnostics import Connectivity
from guywire.diagnostics.curves import with_mean


def test_best_and_gain_of_curves_by_hand():
    found = Connectivity(
        (0.0, 0.5, 1.0),
        {"old": (1.0, 0.25, 2.0), "all": (1.0, 0.5, 0.75)},
        {"old": (0.5, 0.75, 0.25)},
    )
    assert (found.barrier("old"), found.best("old"), found.gain("old")) == (0.0, 0.5, 0.75)
    assert found.gain("all") == 0.25
    assert found.best("old", metric="accuracy") == 0.5
    assert found.gain("old", metric="accuracy") == 0.25
    with pytest.raises(UsageError, match="no accuracy of 'all'"):
        found.best("all", metric="accuracy")
    with pytest.raises(UsageError, match="no loss of 'new'"):
        found.barrier("new")
    document = found.to_json()
    assert document["sets"]["old"]["best_loss_at"] == 0.5
    assert math.isnan(Connectivity((0, 0.5, 1), {"all": (0.0, math.nan, 0.0)}).barrier())


def test_the_mean_counts_each_set_the_same_and_overwrites_none():
    assert with_mean({"a": [1.0, 2.0], "b": [3.0, 6.0]}) == {
        "a": (1.0, 2.0),
        "b": (3.0, 6.0),
        "all": (2.0, 4.0),
    }
    assert with_mean({"all": [1.0], "b": [3.0]}) == {"all": (1.0,), "b": (3.0,)}
    assert with_mean({}) == {}
