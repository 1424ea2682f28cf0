from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.lab.streams import StreamConfig
from guywire.lab.streams.splits import even_parts, plan
from guywire.lab.streams.tables import TEST, TRAIN, VALID, Table


def table(labels, *, domains=None, subjects=None, part=None) -> Table:
    labels = np.asarray(labels, dtype=np.int64)
    return Table(
        name="made",
        kind="text",
        labels=labels,
        class_names=tuple(f"c{i}" for i in range(labels.max() + 1)),
        fetch=lambda rows: tuple(str(r) for r in rows),
        domains=None if domains is None else np.asarray(domains),
        domain_names=() if domains is None else tuple(f"d{i}" for i in range(max(domains) + 1)),
        subjects=None if subjects is None else np.asarray(subjects),
        part=None if part is None else np.asarray(part, dtype=np.int8),
    )


def rows_of(made, which=(TRAIN, VALID, TEST)):
    return np.concatenate([task.rows[w] for task in made.tasks for w in which])


@given(total=st.integers(1, 200), parts=st.integers(1, 50))
def test_even_parts(total, parts):
    sizes = even_parts(total, parts)
    assert sum(sizes) == total
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(2, 12),
    each=st.integers(5, 30),
    tasks=st.integers(1, 12),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_every_row_is_used_once_and_each_class_is_everywhere(classes, each, tasks, seed, data):
    labels = np.tile(np.arange(classes), each)
    config = StreamConfig(tasks=tasks, seed=seed)
    if tasks > classes:
        with pytest.raises(UsageError, match=f"{tasks} tasks.*has {classes}"):
            plan(table(labels), config)
        return
    made = plan(table(labels), config)
    rows = rows_of(made)
    assert sorted(rows.tolist()) == list(range(len(labels)))
    assert [len(t.classes) for t in made.tasks] == even_parts(classes, tasks)
    assert [c for t in made.tasks for c in t.classes] == list(range(classes))
    for task in made.tasks:
        for part in task.rows:
            assert set(made.numbers[labels[part]]) == set(task.classes)
        test = np.bincount(labels[task.rows[TEST]], minlength=classes)
        assert set(test[test > 0]) == {max(1, round(0.2 * each))}  # stratified


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 3), scenario=st.sampled_from(["class", "domain"]))
def test_subjects_never_cross_a_split(data, seed, scenario):
    subjects_per_class = data.draw(st.lists(st.integers(2, 9), min_size=2, max_size=5))
    domains = 3
    label, subject, domain = [], [], []
    for c, count in enumerate(subjects_per_class):
        for s in range(count):
            for d in range(domains):
                label.append(c)
                subject.append(100 * c + s)
                domain.append(d)
    made = plan(
        table(label, domains=domain, subjects=subject),
        StreamConfig(scenario=scenario, seed=seed, tasks=2),
    )
    groups = [
        set(np.asarray(subject)[np.concatenate([t.rows[w] for t in made.tasks])])
        for w in (TRAIN, VALID, TEST)
    ]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert groups[0]
    assert groups[2]


def test_the_seed_moves_classes_and_validation_but_never_the_test_data():
    labels = np.tile(np.arange(8), 20)
    plans = [plan(table(labels), StreamConfig(tasks=4, seed=s)) for s in (0, 0, 1)]
    orders = [p.class_names for p in plans]
    assert orders[0] == orders[1] != orders[2]
    valid = [np.sort(rows_of(p, (VALID,))).tolist() for p in plans]
    assert valid[0] == valid[1] != valid[2]
    test = [np.sort(rows_of(p, (TEST,))).tolist() for p in plans]
    assert test[0] == test[1] == test[2]


def test_given_order():
    made = plan(table(np.tile(np.arange(4), 9)), StreamConfig(tasks=2, class_order="given", seed=7))
    assert made.class_names == ("c0", "c1", "c2", "c3")


def test_the_data_sets_own_parts_are_kept():
    labels = np.tile(np.arange(4), 25)
    part = np.repeat([TRAIN, VALID, TEST], [60, 20, 20])
    made = plan(table(labels, part=part), StreamConfig(tasks=2))
    for which in (TRAIN, VALID, TEST):
        assert np.sort(rows_of(made, (which,))).tolist() == np.flatnonzero(part == which).tolist()


def test_own_parts_that_share_a_subject_are_drawn_anew():
    labels = np.repeat(np.arange(2), 20)
    subjects = np.arange(40) // 2
    part = np.tile([TRAIN, TEST], 20)  # each subject on both sides
    made = plan(table(labels, subjects=subjects, part=part), StreamConfig(tasks=1))
    train, test = (set(subjects[rows_of(made, (w,))]) for w in (TRAIN, TEST))
    assert not train & test
    assert any("new split" in note for note in made.notes)


def test_small_and_single_subject_classes_are_left_out_with_a_note():
    labels = [0] * 10 + [1] * 10 + [2] * 3
    made = plan(table(labels), StreamConfig(tasks=1))
    assert set(made.class_names) == {"c0", "c1"}
    assert made.numbers[2] == -1
    assert any("1 classes with fewer than 5" in note for note in made.notes)
    subjects = [*range(10), *range(10, 20), 99, 99, 99]
    made = plan(table(labels, subjects=subjects), StreamConfig(tasks=1, min_per_class=2))
    assert set(made.class_names) == {"c0", "c1"}
    assert any("single subject" in note for note in made.notes)


def test_the_largest_classes():
    labels = np.repeat(np.arange(4), [10, 30, 20, 40])
    made = plan(table(labels), StreamConfig(tasks=1, classes=2, class_order="given"))
    assert made.class_names == ("c1", "c3")
    with pytest.raises(UsageError, match=r"5 classes.*has 4"):
        plan(table(labels), StreamConfig(classes=5))


def test_a_cap_a_class_counts_all_parts_and_whole_subjects():
    labels = np.repeat(np.arange(3), 50)
    made = plan(table(labels), StreamConfig(tasks=1, max_per_class=20))
    assert np.bincount(labels[rows_of(made)]).tolist() == [20, 20, 20]
    part = np.tile(np.repeat([TRAIN, TEST], [30, 20]), 3)
    made = plan(table(labels, part=part), StreamConfig(tasks=1, max_per_class=20))
    assert np.bincount(labels[rows_of(made)]).tolist() == [20, 20, 20]
    assert np.bincount(labels[rows_of(made, (TEST,))]).tolist() == [4, 4, 4]
    subjects = np.arange(150) // 4
    made = plan(table(labels, subjects=subjects), StreamConfig(tasks=1, max_per_class=20))
    kept = rows_of(made)
    assert (np.bincount(labels[kept]) <= 20).all()
    assert set(np.bincount(subjects[kept], minlength=38)) <= {0, 1, 2, 3, 4}


def test_domains_come_in_order_and_share_all_classes():
    labels = np.tile(np.arange(3), 60)
    domains = np.repeat([0, 1, 2], 60)
    made = plan(table(labels, domains=domains), StreamConfig(scenario="domain"))
    assert [t.name for t in made.tasks] == ["d0", "d1", "d2"]
    assert all(t.classes == (0, 1, 2) for t in made.tasks)
    for d, task in enumerate(made.tasks):
        assert set(domains[np.concatenate(task.rows)]) == {d}
    two = plan(table(labels, domains=domains), StreamConfig(scenario="domain", tasks=2))
    assert [t.name for t in two.tasks] == ["d0", "d1"]
    with pytest.raises(UsageError, match=r"4 tasks need 4 domains.*has 3"):
        plan(table(labels, domains=domains), StreamConfig(scenario="domain", tasks=4))


def test_a_class_that_a_domain_lacks_is_left_out():
    labels = np.array([*np.tile([0, 1, 2], 20), *np.tile([0, 1], 20)])
    domains = np.repeat([0, 1], [60, 40])
    made = plan(table(labels, domains=domains), StreamConfig(scenario="domain"))
    assert set(made.class_names) == {"c0", "c1"}
    assert any("every domain" in note for note in made.notes)


def test_no_domains_one_class_and_no_validation():
    labels = np.tile(np.arange(2), 20)
    with pytest.raises(UsageError, match="--domain-column"):
        plan(table(labels), StreamConfig(scenario="domain"))
    with pytest.raises(UsageError, match=r"1 class .*2 or more"):
        plan(table(np.zeros(20)), StreamConfig())
    made = plan(table(labels), StreamConfig(valid_fraction=0.0))
    assert len(rows_of(made, (VALID,))) == 0
    assert len(rows_of(made)) == 40
