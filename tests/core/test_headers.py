from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from guywire.core import headers

rows = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(headers.DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
    max_size=6,
).map(lambda table: [(name, dtype, tuple(shape)) for name, (dtype, shape) in table.items()])


@given(rows, st.none() | st.dictionaries(st.text("ab", max_size=2), st.text("ab"), max_size=2))
def test_the_safetensors_library_reads_what_is_laid_out(
    tmp_path_factory: pytest.TempPathFactory, found: list[Any], metadata: dict[str, str] | None
) -> None:
    table, size = headers.table_of(headers.wide_first(found))
    begin = headers.encode(table, metadata)
    path = tmp_path_factory.mktemp("laid") / "x.safetensors"
    path.write_bytes(begin + bytes(size))
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == (metadata or {})
        assert set(file.keys()) == {name for name, *_ in found}
        for name, dtype, shape in found:
            assert tuple(file.get_slice(name).get_shape()) == shape
            assert file.get_slice(name).get_dtype() == dtype


@given(rows)
def test_tensors_lie_one_after_another_each_at_a_multiple_of_its_element(found: list[Any]) -> None:
    order = headers.wide_first(found)
    assert sorted(order) == sorted(found)
    table, size = headers.table_of(order)
    begin = headers.encode(table)
    assert len(begin) % 8 == 0
    assert json.loads(begin[8:]) == table
    at = 0
    for name, dtype, shape in order:
        width = headers.DTYPES[dtype].itemsize
        start, end = table[name]["data_offsets"]
        assert start == at
        assert end - start == math.prod(shape) * width
        assert (len(begin) + start) % width == 0
        at = end
    assert at == size


def test_tensors_of_one_width_keep_their_order() -> None:
    found = [("b", "U8", ()), ("z", "F32", ()), ("a", "I8", ()), ("y", "I32", ())]
    assert [name for name, *_ in headers.wide_first(found)] == ["z", "y", "b", "a"]


def test_every_type_has_one_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert {headers.DTYPES[name] for name in headers.NAMES.values()} == set(headers.NAMES)
    assert len(headers.NAMES) == len(headers.DTYPES)
    save_file(
        {name: torch.zeros(1).to(dtype) for name, dtype in headers.DTYPES.items()},
        tmp_path / "all.safetensors",
    )
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_dtype() for name in headers.DTYPES} == {
            name: name for name in headers.DTYPES
        }
