from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams import StreamConfig, load
from guywire.lab.streams.columns import find_columns


def png(value: int, size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), value).save(file, "png")
    return file.getvalue()


N = 40


def rows(**more):
    return {
        "picture": [png(i) for i in range(N)],
        "kind": ["ab"[i % 2] for i in range(N)],
        "place": ["sea"] * 20 + ["land"] * 20,
        "who": [i % 20 // 2 for i in range(N)],
        "words": [f"word {i}" for i in range(N)],
        "more": [None if i % 3 else f"more {i}" for i in range(N)],
    } | more


def write(tmp_path, columns, name="some.parquet"):
    path = tmp_path / name
    pq.write_table(pa.table(columns), path)
    return str(path)


def marks(stream, which):
    return {int(m) for t in stream.tasks for m in getattr(t, which).inputs[:, 0, 0, 0]}


def test_a_parquet_file_with_every_column_named(tmp_path):
    path = write(tmp_path, rows())
    stream = load(
        StreamConfig(
            data=path,
            image_column="picture",
            label_column="kind",
            domain_column="place",
            subject_column="who",
            scenario="domain",
        )
    )
    assert [t.name for t in stream.tasks] == ["sea", "land"]
    assert stream.shape == (1, 4, 4)
    who = [{m % 20 // 2 for m in marks(stream, part)} for part in ("train", "valid", "test")]
    assert not (who[0] & who[1])
    assert not (who[0] & who[2])
    assert not (who[1] & who[2])
    assert set().union(*who) == set(range(10))
    for task in stream.tasks:
        for split in (task.train, task.valid, task.test):
            names = [stream.class_names[c] for c in split.labels]
            assert names == ["ab"[int(m) % 2] for m in split.inputs[:, 0, 0, 0]]


def test_usual_names_need_no_flags(tmp_path):
    made = rows()
    path = write(tmp_path, {"image": made["picture"], "label": [i % 4 for i in range(N)]})
    stream = load(StreamConfig(data=path, class_order="given"))
    assert stream.class_names == ("0", "1", "2", "3")
    assert len(stream.tasks) == 2
    path = write(tmp_path, {"text": made["words"], "label": made["kind"]}, "texts.parquet")
    stream = load(StreamConfig(data=path))
    assert stream.kind == "text"
    assert stream.mean is None


def test_joined_text_columns(tmp_path):
    path = write(tmp_path, rows())
    stream = load(StreamConfig(data=path, text_column="words+more", label_column="kind", tasks=1))
    texts = {
        t
        for s in (stream.tasks[0].train, stream.tasks[0].valid, stream.tasks[0].test)
        for t in s.inputs
    }
    assert texts == {f"word {i}" if i % 3 else f"word {i}, more {i}" for i in range(N)}
    told = stream.describe()["tasks"][0]["samples"]
    assert {s["class"] for s in told} == {"a", "b"}
    assert {s["text"] for s in told} <= set(stream.tasks[0].train.inputs)


def test_images_as_structs_and_as_numbers(tmp_path):
    pixels = [np.full((4, 4), i, np.uint8) for i in range(N)]
    forms = {
        "struct": [{"bytes": png(i), "path": f"{i}.png"} for i in range(N)],
        "rows": [p.tolist() for p in pixels],
        "flat": [p.ravel().tolist() for p in pixels],
        "deep": [p[None].tolist() for p in pixels],
        "colour": [np.repeat(p[:, :, None], 3, 2).tolist() for p in pixels],
        "fractions": [(p / 255).tolist() for p in pixels],
    }
    for form, column in forms.items():
        path = write(
            tmp_path, {"image": column, "label": [i % 2 for i in range(N)]}, f"{form}.parquet"
        )
        stream = load(StreamConfig(data=path))
        assert stream.shape == ((3 if form == "colour" else 1), 4, 4), form
        assert marks(stream, "train") | marks(stream, "valid") | marks(stream, "test") == set(
            range(N)
        ), form


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"image_column": "pictur", "label_column": "kind"}, "pictur.*picture.*--image-column"),
        ({"image_column": "picture", "label_column": "knd"}, "knd.*kind.*--label-column"),
        ({"image_column": "picture"}, "label.*kind.*--label-column"),
        ({"label_column": "kind"}, "picture.*--image-column or --text-column"),
        ({"text_column": "words+mor", "label_column": "kind"}, "mor.*more.*--text-column"),
        (
            {"image_column": "picture", "label_column": "kind", "scenario": "domain"},
            "domain.*place.*--domain-column",
        ),
        (
            {"image_column": "picture", "label_column": "kind", "subject_column": "whom"},
            "whom.*who.*--subject-column",
        ),
        ({"image_column": "picture", "text_column": "words", "label_column": "kind"}, "one kind"),
    ],
)
def test_missing_columns_name_near_ones_and_the_flag(config, said):
    with pytest.raises(UsageError, match=said):
        find_columns(StreamConfig(**config), list(rows()), "some.parquet")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [png(0)] * 9 + [b"nonsense"], "label": [0, 1] * 5}, "row 9.*image"),
        ({"image": [png(0)] * 9 + [None], "label": [0, 1] * 5}, "row 9.*nothing"),
        ({"image": [png(0)] * 10, "label": [0, 1] * 4 + [0, None]}, "row 9.*label.*empty"),
        ({"image": [png(0)] * 10, "label": [0.5, 1.0] * 5}, "row 0.*0.5"),
        ({"image": ["a"] * 10, "label": [0, 1] * 5}, "row .*str, not an image"),
        ({"image": [[1, 2, 3]] * 10, "label": [0, 1] * 5}, "3 numbers in a row"),
        ({"image": [[[1, 2], [3, 400]]] * 10, "label": [0, 1] * 5}, "1 to 400"),
        ({"image": [[[1, 2], [3]]] * 10, "label": [0, 1] * 5}, "unequal length"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 10, "label": [0, 1] * 5}, "no bytes"),
        ({"text": [1] * 10, "label": [0, 1] * 5}, "int, not text"),
    ],
)
def test_bad_cells_are_named(tmp_path, columns, said):
    if columns["label"] == [0, 1] * 5 and isinstance(columns.get("image", [0])[0], dict):
        columns = columns | {
            "image": pa.array(
                columns["image"], pa.struct({"bytes": pa.binary(), "path": pa.string()})
            )
        }
    with pytest.raises(DataError, match=said):
        load(StreamConfig(data=write(tmp_path, columns)))


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = write(tmp_path, rows())
    whole = Path(path).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1" + bytes(50)):
        Path(path).write_bytes(content)
        with pytest.raises(DataError, match=r"some.parquet"):
            load(StreamConfig(data=path))


def test_an_empty_table(tmp_path):
    path = write(tmp_path, {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    with pytest.raises(DataError, match="no rows"):
        load(StreamConfig(data=path))


def test_renditions_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("GUYWIRE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"renditions.parquet is missing.*GUYWIRE_DATA"):
        load(StreamConfig(data="renditions"))
