from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.lab.training import arms
from guywire.lab.training.config import CompareConfig, parse
from guywire.lab.training.sweep import space


def config(compared: list[str], **sweep: Any) -> CompareConfig:
    return parse(CompareConfig, {"methods": compared, "sweep": sweep})


def test_the_table_of_methods_gives_ranges_whose_middle_is_the_default() -> None:
    found = config(["finetune", "l2", "ewc", "lwf", "replay"])
    assert space.tuned_methods(found) == ["l2", "ewc", "lwf"]
    for method, middle in (("l2", 0.1), ("ewc", 100.0)):
        (axis,) = space.axes_of(method, found)
        assert axis.points(5)[2] == middle == arms.settings_of(method, {})[method]["strength"]


def test_whole_numbers_stay_whole() -> None:
    found = config(["replay"], methods={"replay": {"capacity": {"low": 3, "high": 50}}})
    (axis,) = space.axes_of("replay", found)
    assert axis.whole
    assert all(isinstance(v, int) for v in axis.points(7))
    assert axis.points(48) == list(range(3, 51))


def test_a_method_of_parts_has_a_table_a_part() -> None:
    tables = {"ewc+replay": {"ewc": {"strength": [1, 2]}, "replay": {"capacity": [5, 6]}}}
    found = config(["ewc+replay", "ewc"], methods=tables)
    axes = space.axes_of("ewc+replay", found)
    combinations = space.grid(axes, 5)
    assert combinations[1] == {"ewc.strength": 1, "replay.capacity": 6}
    options = space.options_with("ewc+replay", found.options, combinations[1])
    settings = arms.settings_of("ewc+replay", options)
    assert (settings["ewc"]["strength"], settings["replay"]["capacity"]) == (1, 6)
    assert arms.settings_of("ewc", options)["ewc"]["strength"] == 100.0


def test_a_name_made_by_options_can_be_tuned() -> None:
    options = {"strong": {"method": "ewc", "decay": 0.5}}
    found = parse(
        CompareConfig,
        {"methods": ["strong"], "options": options, "sweep": {"methods": {"strong": {}}}},
    )
    assert [a.name for a in space.axes_of("strong", found)] == ["strength"]
    made = space.options_with("strong", found.options, {"strength": 7.0})
    assert arms.settings_of("strong", made)["ewc"]["strength"] == 7.0
    assert arms.settings_of("strong", made)["ewc"]["decay"] == 0.5


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"l2": {"strenght": [1]}}, "unknown key 'strenght'.*did you mean 'strength'"),
        ({"l3": {}}, r"\[sweep.methods.l3\] is none of the methods compared: did you mean 'l2'"),
        ({}, r"\[sweep.methods\] is empty"),
        ({"replay": {}}, "'replay' has no usual range"),
        ({"finetune": {"x": [1]}}, "'finetune' has no option 'x'"),
        ({"l2": {"strength": 3}}, "strength = 3: give a list"),
        ({"l2": {"strength": ["a"]}}, "strength = 'a'"),
        ({"l2": {"strength": {"low": 1}}}, "both low and high"),
        ({"l2": {"strength": {"lov": 1, "high": 2}}}, "unknown key 'lov': did you mean 'low'"),
        ({"l2": {"strength": {"low": 2, "high": 1}}}, "low must be below high"),
        ({"l2": {"strength": {"low": 0, "high": 1, "log": True}}}, "above 0 where log"),
        ({"l2": {"seed": [1, 2]}}, "nothing to tune"),
        ({"l2+ewc": {"strength": [1]}}, r"unknown key 'strength' in \[sweep.methods.l2\+ewc\]"),
        ({"l2+ewc": {"l2": 3}}, "must be a table"),
    ],
)
def test_what_makes_no_sense_is_refused(methods: dict[str, Any], words: str) -> None:
    found = config(["finetune", "l2", "replay", "l2+ewc"], methods=methods)
    with pytest.raises(UsageError, match=words):
        _ = [space.axes_of(method, found) for method in space.tuned_methods(found)]


@given(
    low=st.floats(1e-9, 1e9),
    factor=st.floats(1.001, 1e9),
    log=st.sampled_from([True, False, None]),
    share=st.floats(0, 1),
)
def test_values_lie_within_their_range_and_both_ends_are_tried(
    low: float, factor: float, log: bool | None, share: float
) -> None:
    high = low * factor
    axis = space.read_axis("x", {"low": low, "high": high, "log": log})
    points = axis.points(5)
    assert points == sorted(points)
    # Six digits are kept, so an end is met to that precision; never beyond.
    assert points[0] == pytest.approx(low, rel=1e-5)
    assert points[-1] == pytest.approx(high, rel=1e-5)
    assert low <= points[0] <= axis.at(share) <= points[-1] <= high


anything: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["values", "low", "high", "log", "x"]), x),
    max_leaves=6,
)  # fmt: skip


@given(anything)
def test_a_range_is_read_or_refused_in_a_sentence(given: Any) -> None:
    try:
        axis = space.read_axis("strength", given)
    except UsageError:
        return  # anything else fails the test
    for value in axis.points(4):
        assert not isinstance(value, float) or math.isfinite(value)


def test_random_values_do_not_depend_on_how_many_are_drawn() -> None:
    axes = [space.Axis("a", low=1.0, high=1e4, log=True), space.Axis("b", (1, "x"))]
    many = space.drawn(axes, 400, 0, "ewc")
    assert many[:7] == space.drawn(axes, 7, 0, "ewc")
    assert many[:7] != space.drawn(axes, 7, 1, "ewc")
    below = sum(v["a"] < 100 for v in many) / 400  # half of the decades
    assert abs(below - 0.5) < 0.1
    assert {v["b"] for v in many} == {1, "x"}
