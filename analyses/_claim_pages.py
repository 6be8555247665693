"""Pages of claims: one of each, and an index that shows them all."""

import html
import io
import re
from collections.abc import Mapping, Sequence

import numpy as np

import bayestie as bt
from analyses._claims import Claim, Plot
from analyses._command import Options


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
    options.out.write_text(claim_page(claim, links), encoding="utf-8")
    print(f"Report: {options.out}")
    return claim


def claim_page(claim: Claim, links: Sequence[str]) -> str:
    """The page of one claim; `links` are the reports of its sweeps beside it."""
    more = "".join(f'<p>The sweep: <a href="{html.escape(x)}">{html.escape(x)}</a></p>' for x in links)
    title = html.escape(claim.row)
    statement = f"<p>{html.escape(claim.statement)}</p>"
    body = f"<h1>{title}</h1>{statement}{_table(claim)}{_svg(claim.plot, 'plot')}{more}"
    return _PAGE.format(title=title, width=60, style=_STYLE, body=body)


def index_page(claims: Mapping[str, Claim]) -> str:
    """Every claim with its numbers and its plot, in the order of the rows.

    Args:
        claims: by the name of the analysis, whose page `{name}.html` lies beside the index.
    """
    ordered = sorted(claims.items(), key=lambda item: _rows(item[1])[0])
    findings = [finding for claim in claims.values() for finding in claim.findings]
    failing = sum(not finding.holds for finding in findings)
    summary = f"{len(findings) - failing} of {len(findings)} findings hold"
    if failing:
        summary += f", <b>{failing} fail{'s' if failing == 1 else ''}</b>"
    links = {
        row: f'<a href="#{row}"{"" if claim.holds else _FAILS}>{row}</a>'
        for _, claim in ordered
        for row in claim.row.split(", ")
    }
    rows = sorted(links, key=_number_of_row)
    body = (
        f"<h1>Claims: expected and found</h1><p>{summary}. A number may be four of its standard errors (±) "
        f"off, and, where what is expected is a limit that is only neared, as much more as is said with it; "
        f"without either it is exact.</p>"
        f"<nav>{' '.join(links[row] for row in rows)}</nav>"
        + "".join(_section(name, claim) for name, claim in ordered)
    )
    return _PAGE.format(title="Claims", width=80, style=_STYLE, body=body)


def _section(name: str, claim: Claim) -> str:
    first, *others = claim.row.split(", ")
    anchors = "".join(f'<span id="{html.escape(row)}"></span>' for row in others)
    return (
        f'<section id="{html.escape(first)}">{anchors}<h2>{html.escape(claim.row)} '
        f'<a href="{html.escape(name)}.html">{html.escape(name.replace("_", " "))}</a></h2>'
        f"<p>{html.escape(claim.statement)}</p>"
        f'<div class="both"><div>{_table(claim)}</div><figure>{_svg(claim.plot, name)}</figure></div>'
        "</section>"
    )


def _number_of_row(row: str) -> tuple[bool, int, str]:
    """Sorts C2 before C10, and what has no number behind."""
    digits = row.removeprefix("C")
    return (False, int(digits), "") if digits.isdigit() else (True, 0, row)


def _rows(claim: Claim) -> list[tuple[bool, int, str]]:
    return sorted(_number_of_row(row) for row in claim.row.split(", "))


def _table(claim: Claim) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(f.what)}</td><td>{html.escape(f.wanted)}</td><td>{html.escape(f.seen)}</td>"
        f"<td{'' if f.holds else _FAILS}>{'holds' if f.holds else 'fails'}</td></tr>"
        for f in claim.findings
    )
    head = "<tr><th>quantity</th><th>expected</th><th>found</th><th></th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _svg(plot: Plot, name: str) -> str:
    # Matplotlib's own canvas, so that nothing global (backend, open figures) is touched.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
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
    axes.legend(fontsize="small")
    out = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    # Every figure calls its parts figure_1, axes_1, ...: on one page they need names of their own.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    label = html.escape(f"{plot.y_label} against {plot.x_label}")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


_FAILS = ' class="fails"'

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; }
tr { border-bottom: 1px solid #ddd; }
td:nth-child(n+2) { white-space: nowrap; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; }
nav a { display: inline-block; padding: .1rem .5rem; border: 1px solid #bbb; border-radius: .3rem; }
.fails { font-weight: bold; color: #b00020; }
section { border-top: 2px solid #ddd; margin-top: 2rem; scroll-margin-top: 1rem; }
h2 { margin-bottom: 0; } h2 a { font-weight: normal; font-size: 1rem; margin-left: .5rem; }
.both { display: grid; grid-template-columns: 3fr 2fr; gap: 1.5rem; align-items: start; }
.both > * { min-width: 0; } figure { margin: 0; }
@media (max-width: 60rem) { .both { grid-template-columns: 1fr; } }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}body {{ max-width: {width}rem; }}</style></head><body>
{body}
</body></html>
"""
