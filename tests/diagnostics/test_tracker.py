from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core import checkpoint
from guywire.core.errors import CheckpointError, UsageError
from guywire.diagnostics import (
    StabilityTracker,
    end_forgetting,
    final_accuracy,
    learning_curve_area,
    min_acc,
    wc_acc,
    windowed_forgetting,
    windowed_plasticity,
)


def play(tracker, stream, upto=None):
    """Feed a stream of tasks, each a list of rows, into a tracker; the last row ends the task."""
    count = 0
    for task, block in enumerate(stream):
        for row, values in enumerate(block):
            if upto is not None and count >= upto:
                return
            if row == 0:
                tracker.begin_task(f"t{task}")
            tracker.update(count, {f"t{i}": v for i, v in enumerate(values)})
            if row == len(block) - 1:
                tracker.end_task()
            count += 1


@st.composite
def streams(draw):
    value = st.integers(0, 100).map(lambda n: n / 100)
    tasks = draw(st.integers(1, 4))
    return [
        draw(st.lists(st.tuples(*[value] * (i + 1)), min_size=1, max_size=14)) for i in range(tasks)
    ]


@given(streams())
@settings(deadline=None)
def test_the_tracker_equals_the_pure_functions(stream):
    tracker = StabilityTracker(windows=(2, 5), beta=3)
    play(tracker, stream)
    k = len(stream)
    table = np.array([[*row, *[math.nan] * (k - len(row))] for block in stream for row in block])
    steps = list(range(len(table)))
    ends = (np.cumsum([len(block) for block in stream]) - 1).tolist()
    expected = {
        "min_acc": min_acc(table, steps, ends),
        "wc_acc": wc_acc(table, steps, ends),
        "average_accuracy": final_accuracy(table),
        "forgetting": end_forgetting(table, steps, ends),
        "lca3": learning_curve_area(table, steps, ends, 3),
    }
    for w in (2, 5):
        expected[f"wf{w}"] = np.mean([windowed_forgetting(c, w) for c in table.T])
        expected[f"wp{w}"] = np.mean([windowed_plasticity(c, w) for c in table.T])
    found = tracker.metrics()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


@given(streams(), st.data())
@settings(deadline=None, max_examples=40)
def test_saved_anywhere_and_resumed_the_metrics_are_identical(tmp_path_factory, stream, data):
    total = sum(len(block) for block in stream)
    whole, first = StabilityTracker((2, 5), 3), StabilityTracker((2, 5), 3)
    cut = data.draw(st.integers(0, total))
    play(whole, stream)
    play(first, stream, upto=cut)
    path = tmp_path_factory.mktemp("state") / "tracker.safetensors"
    checkpoint.save(path, first.state_dict())
    second = StabilityTracker((2, 5), 3)
    second.load_state_dict(checkpoint.load(path))
    count = 0
    for task, block in enumerate(stream):
        for row, values in enumerate(block):
            if count >= cut:
                if row == 0:
                    second.begin_task(f"t{task}")
                second.update(count, {f"t{i}": v for i, v in enumerate(values)})
                if row == len(block) - 1:
                    second.end_task()
            count += 1
    assert repr(second.metrics()) == repr(whole.metrics())


def test_a_task_that_comes_back_is_current_again():
    tracker = StabilityTracker((2,))
    for name, values in [
        ("a", {"a": 0.9}),
        ("b", {"a": 0.2, "b": 0.8}),
        ("a", {"a": 0.7, "b": 0.6}),
    ]:
        tracker.begin_task(name)
        tracker.update(len(tracker.order), values)
        tracker.end_task()
    found = tracker.metrics()
    # "a" was learned again, so its fall to 0.2 belongs to the past; "b" is the previous task now.
    assert found["min_acc"] == 0.6
    assert found["wc_acc"] == pytest.approx(0.7 / 2 + 0.6 / 2)


def test_wrong_order_of_calls():
    tracker = StabilityTracker()
    with pytest.raises(UsageError, match="no task to end"):
        tracker.end_task()
    with pytest.raises(UsageError, match="'x' was evaluated but has not begun"):
        tracker.update(0, {"x": 1.0})
    tracker.begin_task("a")
    with pytest.raises(UsageError, match="'b' begins before 'a' ended"):
        tracker.begin_task("b")
    assert tracker.metrics() == {}
    with pytest.raises(CheckpointError, match="windows"):
        StabilityTracker((3,)).load_state_dict(tracker.state_dict())
