"""Take the README's picture of a report: the top of the page in headless Chromium, few colours.

python docs/screenshot.py runs/NAME/report.html docs/_static/report.png
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)

END_OF_PLANE = """
const end = document.querySelector("#plane figcaption") || document.body;
return Math.ceil(end.getBoundingClientRect().bottom + scrollY + 24);
"""


def render_screenshot(report: Path, png: Path, width: int = 1280, height: int = 0) -> Path:
    """Draw the top of a page and write it as a PNG.

    Args:
        report: the HTML file.
        png: where the picture goes.
        width: of the window, in pixels.
        height: how much of the page, in pixels; 0 ends below the figure of the section "plane".

    Returns:
        The picture's path.

    Raises:
        SystemExit: Chromium, its driver or the report is missing.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise SystemExit("chromium and chromedriver are needed: apt install chromium-driver")
    if not report.is_file():
        raise SystemExit(f"there is no report {report}: run `guywire compare` first")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            command = browser.execute_cdp_cmd
            size = {
                "width": width,
                "height": height or 900,
                "deviceScaleFactor": 1,
                "mobile": False,
            }
            command("Emulation.setDeviceMetricsOverride", size)
            light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
            command("Emulation.setEmulatedMedia", light)
            browser.get(report.resolve().as_uri())
            if not height:
                height = browser.execute_script(END_OF_PLANE)
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            shot = command("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        finally:
            browser.quit()
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    png.parent.mkdir(parents=True, exist_ok=True)
    picture.save(png, optimize=True)
    return png


def main(words: list[str]) -> None:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--png", type=Path, default=Path(__file__).parent / "_static/report.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0)
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        report = given.report
        if report is None:
            run = Path(folder) / "run"
            command = [sys.executable, "-m", "guywire.cli", "compare", "--out", str(run)]
            subprocess.run(command, check=True)
            report = run / "report.html"
        path = render_screenshot(report, given.png, given.width, given.height)
    print(f"{path.name}: {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
