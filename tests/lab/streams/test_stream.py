from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams import Split, Stream, StreamConfig, Task, load
from guywire.lab.streams.stream import in_turn


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> Stream:
    return load(StreamConfig(data="digits"))


def token_stream() -> Stream:
    ids = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]], dtype=torch.int32)
    split = Split(ids, torch.tensor([0, 1, 0]))
    return Stream(
        "t", "class", "text", (Task("a", (0, 1), split, split, split),), ("x", "y"), pad_id=0
    )


def test_batches_of_images_are_normalised_exactly(digits):
    split = digits.tasks[0].train
    x, y = zip(*digits.batches(split, 17), strict=True)
    x, y = torch.cat(x), torch.cat(y)
    expected = (split.inputs.double() / 255 - digits.mean.double()) / digits.std.double()
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, split.labels)
    # The first task's training data set the scale.
    assert x.mean().abs() < 1e-4
    assert (x.std(unbiased=False) - 1).abs() < 1e-4


def test_the_last_batch_may_be_smaller_and_nothing_is_lost(digits):
    split = digits.tasks[0].test
    sizes = [len(y) for _, y in digits.batches(split, 10)]
    assert sizes[:-1] == [10] * (len(sizes) - 1)
    assert sum(sizes) == len(split)
    assert len(digits.loader(split, 10)) == len(sizes)


def test_a_generator_shuffles_and_decides(digits):
    split = digits.tasks[0].train

    def order(seed):
        return torch.cat([x for x, _ in digits.batches(split, 32, gen(seed))])

    state = torch.get_rng_state()
    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    assert torch.equal(torch.get_rng_state(), state)
    plain = torch.cat([x for x, _ in digits.batches(split, 32)])
    assert not torch.equal(order(0), plain)
    assert torch.equal(order(0).flatten(1).sum(1).sort()[0], plain.flatten(1).sum(1).sort()[0])


def test_a_batch_can_be_changed_without_harm(digits):
    split = digits.tasks[0].train
    before = split.labels.clone(), split.inputs.clone()
    x, y = next(digits.batches(split, 8))
    x.zero_()
    y.fill_(9)
    assert torch.equal(split.labels, before[0])
    assert torch.equal(split.inputs, before[1])


def test_a_loader_can_be_read_again(digits):
    loader = digits.loader(digits.tasks[1].train, 64)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_images_are_scaled_and_grey_is_repeated_in_the_batch(digits):
    large = dataclasses.replace(digits, size=16, channels=3)
    x, _ = next(large.batches(digits.tasks[0].train, 4))
    assert large.shape == tuple(x.shape[1:]) == (3, 16, 16)
    assert torch.equal(x[:, 0], x[:, 2])
    same, _ = next(digits.batches(digits.tasks[0].train, 4))
    # Halving what was doubled gives about the original back.
    assert (torch.nn.functional.avg_pool2d(x[:, :1], 2) - same).abs().mean() < 0.25


def test_tokens_are_cut_to_the_longest_of_the_batch():
    stream = token_stream()
    split = stream.tasks[0].train
    batch = next(stream.batches(split, 2))
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert [b["input_ids"].shape[1] for b in stream.batches(split, 1)] == [2, 1, 4]


def test_texts_must_be_tokenised_first():
    split = Split(("a", "b"), torch.tensor([0, 1]))
    stream = Stream("t", "class", "text", (Task("a", (0, 1), split, split, split),), ("x", "y"))
    with pytest.raises(UsageError, match="prepare"):
        next(stream.batches(split, 2))
    with pytest.raises(UsageError, match="texts"):
        _ = stream.shape
    with pytest.raises(UsageError, match="montage"):
        stream.montage(0)


def test_a_batch_size_of_nothing_is_refused(digits):
    with pytest.raises(UsageError, match="batch size of 0"):
        next(digits.batches(digits.tasks[0].train, 0))


def test_split_subset_and_concat():
    split = Split(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.arange(6))
    part = split.subset([4, 1])
    assert part.labels.tolist() == [4, 1]
    assert part.inputs.flatten().tolist() == [4, 1]
    joined = part.concat([split.subset([0]), split.subset(torch.tensor([], dtype=torch.int64))])
    assert joined.labels.tolist() == [4, 1, 0]
    assert part.concat(part).labels.tolist() == [4, 1, 4, 1]
    texts = Split(("a", "b"), torch.tensor([0, 1]))
    assert texts.concat(texts.subset([1])).inputs == ("a", "b", "b")
    with pytest.raises(DataError, match="joined"):
        texts.concat(split)
    with pytest.raises(DataError, match="joined"):
        split.concat(Split(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1).long()))
    with pytest.raises(DataError, match=r"2 inputs.*3 labels"):
        Split(("a", "b"), torch.arange(3))


def test_description_goes_into_json_and_tells_the_truth(digits):
    told = json.loads(json.dumps(digits.describe()))
    assert told["shape"] == [1, 8, 8]
    assert [t["classes"] for t in told["tasks"]] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    for task, described in zip(digits.tasks, told["tasks"], strict=True):
        assert described["sizes"] == {
            "train": len(task.train),
            "valid": len(task.valid),
            "test": len(task.test),
        }
        assert described["class_names"] == [digits.class_names[c] for c in task.classes]


def test_montage_shows_training_images_of_all_classes(digits):
    picture = digits.montage(0, count=2)
    assert picture.mode == "RGB"
    first = {int(c): int((digits.tasks[0].train.labels == c).nonzero()[0]) for c in (0, 1)}
    pixels = torch.tensor(list(picture.tobytes())).view(picture.height, picture.width, 3)
    for place, c in enumerate((0, 1)):
        left = 4 + place * (64 + 4)
        shown = pixels[4 : 4 + 64 : 8, left : left + 64 : 8, 0]
        assert torch.equal(shown, digits.tasks[0].train.inputs[first[c], 0].long())
    with pytest.raises(UsageError, match="no task 5"):
        digits.montage(5)


def test_in_turn_is_a_permutation_that_alternates():
    labels = torch.tensor([3, 3, 3, 1, 1, 2])
    order = in_turn(labels)
    assert sorted(order.tolist()) == list(range(6))
    assert labels[order].tolist() == [1, 2, 3, 1, 3, 3]


@pytest.mark.parametrize("size", [1, 7, 32, 1000])
def test_batches_made_together_are_the_same_batches(size):
    stream = load(StreamConfig())
    split = stream.tasks[0].train
    whole, labels = next(stream.batches(split, len(split), gen(3)))
    cut = list(stream.batches(split, size, gen(3)))
    assert [len(x) for x, _ in cut[:-1]] == [size] * (len(cut) - 1)
    assert torch.equal(torch.cat([x for x, _ in cut]), whole)
    assert torch.equal(torch.cat([y for _, y in cut]), labels)
