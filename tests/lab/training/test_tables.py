from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from guywire.core.errors import DataError, UsageError
from guywire.lab.training.tables import differences, merge, read_toml, to_toml


def test_later_layers_win_key_by_key() -> None:
    assert merge({"s": {"a": 1, "b": 2}, "x": 1}, {"s": {"b": 3}}, {"x": [1]}) == {
        "s": {"a": 1, "b": 3},
        "x": [1],
    }


tables = st.recursive(
    st.integers(0, 2), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=6
).filter(lambda t: isinstance(t, dict))


@given(tables, tables)
def test_tables_differ_where_a_key_says_so_and_nowhere_else(a: Any, b: Any) -> None:
    assert differences(a, a) == []
    assert (differences(a, b) == []) == (_bare(a) == _bare(b))
    assert differences(a, b) == differences(b, a)


def _bare(table: Any) -> Any:
    return {k: _bare(v) for k, v in table.items()} if isinstance(table, dict) else table


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config file .*nowhere\.toml"):
        read_toml(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = \n")
    with pytest.raises(DataError, match=r"broken\.toml is not TOML .*line 1"):
        read_toml(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"broken\.toml is not TOML"):
        read_toml(broken)
    with pytest.raises(UsageError, match="cannot read"):
        read_toml(tmp_path)


def test_what_is_none_is_left_out_at_any_depth() -> None:
    class Settings(BaseModel):
        name: str | None
        rows: list[dict[str, int | None]]
        table: dict[str, Any]

    settings = Settings(
        name=None, rows=[{"a": 1, "b": None}, {}], table={"c": {"d": None}, "e": ""}
    )
    assert tomllib.loads(to_toml(settings)) == {
        "rows": [{"a": 1}, {}],
        "table": {"c": {}, "e": ""},
    }
