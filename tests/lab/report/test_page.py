from __future__ import annotations

import re
from pathlib import Path

import pytest
from markupsafe import Markup

from guywire.core.errors import CheckpointError
from guywire.lab.report.page import (
    Cell,
    Code,
    Column,
    Figure,
    Notice,
    Page,
    Picture,
    Pictures,
    Prose,
    Section,
    Table,
    data_uri,
    render_page,
    write_page,
)

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} </style>"


def nasty_page() -> Page:
    table = Table(
        NASTY, (Column(NASTY, hint=NASTY), Column(NASTY, True)), ((Cell(NASTY, NASTY), Cell(NASTY)),),
        sortable=True, note=NASTY,
    )  # fmt: skip
    return Page(
        title=NASTY,
        kicker=NASTY,
        headline=NASTY,
        remarks=(NASTY,),
        facts=((NASTY, NASTY),),
        notices=(Notice(NASTY, (NASTY,)),),
        sections=(
            Section(
                "one",
                NASTY,
                (
                    table,
                    Prose(NASTY),
                    Code(NASTY, NASTY),
                    Code(NASTY, NASTY, folded=True),
                    Figure(NASTY, Markup("<p>mine</p>"), NASTY, table),
                    Pictures((Picture(NASTY, NASTY, data_uri(b"x"), NASTY, ((NASTY, NASTY),)),)),
                ),
                NASTY,
            ),
            Section("two", "Two", ()),
        ),
        footer=NASTY,
        back=(NASTY, "index.html"),
    )


def test_all_text_is_escaped_and_nothing_is_evaluated() -> None:
    html = render_page(nasty_page())
    outside = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, count=2, flags=re.S)
    assert "<script" not in outside
    assert "<img src=x" not in outside
    assert "{{ 7 * 7 }}" in outside
    assert "49" not in outside
    assert outside.count("&lt;script&gt;") >= 25
    assert "<p>mine</p>" in outside


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    html = render_page(nasty_page())
    assert not re.search(r"""(?:src|href)=["'](?!data:|#|index\.html)""", html)
    assert "@import" not in html
    assert "url(" not in html
    assert "http" not in html.replace("http-equiv", "")


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(Page("first"), tmp_path / "report.html")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"report\.html"):
        write_page(Page("second"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
