from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams import StreamConfig, load


def fill(folder, values, size=(4, 4), ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.fromarray(np.full(size, value, np.uint8)).save(folder / f"{value:03}.{ending}")


def marks(task, which):
    return sorted(int(m) for m in getattr(task, which).inputs[:, 0, 0, 0])


def test_a_folder_a_class(tmp_path):
    for c, name in enumerate(("cat", "ant", "bee")):
        fill(tmp_path / name, range(c * 10, c * 10 + 10))
    fill(tmp_path / "ant" / "deeper", [50])
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    stream = load(StreamConfig(data=str(tmp_path), tasks=1, class_order="given"))
    assert stream.class_names == ("ant", "bee", "cat")
    task = stream.tasks[0]
    every = marks(task, "train") + marks(task, "valid") + marks(task, "test")
    assert sorted(every) == [*range(30), 50]
    for split in (task.train, task.valid, task.test):
        for mark, label in zip(split.inputs[:, 0, 0, 0], split.labels, strict=True):
            assert stream.class_names[label] == ("cat", "ant", "bee", "?", "?", "ant")[mark // 10]


def test_own_train_and_test_folders_are_kept(tmp_path):
    for c, name in enumerate(("a", "b")):
        fill(tmp_path / "train" / name, range(c * 10, c * 10 + 10))
        fill(tmp_path / "val" / name, range(50 + c * 10, 50 + c * 10 + 3))
        fill(tmp_path / "test" / name, range(100 + c * 10, 100 + c * 10 + 5))
    task = load(StreamConfig(data=str(tmp_path), tasks=1)).tasks[0]
    assert marks(task, "train") == [*range(20)]
    assert marks(task, "valid") == [50, 51, 52, 60, 61, 62]
    assert marks(task, "test") == [*range(100, 105), *range(110, 115)]


def test_domains_are_folders_above_the_classes(tmp_path):
    for d, domain in enumerate(("photo", "sketch")):
        for c, name in enumerate(("a", "b")):
            at = d * 20 + c * 10
            fill(tmp_path / domain / name, range(at, at + 10))
    stream = load(StreamConfig(data=str(tmp_path), scenario="domain"))
    assert [t.name for t in stream.tasks] == ["photo", "sketch"]
    assert all(t.classes == (0, 1) for t in stream.tasks)
    for d, task in enumerate(stream.tasks):
        every = marks(task, "train") + marks(task, "valid") + marks(task, "test")
        assert sorted(every) == list(range(d * 20, d * 20 + 20))


def test_a_damaged_image_is_named(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / name, range(6))
    (tmp_path / "b" / "004.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"b.004\.png"):
        load(StreamConfig(data=str(tmp_path)))


def test_links_that_lead_out_are_passed_over(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b"):
        fill(inside / name, range(6))
    fill(outside, [200])
    (inside / "a" / "way-out.png").symlink_to(outside / "200.png")
    (inside / "a" / "way-in.png").symlink_to(inside / "b" / "003.png")
    (inside / "c").symlink_to(outside)
    stream = load(StreamConfig(data=str(inside), tasks=1))
    task = stream.tasks[0]
    every = marks(task, "train") + marks(task, "valid") + marks(task, "test")
    assert sorted(every) == sorted([*range(6), *range(6), 3])
    assert set(stream.class_names) == {"a", "b"}
    assert any("1 links" in note for note in stream.notes)


def test_sizes_are_brought_together_only_when_told(tmp_path):
    fill(tmp_path / "a", range(6), size=(4, 4))
    fill(tmp_path / "b", range(6), size=(6, 9), ending="bmp")
    with pytest.raises(UsageError, match="--image-size"):
        load(StreamConfig(data=str(tmp_path)))
    stream = load(StreamConfig(data=str(tmp_path), image_size=5))
    assert stream.shape == (1, 5, 5)


def test_an_empty_folder_and_one_class(tmp_path):
    with pytest.raises(UsageError, match=f"no images.*{tmp_path.name}"):
        load(StreamConfig(data=str(tmp_path)))
    fill(tmp_path / "only", range(8))
    with pytest.raises(UsageError, match=r"1 class .*2 or more"):
        load(StreamConfig(data=str(tmp_path)))


def test_a_folder_of_parquet_files_gets_a_hint(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"hf:"):
        load(StreamConfig(data=str(tmp_path)))
