from __future__ import annotations

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from guywire.core.errors import DataError
from guywire.lab.streams import StreamConfig, load
from guywire.lab.streams.idx import read_idx

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed(array: np.ndarray) -> bytes:
    """The format as its description has it, written independently of the reader."""
    kind = array.dtype.str[1:]
    head = bytes([0, 0, CODES[kind], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


arrays = st.sampled_from(sorted(CODES)).flatmap(
    lambda kind: hnp.arrays(
        np.dtype(kind), hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
    )
)


@quick
@given(array=arrays, zipped=st.booleans())
def test_round_trip(tmp_path, array, zipped):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(packed(array)) if zipped else packed(array))
    read = read_idx(path)
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()


@quick
@given(array=arrays, data=st.data(), zipped=st.booleans())
def test_every_truncation_is_noticed(tmp_path, array, data, zipped):
    whole = gzip.compress(packed(array)) if zipped else packed(array)
    path = tmp_path / "cut-file"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DataError, match="cut-file"):
        read_idx(path)


@quick
@given(array=arrays, extra=st.binary(min_size=1, max_size=9))
def test_bytes_too_many_are_noticed(tmp_path, array, extra):
    path = tmp_path / "long-file"
    path.write_bytes(packed(array) + extra)
    with pytest.raises(DataError, match="long-file"):
        read_idx(path)


@quick
@given(noise=st.binary(max_size=200))
def test_noise_gives_an_array_or_a_data_error(tmp_path, noise):
    path = tmp_path / "noise-file"
    for content in (noise, b"\x00\x00" + noise, b"\x1f\x8b" + noise, gzip.compress(noise)):
        path.write_bytes(content)
        said = ""
        try:
            array = read_idx(path)
        except DataError as error:
            said = str(error)
        else:
            assert array.nbytes <= len(content) * 1032
        assert not said or "noise-file" in said


@pytest.mark.parametrize("zipped", [False, True])
def test_a_declared_terabyte_is_refused_without_taking_memory(tmp_path, zipped):
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2**31) + bytes(100)
    path = tmp_path / "huge"
    path.write_bytes(gzip.compress(content) if zipped else content)
    tracemalloc.start()
    with pytest.raises(DataError, match="huge"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_zip_bomb_with_a_modest_header_is_not_unpacked(tmp_path):
    content = bytes([0, 0, 8, 1]) + struct.pack(">I", 10) + bytes(1 << 26)
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(content))
    tracemalloc.start()
    with pytest.raises(DataError, match="too long"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_idx(tmp_path / "nowhere")


def write(folder, name, array):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(packed(array))


def folder_of(tmp_path, train=40, test=20):
    rng = np.random.default_rng(0)
    folder = tmp_path / "small"
    for part, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 6, 5), dtype=np.uint8)
        images[:, 0, 0] = np.arange(n)  # a mark by which to know each again
        write(folder, f"{part}-images-idx3-ubyte", images)
        write(folder, f"{part}-labels-idx1-ubyte", (np.arange(n) % 4).astype(np.uint8))
    return folder


def test_a_folder_with_idx_files_keeps_its_own_test_data(tmp_path):
    folder = folder_of(tmp_path)
    stream = load(StreamConfig(data=str(folder), tasks=2, class_order="given"))
    assert stream.shape == (1, 6, 5)
    assert stream.class_names == ("0", "1", "2", "3")
    marks = sorted(int(m) for t in stream.tasks for m in t.test.inputs[:, 0, 0, 0])
    assert marks == list(range(20))
    kept = sorted(
        int(m) for t in stream.tasks for s in (t.train, t.valid) for m in s.inputs[:, 0, 0, 0]
    )
    assert kept == list(range(40))
    for task in stream.tasks:
        for split in (task.train, task.valid, task.test):
            assert torch_equal(split.inputs[:, 0, 0, 0] % 4, split.labels)


def torch_equal(a, b):
    return a.tolist() == b.tolist()


def test_without_test_files_test_data_are_held_out(tmp_path):
    folder = folder_of(tmp_path)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / name).unlink()
    stream = load(StreamConfig(data=str(folder), tasks=2))
    assert sum(len(t.test) for t in stream.tasks) == 8


def test_a_folder_that_lacks_a_file_or_does_not_fit_together(tmp_path):
    folder = folder_of(tmp_path)
    write(folder, "train-labels-idx1-ubyte", np.zeros(39, np.uint8))
    with pytest.raises(DataError, match=r"train-labels.*39"):
        load(StreamConfig(data=str(folder)))
    write(folder, "train-labels-idx1-ubyte", np.zeros((40, 1), np.uint8))
    with pytest.raises(DataError, match="train-labels"):
        load(StreamConfig(data=str(folder)))
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.*missing"):
        load(StreamConfig(data=str(folder)))


def test_images_of_another_type_are_refused(tmp_path):
    folder = folder_of(tmp_path)
    write(folder, "train-images-idx3-ubyte", np.zeros((40, 6, 5), np.float32))
    with pytest.raises(DataError, match="float32"):
        load(StreamConfig(data=str(folder)))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_missing_data_say_what_is_sought_where(tmp_path, monkeypatch, name):
    monkeypatch.setenv("GUYWIRE_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(StreamConfig(data=name))
    assert str(tmp_path / name / "train-images-idx3-ubyte") in str(caught.value)
    assert "GUYWIRE_DATA" in str(caught.value)
