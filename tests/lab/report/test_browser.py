"""The report in a real headless Chromium: quiet, offline, in its frame, and accessible."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from guywire.lab.report import render

pytestmark = pytest.mark.browser

WIDTHS = (375, 1280)
AXE = """
const done = arguments[1];
axe.run(document, {resultTypes: ["violations"], ...arguments[0]}).then(
  (found) => done(found.violations.map((v) => ({
    id: v.id, impact: v.impact, help: v.help, nodes: v.nodes.map((n) => n.html.slice(0, 160)),
  }))),
  (error) => done([{id: "axe", impact: "critical", help: String(error), nodes: []}]),
);
"""


def open_page(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    command = browser.execute_cdp_cmd
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    command("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    command("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, request: Any) -> Any:
    """The reports that every check is done on."""
    write = request.getfixturevalue("write")
    folder = tmp_path_factory.mktemp("more")
    long = "a class with quite-a-long-name/that_has_no_good_place_to_break_in_it_at_all"
    texts = write(folder / "texts", seeds=2, tasks=3, text=True, class_names=[f"{long} {k}" for k in range(6)])  # fmt: skip
    few = {"ewc": (0.3, 0.4, 0.9, 5.0, 0.8), "replay": (0.5, 0.8, 0.9, 8.0, 0.1)}
    many = write(folder / "many", behaviour=few, seeds=2, tasks=12)
    (many / "sweep.json").write_text(json.dumps(request.getfixturevalue("swept")))
    odd = {
        "ewc+replay+feature-distillation-with-a-long-name-of-one-word": (
            0.5,
            0.6,
            0.9,
            3.0,
            1234.5,
        ),
        "<b>bold</b>": (0.1, 0.2, 0.9, 3.0, 0.001),
    }
    strange = write(folder / "odd", behaviour=odd, seeds=3, tasks=3, status="failed")
    next(strange.glob("trials/ewc*-seed1/result.json")).unlink()
    return {
        "finished": finished_run / "report.html",
        "texts": render(texts),
        "many": render(many),
        "odd": render(strange),
    }


NAMES = ("finished", "texts", "many", "odd")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_quiet_offline_and_within_the_frame(
    browser: Any, pages: Any, name: str, width: int
) -> None:
    open_page(browser, pages[name], width)
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    }
    assert pages[name].as_uri() in urls
    # Chromium loads pages of its own (chrome://...) when it starts: they are not the report's.
    assert {u.split(":")[0] for u in urls} <= {"file", "data", "chrome"}
    assert {u for u in urls if u.startswith("file:")} == {pages[name].as_uri()}
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    outside = browser.execute_script(
        """
        const out = [];
        for (const e of document.querySelectorAll("body *")) {
          if (e.closest(".scroll, pre, .skip, .sr, .chips input, svg")) continue;
          const box = e.getBoundingClientRect();
          if (box.width && (box.right > innerWidth + 0.5 || box.left < -0.5)) out.push(e.outerHTML.slice(0, 120));
        }
        return out;
        """
    )
    assert outside == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn(browser: Any, pages: Any, width: int) -> None:
    open_page(browser, pages["finished"], width)
    boxes = browser.execute_script(
        """
        return [...document.querySelectorAll("svg.plot")].map((svg) => ({
          plane: svg.classList.contains("plane"),
          shown: svg.checkVisibility(),
          width: svg.getBoundingClientRect().width,
          height: svg.getBoundingClientRect().height,
          inked: [...svg.querySelectorAll("path.main, .mark > *")].filter(
            (m) => m.getBoundingClientRect().height > 0).length,
          small: Math.min(...[...svg.querySelectorAll("text")].filter((t) => t.getBoundingClientRect().width)
            .map((t) => parseFloat(getComputedStyle(t).fontSize) * svg.getScreenCTM().a)),
        }));
        """
    )
    shown = [b for b in boxes if b["shown"]]
    assert [b["plane"] for b in shown].count(True) == 1
    assert len(shown) == 8  # the plane and one panel a method
    assert min(min(b["width"], b["height"]) for b in shown) > 150
    assert [b["inked"] for b in shown] == [6, *[1] * 7]
    assert min(b["small"] for b in shown) >= 10.0
    cells = browser.execute_script("return document.querySelectorAll('.heat td[class^=h]').length")
    assert cells == 7 * 15
    pictures = browser.execute_script(
        "return [...document.images].map((i) => i.complete && i.naturalWidth > 0 && i.alt !== '')"
    )
    assert pictures == [True] * 5


@pytest.mark.parametrize("width", WIDTHS)
def test_three_digits_fit_in_a_cell_of_a_matrix(browser: Any, pages: Any, width: int) -> None:
    open_page(browser, pages["finished"], width)
    heights = browser.execute_script(
        """
        const cells = [...document.querySelectorAll(".heat td[class^=h]")];
        const before = Math.max(...cells.map((c) => c.getBoundingClientRect().height));
        cells.forEach((c) => (c.textContent = "100"));
        return [before, ...cells.map((c) => c.getBoundingClientRect().height)];
        """
    )
    assert max(heights) <= heights[0] + 0.5
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.heat td')].map((c) => c.scrollWidth - c.clientWidth)"
    )
    assert max(wide) <= 0


def test_the_readmes_picture_is_taken(browser: Any, pages: Any, tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "docs" / "screenshot.py"
    spec = importlib.util.spec_from_file_location("screenshot", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with Image.open(module.render_screenshot(pages["finished"], tmp_path / "a.png", 900)) as shot:
        assert shot.width == 900
        assert 1000 < shot.height < 2600
        assert len(shot.convert("RGB").getcolors(1 << 24)) > 50
    assert (tmp_path / "a.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("finished", 375, "light"),
        ("finished", 1280, "light"),
        ("finished", 1280, "dark"),
        ("texts", 375, "dark"),
        ("many", 375, "light"),
        ("odd", 375, "light"),
        ("odd", 1280, "dark"),
    ],
)
def test_accessible(
    browser: Any, pages: Any, axe_source: str, name: str, width: int, scheme: str
) -> None:
    open_page(browser, pages[name], width, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    browser.execute_script(axe_source)
    browser.set_script_timeout(120)
    found = browser.execute_async_script(AXE, {})
    assert [v for v in found if v["impact"] in {"serious", "critical"}] == []


def test_axe_would_find_a_fault(browser: Any, pages: Any, axe_source: str) -> None:
    open_page(browser, pages["finished"], 1280)
    browser.execute_script("document.querySelector('img').removeAttribute('alt')")
    browser.execute_script(axe_source)
    only = {"runOnly": ["image-alt"]}
    assert "image-alt" in {v["id"] for v in browser.execute_async_script(AXE, only)}


def test_sorting_by_keyboard(browser: Any, pages: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, pages["finished"], 1280)
    table = browser.find_element("css selector", "table.sortable")
    heads = table.find_elements("css selector", "thead th")
    heads[2].find_element("tag name", "button").send_keys(Keys.ENTER)

    def column() -> list[float]:
        cells = table.find_elements("css selector", "tbody tr > :nth-child(3)")
        return [float(c.get_attribute("data-sort")) for c in cells]

    assert heads[2].get_attribute("aria-sort") == "descending"
    assert column() == sorted(column(), reverse=True)
    heads[2].find_element("tag name", "button").send_keys(Keys.SPACE)
    assert heads[2].get_attribute("aria-sort") == "ascending"
    assert column() == sorted(column())


def test_another_task_is_chosen_by_keyboard(browser: Any, pages: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, pages["finished"], 1280)
    visible = """
        return [...document.querySelectorAll(".curves .k")].filter(
          (g) => getComputedStyle(g).display !== "none").map((g) => g.getAttribute("class"))
    """
    assert set(browser.execute_script(visible)) == {"k k0"}
    browser.find_element("id", "curve-0").send_keys(Keys.ARROW_RIGHT)
    assert set(browser.execute_script(visible)) == {"k k1"}


def test_no_keyboard_trap_and_a_way_past_the_header(browser: Any, pages: Any) -> None:
    open_page(browser, pages["finished"], 1280)
    from selenium.webdriver.common.keys import Keys

    browser.find_element("tag name", "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    seen = set()
    for _ in range(150):
        active = browser.switch_to.active_element
        seen.add(active.get_attribute("outerHTML")[:120])
        if active.tag_name == "body" and len(seen) > 5:
            break
        active.send_keys(Keys.TAB)
    assert sum("<summary" in s for s in seen) >= 1
    assert sum('role="region"' in s for s in seen) >= 5
    assert any("Copy" in s for s in seen)


@pytest.fixture(scope="module")
def write() -> Callable[..., Path]:
    """The writer of simulated runs, for folders that live as long as this module."""
    spec = importlib.util.spec_from_file_location(
        "report_runs", Path(__file__).with_name("conftest.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_run
