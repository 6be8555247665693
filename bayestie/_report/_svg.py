"""Matplotlib figures as inline SVG: small, in the page's own colours and letters, ids that never clash."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from bayestie.plots import _style
from bayestie.plots._axis import STRENGTH_AXES

_VARIABLES = {
    _style.INK: "ink",
    _style.MUTED: "muted",
    _style.FAINT: "faint",
    _style.GRID: "grid",
    _style.ACCENT: "accent",
    _style.BAND_50: "band-50",
    _style.BAND_90: "band-90",
    _style.DATA: "data",
    _style.BAD: "bad",
    _style.PAPER: "paper",
}


@dataclass(frozen=True)
class Rule:
    """A vertical line that marks one strength in one panel: x per step, in the figure's own units."""

    xs: tuple[float, ...]
    top: float
    bottom: float


def inline_svg(
    figure: Figure,
    *,
    name: str,
    description: str,
    classes: str = "",
    steps: Sequence[float] = (),
    step: int = 0,
) -> Markup:
    """Render a figure as an ``<svg>`` element for an HTML page.

    Args:
        figure: drawn in the house style.
        name: unique on the page; every id inside is prefixed with it.
        description: what a reader who does not see it needs to know.
        classes: of the element.
        steps: positions on the strength axes that the reader can step to; each panel gets a rule there.
        step: the one shown first.
    """
    buffer = io.StringIO()
    with _style.house_style():
        figure.savefig(
            buffer,
            format="svg",
            facecolor="none",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    width, height = figure.get_size_inches() * 72
    body = text[text.index(">") + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", body))
    body = re.sub(r'\s*\bid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    # The page chooses the letters; matplotlib's own family need not be on the reader's machine.
    body = re.sub(r"font-family: [^;\"]*;\s*", "", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    body = _round_numbers(body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    rules = "".join(_rule_markup(rule, step) for rule in _rules(figure, steps))
    head = (
        f'<svg class="{escape(classes)}" viewBox="0 0 {width:.1f} {height:.1f}" role="img" '
        f'aria-label="{escape(description)}">'
    )
    return Markup(head + body + rules + "</svg>")  # matplotlib escapes the text it writes


def _round_numbers(body: str) -> str:
    """Hundredths of a point are enough: it halves the file."""

    def path(match: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), match[0])

    body = re.sub(r'\bd="[^"]*"', lambda m: path(m).replace(" \n", " ").replace("\n", " "), body)
    return re.sub(r'\b(?:x|y|transform|x1|x2|y1|y2|width|height)="[^"]*"', path, body)


def _rules(figure: Figure, steps: Sequence[float]) -> list[Rule]:
    found = []
    height = figure.get_size_inches()[1] * 72
    for axes in figure.axes if len(steps) else ():
        if axes.get_gid() != STRENGTH_AXES:
            continue
        box = axes.get_window_extent()
        points = axes.transData.transform([(x, 0.0) for x in steps]) * 72 / figure.dpi
        low, high = box.y0 * 72 / figure.dpi, box.y1 * 72 / figure.dpi
        found.append(Rule(tuple(round(float(x), 2) for x in points[:, 0]), height - high, height - low))
    return found


def _rule_markup(rule: Rule, step: int) -> str:
    xs = " ".join(f"{x:g}" for x in rule.xs)
    x = rule.xs[step]
    return (
        f'<line class="rule" data-x="{xs}" x1="{x:g}" x2="{x:g}" y1="{rule.top:.1f}" y2="{rule.bottom:.1f}"/>'
    )
