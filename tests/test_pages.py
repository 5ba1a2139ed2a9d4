"""The pages of committed results in a browser: they draw, ask for nothing, complain of nothing.

Each is wider than a telephone only within boxes that scroll, and readable on dark and on light.
"""

import json
import re
import shutil
import subprocess

import pytest

from fusedformer.benchmarks import bench_page, profile_page, readme

pytest.importorskip("matplotlib")

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here"),
]

# Runs in the page, after it is laid out; the answer is put where --dump-dom shows it.
LOOK = """
<script>
addEventListener("load", () => {
  const inks = [...document.querySelectorAll("p, td, th, h1, h2, svg text")].map((part) => {
    const style = getComputedStyle(part);
    return part instanceof SVGElement ? style.fill : style.color;
  });
  const found = {
    wide: document.documentElement.scrollWidth,
    asked: performance.getEntriesByType("resource").length,
    charts: [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width),
    paper: getComputedStyle(document.body).backgroundColor,
    inks: [...new Set(inks)],
  };
  document.title = JSON.stringify(found);
});
</script>
"""


def result(name):
    return json.loads((readme.RESULTS / f"{name}.json").read_text())


PAGES = {
    "bench": lambda: bench_page.html(result("cpu")),
    "profile attention": lambda: profile_page.html(result("profile-cpu")),
}


def look(html, folder, width, dark):
    """What the page says of itself, and what the browser said on its console."""
    path = folder / "page.html"
    path.write_text(html.replace("</head>", LOOK + "</head>", 1))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        f"--user-data-dir={folder / 'browser'}", "--enable-logging=stderr", "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"file://{path}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert said, done.stdout[:500]
    return json.loads(said[1]), re.findall(r".*CONSOLE.*", done.stderr)


def brightness(colour):
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(1300, False), (500, True)])
def test_in_a_browser(page, width, dark, tmp_path):
    found, console = look(PAGES[page](), tmp_path, width, dark)
    assert console == []
    assert found["asked"] == 0
    assert found["charts"]
    assert min(found["charts"]) > 200
    assert found["wide"] <= width
    assert (brightness(found["paper"]) < 0.5) == dark
    for ink in found["inks"]:
        assert abs(brightness(ink) - brightness(found["paper"])) > 0.25, ink


def test_a_page_that_is_wrong_is_seen(tmp_path):
    html = PAGES["bench"]()
    wide = "<p style='width:900px'>x</p><script>console.error('no')</script><img src=http://127.0.0.1:9/x.png></body>"
    found, console = look(html.replace("</body>", wide, 1), tmp_path, 500, dark=False)
    assert any("no" in line for line in console)
    assert found["wide"] > 500
    assert found["asked"] == 1  # of this machine, where nobody answers
