from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from guywire.core.errors import CheckpointError, DataError, GuywireError, UsageError
from guywire.methods.merging.files import Checkpoint, read_header


def raw(header: object, payload: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def row(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "length of a header"),
        (b"\x01\x02\x03", "length of a header"),
        (raw({}, length=10**9), "length of a header"),
        (raw(b"{}", length=1 << 63), "length of a header"),
        (raw(b"\xff\xfe{}"), "utf-8"),
        (raw(b"[1]"), "no JSON object"),
        (raw(b"{bad"), "Expecting property name"),
        (raw(b"[" * 100_000), ""),
        (raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "'a' twice"),
        (raw({"__metadata__": 3}), "metadata"),
        (raw({"__metadata__": {"a": 3}}), "metadata"),
        (raw({"\ud800": row()}, bytes(8)), "surrogates"),
        (raw({"w": 3}), "type, shape and place of 'w'"),
        (raw({"w": {"dtype": "F32"}}), "type, shape and place of 'w'"),
        (raw({"w": row("F4")}, bytes(8)), "'F4'"),
        (raw({"w": row(["F32"])}, bytes(8)), "type"),
        (raw({"w": row(shape=[-2])}, bytes(8)), "shape of 'w'"),
        (raw({"w": row(shape=[2.0])}, bytes(8)), "shape of 'w'"),
        (raw({"w": row(shape=[True])}, bytes(8)), "shape of 'w'"),
        (raw({"w": row(shape="2")}, bytes(8)), "shape of 'w'"),
        (raw({"w": row(shape=[1 << 61, 1 << 61])}, bytes(8)), "do not fit its shape"),
        (raw({"w": row(offsets=[0])}, bytes(8)), "offsets of 'w'"),
        (raw({"w": row(offsets=[8, 0])}, bytes(8)), "do not fit"),
        (raw({"w": row(offsets=[4, 12])}, bytes(12)), "leave a gap"),
        (raw({"w": row(), "v": row(offsets=[4, 12])}, bytes(12)), "overlap"),
        (raw({"w": row()}, bytes(7)), "bytes where its header wants"),
        (raw({"w": row()}, bytes(9)), "bytes where its header wants"),
    ],
)
def test_a_malformed_header_is_refused_with_the_files_name(
    tmp_path: Path, content: bytes, says: str
) -> None:
    file = tmp_path / "odd.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(file)
    assert str(file) in str(caught.value)
    assert says in str(caught.value)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_fuzzed_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "fuzz.safetensors"
    save_file({"a.weight": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.bfloat16)}, str(file))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(("flip", "cut", "insert")))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "flip" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 9))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    file.write_bytes(bytes(content))
    try:
        found = Checkpoint(file)
    except CheckpointError as error:
        refused: str | None = str(error)
    else:
        refused = None
    if refused is not None:
        assert "fuzz.safetensors" in refused
        return
    with found:
        for name, entry in found.tensors.items():
            assert found.read(name).numel() == entry.numel


def test_slices_are_what_they_should_be(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(10, dtype=torch.float16),
        "b": torch.arange(12, dtype=torch.int64).view(3, 4),
        "c": torch.tensor(True),
        "d": torch.empty(0, 3),
    }
    save_file(tensors, str(tmp_path / "m.safetensors"), metadata={"k": "v"})
    with Checkpoint(tmp_path) as found:
        assert found.metadata == {"k": "v"}
        for name, value in tensors.items():
            assert found.read(name).equal(value.reshape(-1))
            assert found.tensors[name].shape == tuple(value.shape)
        assert found.read("a", 3, 5).tolist() == [3.0, 4.0]
        assert found.read("b", 4, 4).tolist() == []


def test_a_file_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, str(file))
    with Checkpoint(file) as found:
        with file.open("r+b") as stream:
            stream.truncate(500)
        with pytest.raises(CheckpointError, match=r"model\.safetensors ends within 'a'"):
            found.read("a")


def shards(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2)}, str(folder / "m-1.safetensors"))
    save_file({"b": torch.ones(3), "spare": torch.ones(1)}, str(folder / "m-2.safetensors"))
    return {"a": "m-1.safetensors", "b": "m-2.safetensors"}


def indexed(folder: Path, listed: object) -> Path:
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": listed}))
    return file


def test_an_index_decides(tmp_path: Path) -> None:
    file = indexed(tmp_path, shards(tmp_path))
    for path in (tmp_path, file):
        with Checkpoint(path) as found:
            assert list(found.tensors) == ["a", "b"]
            assert found.read("b").tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"c": "m-2.safetensors"}, "lacks the tensor 'c'"),
        ({"b": "m-3.safetensors"}, "which is not there"),
        ({"b": "../m-2.safetensors"}, "no file beside it"),
        ({"b": "/etc/passwd"}, "no file beside it"),
        ({"b": 3}, "no file beside it"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    indexed(tmp_path, shards(tmp_path) | change)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "{"])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder or file"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(DataError, match="no safetensors files"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="pickled weights only"):
        Checkpoint(tmp_path)
    with pytest.raises(UsageError, match="pickled weights can run anything"):
        Checkpoint(tmp_path / "pytorch_model.bin")
    for name in ("x", "y"):
        save_file({"a": torch.ones(1)}, str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(UsageError, match=r"x\.safetensors, y\.safetensors: name the one"):
        Checkpoint(tmp_path)
    save_file({"b": torch.ones(1)}, str(tmp_path / "model.safetensors"))
    with Checkpoint(tmp_path) as found:
        assert list(found.tensors) == ["b"]


def test_order_is_that_of_bytes(tmp_path: Path) -> None:
    header = {"b": row(shape=[1], offsets=[4, 8]), "a": row(shape=[1], offsets=[0, 4])}
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw(header, bytes(8)))
    entries, _ = read_header(file)
    assert list(entries) == ["a", "b"]
    assert issubclass(CheckpointError, GuywireError)
