from __future__ import annotations

from guywire.lab.report.stats import Interval
from guywire.lab.report.verdict import percent, sentences


def around(mean: float, half: float | None = 0.01) -> Interval:
    return Interval(mean, *((None, None) if half is None else (mean - half, mean + half)), 3)


def test_separated_intervals_are_said_to_be() -> None:
    headline, _ = sentences({"a": around(0.3), "b": around(0.1)}, {}, {})
    assert headline.startswith("b forgot least: 10.0 points (95% interval 9.0 to 11.0)")
    assert "next is a with 30.0" in headline
    assert "do not overlap" in headline


def test_overlapping_intervals_are_said_to_be() -> None:
    found = {"a": around(0.115), "b": around(0.10), "c": around(0.118), "d": around(0.5)}
    headline, _ = sentences(found, {}, {})
    assert headline.startswith("b forgot least on average, 10.0 points")
    assert "overlaps the intervals of a and c" in headline
    assert "d" not in headline.split("intervals of")[1].split(":")[0].replace(" and ", " ").split()


def test_one_seed_ranks_nothing() -> None:
    headline, _ = sentences({"a": around(0.3, None), "b": around(0.1, None)}, {}, {})
    assert "one seed, all there is of b and a, gives no interval" in headline
    assert "cannot tell them apart" in headline
    mixed, _ = sentences({"a": around(0.3, None), "b": around(0.1)}, {}, {})
    assert "one seed, all there is of a, gives no interval" in mixed


def test_joint_training_takes_no_part() -> None:
    headline, remarks = sentences(
        {"joint": around(0.0), "ewc": around(0.2), "l2": around(0.4)}, {"joint": around(0.93)}, {}
    )
    assert headline.startswith("ewc forgot least")
    assert remarks == ("Joint training on all tasks at once, the ceiling, reaches 93.0%.",)


def test_one_method_has_nothing_to_be_compared_with() -> None:
    headline, _ = sentences({"ewc": around(0.2)}, {}, {})
    assert "nothing to compare it with" in headline


def test_nothing_finished() -> None:
    assert "nothing can be said" in sentences({}, {}, {})[0]


def test_who_learns_little_is_named() -> None:
    forgetting = {"frozen": around(0.01), "finetune": around(0.9)}
    accuracy = {"frozen": around(0.3), "finetune": around(0.2)}
    low = sentences(forgetting, accuracy, {"frozen": around(0.31), "finetune": around(0.97)})[1]
    even = sentences(forgetting, accuracy, {"frozen": around(0.96), "finetune": around(0.97)})[1]
    assert any("easier for who learns little" in r and "31.0%" in r for r in low)
    assert not any("easier" in r for r in even)


def test_a_more_accurate_method_is_named() -> None:
    _, remarks = sentences(
        {"a": around(0.1), "b": around(0.3)}, {"a": around(0.4), "b": around(0.6)}, {}
    )
    assert remarks[0].startswith("The highest final accuracy is that of b, 60.0%")
    assert "a ends at 40.0%" in remarks[0]


def test_a_rounded_zero_has_no_sign() -> None:
    assert [percent(v) for v in (-0.0001, 0.0, -0.0123, 1.0)] == ["0.0", "0.0", "-1.2", "100.0"]
