from __future__ import annotations

import numpy as np

from guywire.lab.report.read import Curve, Trial
from guywire.lab.report.traces import borders, lines, mean_over_seeds, shown_tasks


def curve(steps: list[int], tasks: list[int], values: list[float]) -> Curve:
    return Curve(np.array(steps), np.array(tasks), np.array(values))


def trial(curves: dict[int, Curve], status: str = "done") -> Trial:
    return Trial("x-seed0", "x", 0, status, curves=curves)


ONE = trial({0: curve([1, 2, 3, 4], [0, 0, 1, 1], [0.5, 0.9, 0.1, 0.6]), 1: curve([3, 4], [1, 1], [0.3, 0.8])})  # fmt: skip
TWO = trial({0: curve([1, 3, 4], [0, 1, 1], [0.7, 0.3, 0.4]), 1: curve([3, 4], [1, 1], [0.5, 0.6])})


def test_tasks_end_at_their_last_step() -> None:
    assert borders([ONE, TWO]) == [0.0, 2.0, 4.0]


def test_a_trial_cut_short_does_not_end_a_task_early() -> None:
    short = trial({0: curve([1], [0], [0.0])}, "unfinished")
    assert borders([short, ONE]) == borders([ONE])
    assert borders([short]) == [0.0, 1.0]


def test_the_mean_is_taken_where_all_seeds_were_evaluated() -> None:
    steps, values = mean_over_seeds([ONE.curves[0], TWO.curves[0]])
    assert steps.tolist() == [1, 3, 4]
    assert values.tolist() == [0.6, 0.2, 0.5]


def test_the_mean_of_seen_tasks() -> None:
    mean = [line for line in lines([ONE], [0, 1]) if line.key == 2]
    assert len(mean) == 1
    assert mean[0].x.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(mean[0].y, [0.5, 0.9, 0.2, 0.7])


def test_an_unfinished_seed_is_drawn_but_does_not_cut_the_mean() -> None:
    short = trial({0: curve([1], [0], [0.0])}, "unfinished")
    drawn = [line for line in lines([ONE, short], [0]) if line.key == 0]
    assert [line.main for line in drawn] == [False, False, True]
    assert drawn[-1].y.tolist() == ONE.curves[0].value.tolist()


def test_many_tasks_are_thinned_but_keep_the_first_and_the_last() -> None:
    many = trial({k: curve([1], [0], [0.5]) for k in range(40)})
    shown = shown_tasks([many])
    assert len(shown) == 6
    assert (shown[0], shown[-1]) == (0, 39)
