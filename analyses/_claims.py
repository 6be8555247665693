"""What analyses of a claim do alike: numbers expected and found with their errors, and a page of both."""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xarray as xr

import bayestie as bt
from analyses._command import Options


@dataclass(frozen=True)
class Finding:
    """A number that a claim predicts, and the number found.

    Args:
        what: the quantity, in words.
        expected: the number the claim predicts, or the bound that `kind` says.
        found: the number found.
        error: Monte Carlo standard error of what was found; 0 where it is exact.
        num_errors: how many of them it may be off.
        rounding: what an exact number may be off, in absolute terms.
        kind: whether `found` should equal `expected`, or lie below or above it.
    """

    what: str
    expected: float
    found: float
    error: float = 0.0
    num_errors: float = 4.0
    rounding: float = 1e-10
    kind: Literal["equal", "below", "above"] = "equal"

    @property
    def holds(self) -> bool:
        """Whether the number found is what the claim says; a bound must be cleared by the tolerance."""
        tolerance = self.num_errors * self.error
        if self.kind == "equal":
            return bool(abs(self.found - self.expected) <= tolerance + self.rounding)
        gap = self.found - self.expected if self.kind == "above" else self.expected - self.found
        return bool(gap > tolerance)

    @property
    def wanted(self) -> str:
        """The expected number in words."""
        sign = {"equal": "", "below": "< ", "above": "> "}[self.kind]
        return f"{sign}{_number(self.expected)}"

    @property
    def seen(self) -> str:
        """The number found with its error in words."""
        return f"{_number(self.found)} ± {self.error:.2g}" if self.error else _number(self.found)


@dataclass(frozen=True)
class Curve:
    """A line of the plot, with the Monte Carlo error of each point where there is one."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    error: Sequence[float] | np.ndarray | None = None
    style: str = "-o"


@dataclass(frozen=True)
class Plot:
    """Curves over one axis."""

    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_scale: Literal["linear", "log", "symlog"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"


@dataclass(frozen=True)
class Claim:
    """Rows of the claims' table with what was found, as `main` of an analysis returns it."""

    row: str
    statement: str
    findings: Sequence[Finding]
    plot: Plot
    paths: Sequence[xr.DataTree] = field(default=())

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def __getitem__(self, what: str) -> Finding:
        """The finding whose words begin with `what`."""
        (found,) = [finding for finding in self.findings if finding.what.startswith(what)]
        return found


def conclude(claim: Claim, options: Options) -> Claim:
    """Print the findings, write their page, and beside it, in a full run, the report of each sweep."""
    print(f"{claim.row}: {claim.statement}")
    width = max(len(finding.what) for finding in claim.findings)
    for finding in claim.findings:
        mark = "holds" if finding.holds else "FAILS"
        print(f"  {finding.what:<{width}}  expected {finding.wanted}, found {finding.seen}: {mark}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    links = []
    for number, path in enumerate(() if options.smoke else claim.paths):
        ending = "_sweep" if len(claim.paths) == 1 else f"_sweep{number + 1}"
        report = options.out.with_stem(options.out.stem + ending)
        bt.report(path, report)
        links.append(report.name)
    options.out.write_text(_page(claim, links), encoding="utf-8")
    print(f"Report: {options.out}")
    return claim


def slope(x: np.ndarray, y: np.ndarray, error: np.ndarray | None = None) -> tuple[float, float]:
    """Least-squares slope of y on x, and its standard error given that of each y."""
    centred = x - x.mean()
    weight = centred / (centred**2).sum()
    return float(weight @ y), 0.0 if error is None else float(np.sqrt((weight**2) @ error**2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e13 else f"{value:.4g}"


def _page(claim: Claim, links: Sequence[str]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(f.what)}</td><td>{html.escape(f.wanted)}</td><td>{html.escape(f.seen)}</td>"
        f"<td>{'holds' if f.holds else '<b>fails</b>'}</td></tr>"
        for f in claim.findings
    )
    more = "".join(f'<p>The sweep: <a href="{html.escape(x)}">{html.escape(x)}</a></p>' for x in links)
    return _TEMPLATE.format(
        row=html.escape(claim.row),
        statement=html.escape(claim.statement),
        rows=rows,
        figure=_svg(claim.plot),
        more=more,
    )


def _svg(plot: Plot) -> str:
    # Matplotlib's own canvas, so that nothing global (backend, open figures) is touched.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for curve in plot.curves:
        axes.errorbar(curve.x, curve.y, yerr=curve.error, fmt=curve.style, label=curve.label, capsize=2, ms=4)
    if plot.x_scale == "symlog":
        positive = np.concatenate([np.asarray(c.x, dtype=float) for c in plot.curves])
        axes.set_xscale("symlog", linthresh=float(positive[positive > 0].min()))
    else:
        axes.set_xscale(plot.x_scale)
    axes.set_yscale(plot.y_scale)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.legend()
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{row}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ccc; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{row}</h1><p>{statement}</p>
<table><thead><tr><th>quantity</th><th>expected</th><th>found</th><th></th></tr></thead>
<tbody>{rows}</tbody></table>
{figure}
{more}
</body></html>
"""
