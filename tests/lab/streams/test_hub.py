from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams import StreamConfig, load

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """Every data set is prepared in a cache of the test's own, and no hub is asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "png")
    return file.getvalue()


def images(values, names=("cat", "dog")):
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    columns = {
        "img": [{"bytes": picture(v), "path": None} for v in values],
        "label": [v % len(names) for v in values],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def marks(stream, which):
    return sorted(int(m) for t in stream.tasks for m in getattr(t, which).inputs[:, 0, 0, 0])


def test_parquet_parts_in_a_folder(tmp_path):
    folder = tmp_path / "pets"
    (folder / "data").mkdir(parents=True)
    images(range(20)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    images(range(100, 110)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    stream = load(StreamConfig(data=f"hf:{folder}", tasks=1, class_order="given"))
    assert stream.class_names == ("cat", "dog")
    assert sorted(marks(stream, "train") + marks(stream, "valid")) == list(range(20))
    assert marks(stream, "test") == list(range(100, 110))
    train = stream.tasks[0].train
    assert (train.inputs[:, 0, 0, 0] % 2).tolist() == train.labels.tolist()


def test_saved_to_disk_with_all_three_parts(tmp_path):
    made = datasets.DatasetDict(
        train=images(range(20)), validation=images(range(50, 56)), test=images(range(100, 110))
    )
    made.save_to_disk(tmp_path / "saved")
    stream = load(StreamConfig(data=f"hf:{tmp_path / 'saved'}", tasks=1))
    assert marks(stream, "train") == list(range(20))
    assert marks(stream, "valid") == list(range(50, 56))
    assert marks(stream, "test") == list(range(100, 110))


def test_texts_and_a_test_part_without_labels(tmp_path):
    def texts(values, label=None):
        return datasets.Dataset.from_dict(
            {
                "sentence": [f"text {v}" for v in values],
                "label": [v % 2 if label is None else label for v in values],
            }
        )

    made = datasets.DatasetDict(
        train=texts(range(20)), validation=texts(range(50, 60)), test=texts(range(5), label=-1)
    )
    made.save_to_disk(tmp_path / "saved")
    stream = load(StreamConfig(data=f"hf:{tmp_path / 'saved'}", tasks=1))
    assert stream.kind == "text"
    assert set(stream.tasks[0].test.inputs) == {f"text {v}" for v in range(50, 60)}
    assert any("no labels" in note for note in stream.notes)


def test_a_single_part_is_split(tmp_path):
    images(range(20)).save_to_disk(tmp_path / "one")
    stream = load(StreamConfig(data=f"hf:{tmp_path / 'one'}", tasks=1))
    parts = [marks(stream, part) for part in ("train", "valid", "test")]
    assert sorted(mark for part in parts for mark in part) == list(range(20))
    assert len(parts[2]) == 4


def test_an_image_folder_is_read_through_the_library(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for v in range(8):
            (tmp_path / "pets" / name / f"{v}.png").write_bytes(picture(v))
    stream = load(StreamConfig(data=f"hf:{tmp_path / 'pets'}", tasks=1))
    assert set(stream.class_names) == {"cat", "dog"}
    assert stream.shape == (1, 4, 4)


def test_images_outside_the_data_set_are_not_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(7))
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 10
    (tmp_path / "pets").mkdir()
    pq.write_table(
        pa.table({"image": pa.array(cells, struct), "label": [0, 1] * 5}),
        tmp_path / "pets" / "train.parquet",
    )
    with pytest.raises(DataError, match=r"secret.png.*outside"):
        load(StreamConfig(data=f"hf:{tmp_path / 'pets'}"))


def test_a_data_set_that_is_nowhere():
    with pytest.raises(DataError, match="hf:nobody/nothing"):
        load(StreamConfig(data="hf:nobody/nothing"))


def test_a_missing_column_and_no_train_part(tmp_path):
    images(range(20)).save_to_disk(tmp_path / "one")
    with pytest.raises(UsageError, match=r"labl.*label.*--label-column"):
        load(StreamConfig(data=f"hf:{tmp_path / 'one'}", label_column="labl"))
    datasets.DatasetDict(a=images(range(9)), b=images(range(9))).save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match=r"a, b.*train"):
        load(StreamConfig(data=f"hf:{tmp_path / 'two'}"))
