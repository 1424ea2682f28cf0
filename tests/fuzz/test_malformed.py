"""What fuzzing found, one test each, and properties of the structured parts."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os

import fuzz_data
import fuzz_weights
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guywire.cli.app import run
from guywire.core import checkpoint, writing
from guywire.core.errors import CheckpointError, DataError, GuywireError, UsageError
from guywire.lab import streams
from guywire.lab.models.evals import read_texts
from guywire.lab.streams.lines import text_lines
from guywire.lab.training.config import CompareConfig, parse
from guywire.lab.training.tables import read_toml
from guywire.methods import merging
from guywire.methods.merging.files import Checkpoint, read_header, read_json

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


# --- compressed deltas --------------------------------------------------------------------------


def forge(folder, change):
    """Write a delta with a changed header and checksums that match."""
    base = folder / "base"
    fuzz_weights._model(base, fuzz_weights.weights(0))
    (folder / "delta").mkdir()
    for name, content in fuzz_weights._delta().items():
        (folder / "delta" / name).write_bytes(content)
    file = folder / "delta" / "delta.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    rows = json.loads(data[8 : 8 + length])
    about = json.loads(rows["__metadata__"]["guywire_delta"])
    change(about)
    text = json.dumps(about)
    rows["__metadata__"]["guywire_delta"] = text
    rows["__metadata__"]["header_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_bytes(fuzz_weights.packed(json.dumps(rows).encode(), data[8 + length :]))
    return base, folder / "delta"


def test_a_delta_that_is_not_changed_is_applied(tmp_path):
    base, delta = forge(tmp_path, lambda about: None)
    assert merging.apply_delta(delta, base, tmp_path / "made").tensors["pruned"] == 5


@pytest.mark.parametrize(
    "name", ["../../escape.safetensors", "/escape.safetensors", "..", "a\\..\\b.safetensors", "x/y.safetensors", "journal", "config.json", ".safetensors", "a\0.safetensors", "n" * 3000 + ".safetensors"]
)  # fmt: skip
def test_a_delta_cannot_name_files_elsewhere(tmp_path, name):
    def rename(about):
        about["files"][name] = about["files"].pop("model.safetensors")

    base, delta = forge(tmp_path, rename)
    (tmp_path / "place").mkdir()
    with pytest.raises(CheckpointError, match="no name of a weight file"):
        merging.apply_delta(delta, base, tmp_path / "place" / "made")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "delta", "place"}
    assert not list((tmp_path / "place").iterdir())


def test_a_delta_cannot_ask_for_terabytes(tmp_path):
    def grow(about):
        about["files"]["model.safetensors"][0]["shape"] = [1 << 40]

    base, delta = forge(tmp_path, grow)
    with pytest.raises(CheckpointError, match="do not make up the whole"):
        merging.apply_delta(delta, base, tmp_path / "made")


@quick
@given(data=st.data(), value=values)
def test_no_change_of_a_delta_is_a_traceback(tmp_path_factory, data, value):
    def change(about):
        rows = about["files"]["model.safetensors"]
        home = data.draw(st.sampled_from([about, about["recipe"], about["metadata"], *rows]))
        home[data.draw(st.sampled_from(sorted(home) or ["x"]))] = value

    folder = tmp_path_factory.mktemp("delta")
    base, delta = forge(folder, change)
    try:
        merging.apply_delta(delta, base, folder / "out" / "made")
    except GuywireError as error:
        assert str(error).strip()  # noqa: PT017
    assert {p.name for p in folder.iterdir()} <= {"base", "delta", "out"}


def test_modules_json_cannot_copy_to_elsewhere(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    fuzz_weights._model(root / "base", fuzz_weights.weights(0))
    fuzz_weights._model(root / "tuned", fuzz_weights.weights(1))
    (root / "tuned" / "modules.json").write_text('[{"path": ".."}, {"path": 3}]')
    (root / "secret.json").write_text("{}")
    merging.merge_checkpoints(root / "base", [root / "tuned"], tmp_path / "out" / "made", rate=0.5)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["made"]
    assert not list((tmp_path / "out" / "made").rglob("secret.json"))


def test_links_in_circles_are_no_traceback(tmp_path):
    fuzz_weights._model(tmp_path / "base", fuzz_weights.weights(0))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(GuywireError):
        merging.merge_checkpoints(tmp_path / "base", [tmp_path / "loop"], tmp_path / "out")
    with pytest.raises(UsageError, match="a link to nothing"):
        merging.merge_checkpoints(tmp_path / "base", [tmp_path / "base"], tmp_path / "loop")


# --- safetensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("header", fuzz_weights._HEADERS, ids=range(len(fuzz_weights._HEADERS)))
@pytest.mark.timeout(10)  # the product of a million numbers, a name sought in a list of names
def test_headers_are_refused_at_once(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(fuzz_weights.packed(header, bytes(4)))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError):
        checkpoint.load(file)


@quick
@given(
    row=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), values),
    name=st.text(),
)
def test_no_header_is_a_traceback(tmp_path, row, name):
    file = tmp_path / "x.safetensors"
    file.write_bytes(fuzz_weights.packed(json.dumps({name: row}).encode(), bytes(8)))
    try:
        with Checkpoint(file) as found:
            for tensor in found.tensors:
                found.read(tensor)
    except GuywireError:
        pass


@quick
@given(tree=values)
def test_no_tree_is_a_traceback(tmp_path_factory, tree):
    file = tmp_path_factory.mktemp("t") / "x"
    checkpoint.save(file, {"a": torch.ones(2)})
    rng = np.random.default_rng(0)
    file.write_bytes(fuzz_weights.forged(file.read_bytes(), lambda rng, old, more=(): tree, rng))
    with contextlib.suppress(CheckpointError):
        checkpoint.load(file)


@pytest.mark.parametrize("claims", [1 << 40, 1 << 43])
def test_terabytes_are_claimed_by_a_sparse_file(tmp_path, claims):
    file = tmp_path / "x.safetensors"
    file.write_bytes(fuzz_weights.packed(b"{}", b"", claims - 8))
    try:
        os.truncate(file, claims)
    except OSError:
        pytest.skip("this file system has no files of that size")
    with pytest.raises(CheckpointError):
        read_header(file)
    with pytest.raises(CheckpointError):
        checkpoint.load(file)
    with pytest.raises(CheckpointError, match="too large"):
        read_json(file)


def test_a_name_that_is_too_long_is_no_traceback(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "n" * 3000}}))
    with pytest.raises(CheckpointError, match="not there"):
        Checkpoint(tmp_path)
    with pytest.raises(GuywireError):
        Checkpoint("n" * 5000)


# --- data ---------------------------------------------------------------------------------------


def pictures(root):
    for k in range(2):
        (root / f"c{k}").mkdir(parents=True)
        for i in range(6):
            (root / f"c{k}" / f"{i}.png").write_bytes(fuzz_data.picture("PNG"))
    return root


@pytest.mark.timeout(20)
def test_pipes_and_circular_links_among_images_are_passed_over(tmp_path):
    root = pictures(tmp_path / "data")
    os.mkfifo(root / "c0" / "pipe.png")
    (root / "c0" / "to-pipe.png").symlink_to("pipe.png")
    stream = streams.load(streams.StreamConfig(data=str(root)))
    assert len(stream.class_names) == 2
    (root / "c1" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"loop\.png"):
        streams.load(streams.StreamConfig(data=str(root)))


def test_images_without_pixels_are_none(tmp_path):
    labels = np.arange(40, dtype=np.uint8) % 4
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(fuzz_data.idx_bytes(labels))
    images = fuzz_data.idx_bytes(np.zeros((40, 0, 0), "u1"))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    with pytest.raises(DataError, match="not images"):
        streams.load(streams.StreamConfig(data=str(tmp_path), image_size=7))


def test_two_columns_of_one_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b"] * 10, "label": [0, 1] * 10})
    pq.write_table(table.append_column("label", table["label"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="two columns 'label'"):
        streams.load(streams.StreamConfig(data=str(tmp_path / "x.parquet")))


def test_texts_of_a_table_that_are_no_unicode(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["abcdefgh" * 4] * 20, "label": [0, 1] * 10})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"abcdefgh", b"abc\xffefgh"))
    with pytest.raises(DataError, match="cannot be read as a parquet file"):
        streams.load(streams.StreamConfig(data=str(tmp_path / "x.parquet")))


def test_an_image_size_that_fills_memory_is_refused_before(monkeypatch):
    monkeypatch.setattr("guywire.lab.streams.images._memory", lambda: 1 << 26)
    with pytest.raises(UsageError, match="give a smaller --image-size"):
        streams.load(streams.StreamConfig(data="digits", image_size=512))


@pytest.mark.parametrize("data", ["~nobody-has-this-name/x", "n" * 5000, "a\0b", ""])
def test_paths_that_are_none(data):
    with pytest.raises(GuywireError):
        streams.load(streams.StreamConfig(data=data))


def test_gzip_bombs_of_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("guywire.lab.streams.lines._SMALL", 1 << 20)
    line, lines = tmp_path / "line.txt.gz", tmp_path / "lines.txt.gz"
    line.write_bytes(gzip.compress(b"x" * (20 << 20), 1))
    lines.write_bytes(gzip.compress(b"x y\n" * (1 << 20)))
    with pytest.raises(DataError, match="a line of more than 16 MiB"):
        list(text_lines(line))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_texts(lines)


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, '{"text": 1}}', "\x00"])
def test_lines_of_json_that_are_none(tmp_path, line):
    from guywire.lab.studies.fisher_sequential_transfer.text_pairs import read_pairs

    file = tmp_path / "x.jsonl"
    file.write_text(line + "\n")
    for read in (read_texts, read_pairs, merging.calibration):
        with pytest.raises(DataError):
            read(file)


def test_damaged_deflate_is_no_traceback(tmp_path):
    file = tmp_path / "x.jsonl.gz"
    data = bytearray(gzip.compress(b'{"text": "a b c d"}\n' * 50))
    data[12] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(file)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", fuzz_data._TOML, ids=range(len(fuzz_data._TOML)))
@pytest.mark.timeout(10)  # a key of 20,000 parts took 6 s and gigabytes
def test_settings_end_in_a_sentence(tmp_path, text):
    file = tmp_path / "x.toml"
    file.write_bytes(text)
    try:
        parse(CompareConfig, read_toml(file))
    except GuywireError as error:
        assert len(str(error)) < 20_000  # noqa: PT017


def test_settings_are_no_endless_file():
    with pytest.raises(DataError, match="too large"):
        read_toml("/dev/zero")


@quick
@given(tree=st.dictionaries(st.sampled_from(list(CompareConfig.model_fields)), values))
def test_no_settings_are_a_traceback(tree):
    with contextlib.suppress(UsageError):
        parse(CompareConfig, tree)


def test_an_option_with_a_value_has_no_options(capsys):
    assert run(["compare", "--option", "ewc.x=1", "--option", "ewc.x.y=2"]) == 2
    assert "has a value already" in capsys.readouterr().err


def test_names_that_are_no_unicode_go_into_json(tmp_path):
    writing.write_json(tmp_path / "x.json", {"name": "\udcff"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"name": "\udcff"}
    with pytest.raises(CheckpointError, match="no Unicode"):
        writing.write_text(tmp_path / "x.txt", "\udcff")
