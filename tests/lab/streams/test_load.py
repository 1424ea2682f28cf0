from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from guywire.core.errors import UsageError
from guywire.lab.streams import Split, StreamConfig, load

DATA = os.environ.get("GUYWIRE_DATA")


def needs(name: str) -> None:
    if not DATA or not (Path(DATA) / name).exists():
        pytest.skip(f"$GUYWIRE_DATA holds no {name}")


def same(a: Split, b: Split) -> bool:
    assert isinstance(a.inputs, torch.Tensor)
    assert isinstance(b.inputs, torch.Tensor)
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)


def keys(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.inputs]


def test_digits_are_scikit_learns():
    raw = load_digits()
    stream = load(StreamConfig())
    of = {
        image.astype(int).tobytes(): target
        for image, target in zip(raw.images, raw.target, strict=True)
    }
    seen = 0
    for task in stream.tasks:
        for split in (task.train, task.valid, task.test):
            for image, label in zip(split.inputs[:, 0], split.labels, strict=True):
                original = (image.double() * 16 / 255).round().long().numpy()
                assert of[original.tobytes()] == int(stream.class_names[int(label)])
                seen += 1
    assert seen == len(raw.target)


def test_the_same_settings_give_the_same_stream():
    first, second = load(StreamConfig(seed=3)), load(StreamConfig(seed=3))
    assert first.class_names == second.class_names
    for a, b in zip(first.tasks, second.tasks, strict=True):
        assert same(a.train, b.train)
        assert same(a.valid, b.valid)
        assert same(a.test, b.test)


def test_seeds_share_the_test_data():
    first, second = load(StreamConfig(seed=0)), load(StreamConfig(seed=1))
    assert first.class_names != second.class_names
    images = [sorted(k for t in s.tasks for k in keys(t.test)) for s in (first, second)]
    assert images[0] == images[1]


def test_moments_come_from_the_first_tasks_training_data_alone():
    stream = load(StreamConfig())
    x = stream.tasks[0].train.inputs.double() / 255
    torch.testing.assert_close(stream.mean, x.mean((0, 2, 3)).float())
    torch.testing.assert_close(stream.std, x.std((0, 2, 3), unbiased=False).float())


def test_tasks_by_default_and_uneven():
    assert len(load(StreamConfig()).tasks) == 5
    assert [len(t.classes) for t in load(StreamConfig(tasks=3)).tasks] == [4, 3, 3]
    assert len(load(StreamConfig(classes=6)).tasks) == 3
    with pytest.raises(UsageError, match=r"11 tasks.*has 10"):
        load(StreamConfig(tasks=11))


def test_digits_resized():
    assert load(StreamConfig(image_size=12)).shape == (1, 12, 12)


@pytest.mark.parametrize(
    ("data", "said"),
    [("digts", "digits"), ("nothing-like-it", "name one of digits"), ("./nowhere.parquet", "path")],
)
def test_unknown_data(data, said):
    with pytest.raises(UsageError, match=said):
        load(StreamConfig(data=data))


def test_columns_mean_nothing_to_data_without_them():
    with pytest.raises(UsageError, match="--label-column 'kind'"):
        load(StreamConfig(label_column="kind"))
    with pytest.raises(UsageError, match="no domains"):
        load(StreamConfig(scenario="domain"))


def test_importing_stays_lean():
    code = (
        "import sys; from guywire.lab import streams, models;"
        "heavy = ('transformers', 'datasets', 'pyarrow', 'pandas', 'sklearn');"
        "print([m for m in heavy if m in sys.modules]);"
        "models.prepare('mlp', streams.load(streams.StreamConfig()));"
        "print([m for m in heavy[:2] if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_data_sets(name):
    needs(name)
    stream = load(StreamConfig(data=name))
    assert stream.shape == (1, 28, 28)
    assert sum(len(t.train) + len(t.valid) for t in stream.tasks) == 60_000
    assert sum(len(t.test) for t in stream.tasks) == 10_000


@pytest.mark.data
def test_mnist_is_mnist():
    needs("mnist")
    stream = load(StreamConfig(data="mnist", class_order="given", tasks=1))
    # Figures that everyone knows: 5,923 zeros to train on, 980 to test.
    task = stream.tasks[0]
    counts = task.train.labels.bincount() + task.valid.labels.bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert int((task.test.labels == 0).sum()) == 980
    every = torch.cat([task.train.inputs, task.valid.inputs]).float() / 255
    assert float(every.mean()) == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.data
def test_renditions_hold_out_whole_emoji_in_every_style():
    needs("renditions.parquet")
    import pyarrow.parquet as pq

    config = StreamConfig(data="renditions", scenario="domain")
    stream = load(config)
    assert [t.name for t in stream.tasks] == ["noto", "twemoji", "openmoji", "openmoji-line"]
    assert stream.shape == (3, 64, 64)
    raw = pq.read_table(
        Path(DATA or "") / "renditions.parquet", columns=["style", "codepoint", "subgroup"]
    )
    assert len(stream.class_names) == len(set(raw["subgroup"].to_pylist())) - 1
    # The sizes of all parts agree across styles, as each emoji is drawn once in each.
    assert len({(len(t.train), len(t.valid), len(t.test)) for t in stream.tasks}) == 1
    for t in stream.tasks:
        assert torch.equal(t.test.labels, stream.tasks[0].test.labels)


@pytest.mark.data
def test_captions_are_a_text_stream_with_each_emoji_once():
    needs("renditions.parquet")
    stream = load(StreamConfig(data="renditions", text_column="caption", classes=10))
    assert stream.kind == "text"
    texts = [
        t for task in stream.tasks for s in (task.train, task.valid, task.test) for t in s.inputs
    ]
    assert len(texts) == pytest.approx(len(set(texts)), rel=0.02)
    train = {t for task in stream.tasks for t in task.train.inputs}
    test = {t for task in stream.tasks for t in task.test.inputs}
    assert not train & test
    assert "smil" in " ".join(texts) or "face" in " ".join(texts)
