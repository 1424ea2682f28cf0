from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from guywire.core.errors import DataError
from guywire.lab.report import gallery
from guywire.lab.report.figures.measures import Measure, Track, dots, scatter, tracks
from guywire.lab.report.measured import marks_of
from guywire.lab.report.palette import LIGHT
from guywire.lab.studies.runner import run_study

COIN = str(Path(__file__).parents[1] / "studies/falling_coin.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results at full size, in smoke size, and with a setting replaced."""
    base = tmp_path_factory.mktemp("gallery")
    for arguments in (
        {},
        {"smoke": True},
        {"overrides": {"optimum": 9.0, "name": "<b>me</b> & 'you'"}},
    ):
        run_study(COIN, base / "out", cache=base / "cache", workers=1, **arguments)
    gallery.write(base / "out")
    return base / "out"


def test_the_index_shows_every_verdict_with_its_page(folder: Path, tables_of: Any) -> None:
    html = (folder / "index.html").read_text()
    rows = tables_of(html)["Every claim and what the numbers allow"]
    assert len(rows) == 3  # the head, full size, custom: smoke size has nothing to add
    assert "✓ reproduced" in rows[1][1]
    assert "? inconclusive" in rows[2][1]
    assert "Of 2 claims 1 came out, 1 stayed open." in html
    for name in re.findall(r'href="([^"#:]+\.html)"', html):
        assert (folder / name).is_file()


def test_a_page_has_the_claim_its_rule_and_the_numbers(folder: Path, tables_of: Any) -> None:
    html = (folder / "falling-coin.html").read_text()
    tables = tables_of(html)
    assert '<h2 id="claim-1-title">a (✓ reproduced)</h2>' in html
    assert "The paper says: Held coins fall further." in html
    assert "Rule: by 0.5" in html
    assert "The numbers allow: Held coins fall 1.000 [1.000, 1.000] further." in html
    (difference,) = tables["Differences that the rules asked for, paired over seeds"][1:]
    assert difference[:3] == ["plain − held", "test", "1|1 to 1"]
    assert [row[0] for row in tables["test"][1:]] == ["plain", "held"]
    assert html.count("<figure>") == 3  # what was never measured is not drawn
    assert f"guywire study {COIN} --seeds 3" in html  # a file of ours is called by its path


def test_replaced_settings_are_told_and_escaped(folder: Path) -> None:
    html = (folder / "falling-coin-custom.html").read_text()
    assert "Some settings are not those of the study" in html
    assert "<b>me" not in html
    assert "Still at the edge of their grids" in html
    assert "http" not in html.replace("http-equiv", "")


def test_smoke_alone_says_so(tmp_path: Path) -> None:
    run_study(COIN, tmp_path / "out", cache=tmp_path / "cache", workers=1, smoke=True)
    html = gallery.write(tmp_path / "out").read_text()
    assert "Smoke size: everything ran, and nothing is claimed." in html
    assert "Only in smoke size" in html


def test_the_text_comes_from_the_files_alone(folder: Path, tmp_path: Path) -> None:
    result = json.loads((folder / "falling-coin/full/result.json").read_text())
    result["slug"], result["claims"][0]["allows"] = "elsewhere", "Numbers from another machine."
    (tmp_path / "elsewhere/full").mkdir(parents=True)
    (tmp_path / "elsewhere/full/result.json").write_text(json.dumps(result))
    gallery.write(tmp_path)
    assert "Numbers from another machine." in (tmp_path / "elsewhere.html").read_text()


def test_damaged_and_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no result below"):
        gallery.write(tmp_path)
    (tmp_path / "x/full").mkdir(parents=True)
    path = tmp_path / "x/full/result.json"
    path.write_text('{"format": 1, "si')
    with pytest.raises(DataError, match="is damaged"):
        gallery.write(tmp_path)
    path.write_text('{"format": 99, "size": "full"}')
    with pytest.raises(DataError, match="of another version"):
        gallery.write(tmp_path)


def test_marks_differ_within_a_plot_and_stay_between_plots() -> None:
    groups = [[f"{group}: {arm}" for arm in ("plain", "L2", "EWC", "new")] for group in "abcdef"]
    plots = [{"conditions": names} for names in [*groups, [groups[0][1], groups[1][1]]]]
    conditions = [*(name for names in groups for name in names), "never plotted"]
    marks = marks_of(plots, conditions)
    assert set(marks) == set(conditions)
    for names in groups:
        assert len({marks[name] for name in names}) == len(names)
        assert [marks[name] for name in names[:3]] == [marks[name] for name in groups[0][:3]]
    many = [str(i) for i in range(3 * len(LIGHT))]
    assert set(marks_of([], many).values()) == set(range(len(LIGHT)))


def test_dots_stand_where_their_numbers_say() -> None:
    markup = dots("nats", [Measure("a", 0, 1.0, 0.5, 1.5), Measure("b", 1, 3.0, None, None)])
    places = [float(p) for p in re.findall(r"left:calc\(([\d.]+)% - 5px\)", markup)]
    # the axis runs from 0.5 to 3, with 4 % of that on each side
    assert places == pytest.approx([100 * 0.6 / 2.7, 100 * 2.6 / 2.7], abs=0.01)
    assert "a 1.0 [0.5, 1.5]; b 3" in markup


def test_a_log_axis_leaves_out_what_it_cannot_show() -> None:
    line = Track("a", 0, [0, 1, 2], [0.0, 1.0, 100.0], [None, 0.5, 50.0], [None, 2.0, 200.0])
    markup = tracks([line], x_title="step", y_title="ratio", summary="s", log=True)
    assert "1e0" in markup
    assert "1e2" in markup
    assert "nan" not in markup.lower()


def test_one_value_everywhere_still_has_an_axis() -> None:
    same = Measure("a", 0, 2.0, 2.0, 2.0, (2.0, 2.0))
    markup = dots("m", [same, same]) + scatter(
        [(same, same)], x_title="x", y_title="y", summary="s"
    )
    markup += tracks(
        [Track("a", 0, [1], [2.0], [None], [None])], x_title="x", y_title="y", summary="s"
    )
    assert "nan" not in markup.lower()


@pytest.mark.browser
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("name", ["index", "falling-coin", "falling-coin-custom"])
def test_quiet_within_the_frame_and_accessible(
    browser: Any, axe_source: str, folder: Path, name: str, width: int
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.get_log("browser")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((folder / f"{name}.html").as_uri())
    assert browser.get_log("browser") == []
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shown = browser.execute_script(
        "return [...document.querySelectorAll('svg.plot')].filter((s) => s.checkVisibility()).length"
    )
    assert shown == (0 if name == "index" else 2)
    browser.execute_script(axe_source)
    browser.set_script_timeout(120)
    found = browser.execute_async_script(
        "axe.run().then((r) => arguments[0](r.violations.map((v) => [v.id, v.impact, v.nodes[0].html])))"
    )
    assert [v for v in found if v[1] in {"serious", "critical"}] == []
