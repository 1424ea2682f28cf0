from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from guywire.core import checkpoint
from guywire.core.buffers import BalancedBuffer, ReservoirBuffer
from guywire.core.errors import CheckpointError, DataError, UsageError


def make(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(begin, count, classes=3):
    index = torch.arange(begin, begin + count)
    return index[:, None].float(), index % classes


def held(buffer):
    x, y = buffer.draw(10_000, make())
    return x[:, 0].long(), y


@given(st.integers(1, 20), st.lists(st.integers(1, 15), min_size=1, max_size=8), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_reservoir_is_algorithm_r_one_by_one(capacity, sizes, seed):
    buffer, generator = ReservoirBuffer(capacity), make(seed)
    slots, seen, other = [], 0, make(seed)
    for size in sizes:
        buffer.add(numbered(seen, size), generator)
        for chance in torch.rand(size, generator=other, dtype=torch.float64).tolist():
            if seen < capacity:
                slots.append(seen)
            elif (j := int(chance * (seen + 1))) < capacity:
                slots[j] = seen
            seen += 1
    assert len(buffer) == min(capacity, seen)
    assert buffer._store.fields["input0"][: len(buffer), 0].long().tolist() == slots
    assert buffer._store.fields["labels"][: len(buffer)].tolist() == [s % 3 for s in slots]


def test_a_reservoir_is_uniform_over_the_stream():
    stream, capacity, runs, generator = 60, 12, 900, make(11)
    counts = torch.zeros(stream)
    for _ in range(runs):
        buffer = ReservoirBuffer(capacity)
        for begin in range(0, stream, 7):
            buffer.add(numbered(begin, min(7, stream - begin)), generator)
        counts[buffer._store.fields["input0"][:, 0].long()] += 1
    assert counts.sum() == runs * capacity
    # Sampling without replacement makes counts a little less variable than the statistic assumes.
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    biased = counts + torch.linspace(-30, 30, stream)
    assert stats.chisquare(biased.numpy()).pvalue < 0.001  # the test would see a slope of a sixth


@given(st.integers(1, 30), st.lists(st.integers(1, 25), min_size=1, max_size=6), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_a_balanced_memory_holds_as_much_of_every_class(capacity, sizes, classes):
    buffer, generator, seen = BalancedBuffer(capacity), make(1), 0
    for size in sizes:
        buffer.add(numbered(seen, size, classes), generator)
        seen += size
        index, labels = held(buffer)
        assert len(index.unique()) == len(index) == len(buffer) <= capacity
        assert torch.equal(index % classes, labels)
        assert sorted(labels.tolist()) == sorted(buffer.labels.tolist())
        present = min(seen, classes)
        for c in range(present):
            available = len(range(c, seen, classes))
            quota = capacity // present + (c < capacity % present)
            assert int((labels == c).sum()) <= quota
            # Nothing is thrown away that the quota would hold, as the quota only ever shrinks.
            assert int((labels == c).sum()) == min(available, quota)


def test_a_balanced_memory_is_uniform_inside_a_class_when_the_quota_shrinks():
    generator, counts = make(5), torch.zeros(40)
    for _ in range(400):
        buffer = BalancedBuffer(12)
        for begin in range(0, 40, 8):
            x = torch.arange(begin, begin + 8)
            buffer.add((x[:, None].float(), torch.zeros(8, dtype=torch.long)), generator)
        buffer.add((torch.full((9, 1), -1.0), torch.ones(9, dtype=torch.long)), generator)
        index, labels = held(buffer)
        assert int((labels == 0).sum()) == 6
        counts[index[labels == 0]] += 1
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_draws_are_uniform_over_classes_and_without_replacement():
    buffer, generator = BalancedBuffer(90), make(2)
    labels = torch.tensor([0] * 30 + [1] * 5 + [2] * 20)
    buffer.add((torch.arange(55.0)[:, None], labels), generator)
    first, third = torch.zeros(3), torch.zeros(3)
    samples = torch.zeros(55)
    for _ in range(3000):
        x, y = buffer.draw(3, generator)
        assert len(x.unique()) == 3
        first[y[0]] += 1
        third[y[2]] += 1
        samples[x[:, 0].long()] += 1
    # No class can be used up in three draws, so each draw is a fair one of three.
    assert stats.chisquare(first.numpy()).pvalue > 0.01
    assert stats.chisquare(third.numpy()).pvalue > 0.01
    assert stats.chisquare(samples[:30].numpy()).pvalue > 0.01


def test_a_class_that_is_used_up_leaves_the_draw_to_the_others():
    buffer, generator = BalancedBuffer(12), make(3)
    buffer.add((torch.arange(12.0)[:, None], torch.tensor([0] * 2 + [1] * 10)), generator)
    assert len(buffer) == 8  # two of class 0, and the quota of six of class 1
    x, y = buffer.draw(100, generator)
    assert len(x.unique()) == 8
    assert sorted(y.tolist()) == [0] * 2 + [1] * 6


@pytest.mark.parametrize("kind", [ReservoirBuffer, BalancedBuffer])
def test_saved_and_resumed_draws_go_on_alike(kind, tmp_path):
    buffer, generator = kind(9), make(4)
    buffer.add(numbered(0, 25), generator)
    checkpoint.save(
        tmp_path / "b.safetensors", {"b": buffer.state_dict(), "g": generator.get_state()}
    )
    saved = checkpoint.load(tmp_path / "b.safetensors")
    again, other = kind(9), make()
    again.load_state_dict(saved["b"])
    other.set_state(saved["g"])
    for memory, source in ((buffer, generator), (again, other)):
        memory.add(numbered(25, 10), source)
    one, two = buffer.draw(5, generator), again.draw(5, other)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    with pytest.raises(CheckpointError, match="capacity 9, this one 8"):
        kind(8).load_state_dict(saved["b"])


@pytest.mark.parametrize("kind", [ReservoirBuffer, BalancedBuffer])
def test_an_empty_memory(kind, tmp_path):
    buffer = kind(3)
    assert len(buffer) == 0
    assert buffer.draw(5, make()) is None
    checkpoint.save(tmp_path / "b.safetensors", buffer.state_dict())
    kind(3).load_state_dict(checkpoint.load(tmp_path / "b.safetensors"))
    with pytest.raises(UsageError, match="capacity=0"):
        kind(0)


@pytest.mark.parametrize("kind", [ReservoirBuffer, BalancedBuffer])
def test_types_are_kept_and_memory_is_not_shared(kind):
    buffer = kind(6)
    images = torch.randint(255, (6, 3, 2, 2), dtype=torch.uint8)
    labels = torch.arange(6)
    before = images.clone()
    buffer.add((images, labels), make())
    images.zero_()
    x, y = buffer.draw(6, make())
    assert x.dtype is torch.uint8
    assert torch.equal(x, before[y])
    x.zero_()
    assert torch.equal(buffer.draw(6, make())[0], before[y])


def test_tuples_of_inputs_come_back_as_tuples():
    buffer = ReservoirBuffer(4)
    buffer.add(((torch.arange(4.0), torch.arange(4) * 2), torch.arange(4)), make())
    (a, b), y = buffer.draw(4, make())
    assert torch.equal(a.long(), y)
    assert torch.equal(b, 2 * y)


def sentences(*lengths, first=1):
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int32)
    for i, length in enumerate(lengths):
        ids[i, :length] = first + i
    labels = torch.arange(first, first + len(lengths))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


@pytest.mark.parametrize("kind", [ReservoirBuffer, BalancedBuffer])
def test_sequences_of_different_lengths_are_padded_and_cut_again(kind):
    buffer = kind(9)
    buffer.add(sentences(2, 3), make())
    buffer.add(sentences(7, 1, first=3), make())
    buffer.add(sentences(4, first=5), make())
    drawn = buffer.draw(9, make())
    assert drawn["input_ids"].shape == (5, 7)
    for ids, mask, label in zip(*drawn.values(), strict=True):
        length = {1: 2, 2: 3, 3: 7, 4: 1, 5: 4}[int(label)]
        assert ids.tolist() == [int(label)] * length + [0] * (7 - length)
        assert mask.tolist() == [1] * length + [0] * (7 - length)
    for seed in range(10):
        drawn = buffer.draw(2, make(seed))
        assert drawn["attention_mask"].any(0).all()  # no column that nobody attends to


def test_labels_of_tokens_are_padded_by_what_does_not_count():
    buffer = ReservoirBuffer(4)
    for length in (2, 4):
        ids = torch.ones(1, length, dtype=torch.long)
        buffer.add({"input_ids": ids, "attention_mask": ids, "labels": ids}, make())
    labels = buffer.draw(4, make())["labels"]
    assert sorted(labels.tolist()) == [[1, 1, -100, -100], [1, 1, 1, 1]]


def test_what_does_not_fit_is_refused_and_changes_nothing():
    buffer = ReservoirBuffer(8)
    buffer.add(numbered(0, 2), make())
    for batch, words in [
        ((torch.zeros(1, 2), torch.zeros(1).long()), "rows of shape"),
        ((torch.zeros(1, 1).double(), torch.zeros(1).long()), "float32 in the memory but"),
        ({"a": torch.zeros(1, 1), "labels": torch.zeros(1).long()}, "the memory holds"),
        ((torch.zeros(3, 1), torch.zeros(1).long()), "different numbers of rows"),
        ({"a": torch.zeros(1)}, "no 'labels'"),
        ((["text"], torch.zeros(1)), "no 'labels', or inputs that are no tensors"),
        (torch.zeros(3), "pairs"),
    ]:
        with pytest.raises(DataError, match=words):
            buffer.add(batch, make())
    assert len(buffer) == 2
    plain = ReservoirBuffer(8)
    plain.add({"ids": torch.ones(1, 2), "labels": torch.zeros(1)}, make())
    with pytest.raises(DataError, match="attention_mask"):
        plain.add({"ids": torch.ones(1, 3), "labels": torch.zeros(1)}, make())
    with pytest.raises(UsageError, match="one class number a sample"):
        BalancedBuffer(3).add((torch.ones(2, 1), torch.rand(2)), make())


def test_a_new_class_that_brings_less_than_it_displaces_leaves_no_holes():
    buffer, generator = BalancedBuffer(10), make(6)
    everything = {}
    for c, (begin, count) in enumerate([(0, 20), (20, 1), (21, 2), (23, 30)]):
        x = torch.arange(begin, begin + count)
        everything[c] = set(x.tolist())
        buffer.add((x[:, None].float(), torch.full((count,), c)), generator)
        index, labels = held(buffer)
        assert len(buffer._keys) == len(index) == len(index.unique())
        assert all(i in everything[c] for i, c in zip(index.tolist(), labels.tolist(), strict=True))
    assert buffer.labels.bincount().tolist() == [3, 1, 2, 2]
    # Keys moved with their rows: each kept row has one of the smallest keys of its class.
    again = BalancedBuffer(10)
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again._keys, buffer._keys)
    assert torch.equal(again.labels, buffer.labels)


@given(
    st.integers(1, 20),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=15), min_size=1, max_size=6),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=100)
def test_a_balanced_memory_keeps_the_smallest_keys_of_every_class(capacity, parts, seed):
    buffer, generator, other = BalancedBuffer(capacity), make(seed), make(seed)
    seen = []  # (class, key, number) of everything offered
    for labels in parts:
        keys = torch.rand(len(labels), generator=other, dtype=torch.float64).tolist()
        numbers = range(len(seen), len(seen) + len(labels))
        seen += zip(labels, keys, numbers, strict=True)
        x = torch.tensor(list(numbers), dtype=torch.float32)[:, None]
        buffer.add((x, torch.tensor(labels)), generator)
    classes = sorted({c for c, _, _ in seen})
    expected = set()
    for position, c in enumerate(classes):
        quota = capacity // len(classes) + (position < capacity % len(classes))
        expected |= {n for _, _, n in sorted(row for row in seen if row[0] == c)[:quota]}
    index, labels = held(buffer)
    assert set(index.tolist()) == expected
    assert len(index) == len(expected)
    assert labels.tolist() == [seen[i][0] for i in index.tolist()]
    rows = buffer._store.fields["input0"][: len(buffer), 0].long().tolist()
    assert buffer._keys.tolist() == [seen[i][1] for i in rows]
