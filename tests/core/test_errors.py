"""Errors, and the one for a missing extra."""

from __future__ import annotations

import sys

import pytest

from guywire.core import errors


def test_kinds():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type):
            assert issubclass(kind, errors.GuywireError)
            assert issubclass(kind, ValueError)
    assert issubclass(errors.SelectionError, errors.UsageError)
    assert issubclass(errors.MissingExtraError, ImportError)


def test_need_imports():
    assert errors.need("json.decoder", extra="x") is sys.modules["json.decoder"]


def test_need_names_package_and_extra():
    with pytest.raises(
        errors.MissingExtraError, match=r"'no_such_thing'.*pip install 'guywire\[hf\]'"
    ):
        errors.need("no_such_thing.inside", extra="hf")


def test_need_passes_on_what_is_broken_inside(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all") as caught:
        errors.need("half_there", extra="hf")
    assert not isinstance(caught.value, errors.MissingExtraError)
