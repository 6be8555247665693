"""Pages looked at in headless Chromium: what its console says, what is missing, what does not fit."""

import json
import os
import re
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--enable-logging=stderr",
    "--log-level=0",
    "--virtual-time-budget=4000",
)
# Runs first: what fails to load raises an event and no message on the console.
_WATCH = """
<script>
window.addEventListener("error", function (event) {
  if (event.target !== window) console.error("did not load: " + event.target.outerHTML);
}, true);
</script>
"""
# Runs last in the page under test and tells on the console what a reader would meet.
_AUDIT = """
<script>
window.addEventListener("load", function () {
  const seen = {};
  for (const section of document.querySelectorAll("main > section")) {
    const drawings = Array.from(section.querySelectorAll("svg")).filter(
      function (svg) { return svg.getBoundingClientRect().height > 40; });
    seen[section.id] = { height: section.getBoundingClientRect().height, drawings: drawings.length };
  }
  const panels = function () {
    const all = Array.from(document.querySelectorAll(".panel"));
    return all.filter(function (panel) { return panel.getBoundingClientRect().height > 0; })
      .map(function (panel) { return panel.id; });
  };
  const rules = function () {
    const all = Array.from(document.querySelectorAll("line.rule"));
    return all.map(function (line) { return line.getAttribute("x1"); });
  };
  const first = { panels: panels(), rules: rules() };
  const picks = document.querySelectorAll('input[name="strength"]');
  if (picks.length > 1) picks[1].click();
  const second = { panels: panels(), rules: rules() };
  const next = document.querySelector(".picks button:last-child");
  if (next) next.click();
  console.log("AUDIT " + JSON.stringify({
    sections: seen, first: first, second: second, third: { panels: panels() },
    width: window.innerWidth, needed: document.documentElement.scrollWidth,
  }));
});
</script>
"""


def chromium():
    """Path of the browser; its absence is a failure, because nothing else sees the page as readers do."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail("no Chromium found: install it with `sudo apt-get install -y chromium`", pytrace=False)
    return found


def look(page, folder, *, width, height=1200):
    """Open a page's text at a given width; returns (console lines, audit record, screenshot path)."""
    # A frame, because the browser's own window is never narrower than 500 pixels.
    watched = page.replace("<head>", "<head>" + _WATCH).replace("</body>", _AUDIT + "</body>")
    (folder / "page.html").write_text(watched, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="page.html" width="{width}" height="{height}" '
        'style="border:0;display:block"></iframe></body>'
    )
    shot = folder / f"shot-{width}.png"
    done = subprocess.run(
        [
            chromium(),
            *_FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, 500)},{height}",
            f"--screenshot={shot}",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(folder)},
        check=False,
    )
    console = re.findall(r'CONSOLE[^\]]*\] "(.*)", source: ', done.stderr)
    audits = [json.loads(line.removeprefix("AUDIT ")) for line in console if line.startswith("AUDIT ")]
    others = [line for line in console if not line.startswith("AUDIT ")]
    assert shot.exists(), done.stderr[-2000:]
    return others, (audits[0] if audits else None), shot


def faults(page, folder, *, width, sections):
    """What is wrong with a page, in words; `sections` maps the ids it must show to their drawings."""
    console, audit, _ = look(page, folder, width=width)
    found = [f"console: {line}" for line in console]
    if audit is None:
        return [*found, "the page did not finish loading"]
    for name, drawings in sections.items():
        seen = audit["sections"].get(name)
        if seen is None or seen["height"] < 20:
            found.append(f"section {name} is missing")
        elif seen["drawings"] != drawings:
            found.append(f"section {name} shows {seen['drawings']} drawings instead of {drawings}")
    if audit["needed"] > audit["width"]:
        found.append(f"the page is {audit['needed']} pixels wide in a window of {audit['width']}")
    return found
