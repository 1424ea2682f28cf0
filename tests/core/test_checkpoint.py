from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from guywire.core import checkpoint
from guywire.core.errors import CheckpointError


def same(a: Any, b: Any) -> bool:
    """Equality that tells list from tuple, int from bool from float, and counts NaN as itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and bool(
                torch.equal(
                    a.contiguous().flatten().view(torch.uint8), b.flatten().view(torch.uint8)
                )
            )
            if a.numel()
            else a.shape == b.shape
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    return a == b


tensors = st.builds(
    lambda dtype, shape, seed: (
        torch.randint(
            0, 255, (*shape, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        ).view(dtype)
        if dtype != torch.bool
        else torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).bool()
    ),
    st.sampled_from(
        [
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.uint8,
            torch.bool,
        ]
    ),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 1000),
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | tensors
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.integers()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tree: Any
) -> None:
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    checkpoint.save(path, tree)
    assert same(checkpoint.load(path), tree)
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_awkward_tensors_come_back(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "zero_d": torch.tensor(3.5, dtype=torch.bfloat16),
        "strided": base.t()[1:3],
        "expanded": torch.ones(1).expand(3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "conj": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "empty": torch.zeros(0, 4),
        "__metadata__": torch.ones(2),
    }
    path = tmp_path / "awkward.safetensors"
    checkpoint.save(path, tree)
    back = checkpoint.load(path)
    for name, value in tree.items():
        assert torch.equal(back[name], value.detach().resolve_conj()), name
        assert back[name].dtype == value.dtype
    assert not back["parameter"].requires_grad
    torch.Generator().set_state(back["generator"])


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(1000)
    path = tmp_path / "tied.safetensors"
    checkpoint.save(path, {"a": weight, "b": [weight, weight[:500]]})
    assert path.stat().st_size < 4 * 1000 + 4 * 500 + 2000
    back = checkpoint.load(path)
    assert back["a"] is back["b"][0]
    assert torch.equal(back["b"][1], weight[:500])


def test_an_optimiser_state_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "o.safetensors", optimizer.state_dict())
    assert same(checkpoint.load(tmp_path / "o.safetensors"), optimizer.state_dict())


def test_other_tools_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    checkpoint.save(
        path, {"model": {"w": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16)}}
    )
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["model/b", "model/w"]
        assert torch.equal(file.get_tensor("model/w"), torch.arange(3))


def test_every_single_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    tree = {"w": torch.arange(4, dtype=torch.int16), "n": [1, None]}
    checkpoint.save(path, tree)
    whole = path.read_bytes()
    padding = 0
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 0x11
        path.write_bytes(bytes(broken))
        with contextlib.suppress(CheckpointError):
            assert same(checkpoint.load(path), tree)  # only a space of the padding gets here
            padding += 1
    assert padding < 8


@given(cut=st.integers(0, 1000))
def test_every_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "s.safetensors"
    checkpoint.save(path, {"w": torch.arange(64)})
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(CheckpointError, match=r"s\.safetensors"):
        checkpoint.load(path)


def test_more_bytes_than_due_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    checkpoint.save(path, {"w": torch.arange(64)})
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04pickle" + b"x" * 40, b"{" * 100])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.bin"):
        checkpoint.load(path)


def test_someone_elses_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not written by guywire"):
        checkpoint.load(path)


def test_a_lying_header_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "liar.safetensors"
    huge = 1 << 50
    table = {"w": {"dtype": "U8", "shape": [huge], "data_offsets": [0, huge]}}
    structure = '{"tensor":"w"}'
    metadata = {
        "format": "guywire-1",
        "tree": structure,
        "structure_sha256": checkpoint._digest_of_structure(table, structure),
        "payload_sha256": "",
    }
    header = json.dumps({"__metadata__": metadata, **table}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="header is not whole"):
        checkpoint.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"b": object()}}, "a/b is a object"),
        ({"a": {2.5: 1}}, "2.5"),
        ([torch.ones(2).to_sparse()], "dense"),
        ([torch.ones(2, device="meta")], "meta"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place(tmp_path: Path, tree: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        checkpoint.save(tmp_path / "x.safetensors", tree)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.safetensors"
    checkpoint.save(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"s\.safetensors: No space left on device"):
        checkpoint.save(path, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert checkpoint.load(path) == {"step": 1}


def test_a_really_full_disk_is_one_sentence(tmp_path: Path) -> None:
    # The limit on a file's size makes the kernel itself refuse, in the middle of the tensors.
    path = tmp_path / "big.safetensors"
    script = (
        "import resource, signal, sys, torch\n"
        "from guywire.core import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    checkpoint.save(sys.argv[1], {'w': torch.zeros(1 << 18)})\n"
        "except checkpoint.CheckpointError as error:\n"
        "    print(error)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert "big.safetensors: File too large" in done.stdout
    assert not list(tmp_path.iterdir())
