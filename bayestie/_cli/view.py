"""What the command line shows: the answer, the table of strengths, parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import arviz_stats as azs
import rich.box
import xarray as xr
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bayestie._results import select, swept_names, tie_records

MAX_PARAMETERS = 40
# Vehtari et al. (2021): R-hat below 1.01 and ESS above 400; Vehtari et al. (2024): Pareto khat below 0.7.
MAX_RHAT, MIN_ESS, MAX_KHAT = 1.01, 400, 0.7


def _table(**options: Any) -> Table:
    return Table(
        box=rich.box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold", **options
    )


def strengths_table(tree: xr.DataTree) -> Table:
    """A row per swept point: what drew it, whether to trust it, and its scores. Fits 80 columns."""
    names = swept_names(tree)
    table = _table()
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for title in ("ok", "log evidence", "elpd (LOO)", "khat", "R-hat", "ESS", "div."):
        table.add_column(title, justify="right", no_wrap=True)
    for row in _points(tree):
        table.add_row(*(f"{float(row[name]):.4g}" for name in names), *_strength_cells(row))
    return table


def _points(tree: xr.DataTree) -> Iterator[xr.Dataset]:
    sweep = tree["sweep"].to_dataset()
    names = swept_names(tree)
    points = sweep.stack(point=names) if names else sweep.expand_dims("point")
    return (points.isel(point=i) for i in range(points.sizes["point"]))


def _strength_cells(row: xr.Dataset) -> list[Text]:
    def number(name: str) -> float:
        return float(row[name].item()) if name in row else math.nan

    engine, certified = str(row["engine"].item()), bool(row["certified"].item())
    khat, rhat, divergences = number("khat"), number("max_rhat"), number("divergences")
    ess = min(number("min_ess_bulk"), number("min_ess_tail"))
    return [
        Text(engine),
        Text("yes", style="green") if certified else Text("NO", style="bold red"),
        Text(_with_error(number("log_evidence"), number("log_evidence_error"))),
        Text(_with_error(number("elpd"), number("elpd_se"))),
        # Draws of NUTS owe nothing to the Laplace approximation that khat is about.
        Text("exact")
        if khat == -math.inf
        else _judged(khat, "{:.2f}", khat > MAX_KHAT and "nuts" not in engine),
        _judged(rhat, "{:.3f}", rhat > MAX_RHAT),
        _judged(ess, "{:.0f}", ess < MIN_ESS),
        _judged(divergences, "{:.0f}", divergences > 0),
    ]


def _judged(value: float, form: str, bad: bool) -> Text:
    text = form.format(value) if math.isfinite(value) else "-"
    return Text(text, style="bold red" if bad else "")


def _with_error(value: float, error: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f} ± {error:.2f}" if math.isfinite(error) and error >= 0.005 else f"{value:.2f}"


def reasons(tree: xr.DataTree) -> list[Text]:
    """A line per point that is not certified: why."""
    lines = []
    for row in _points(tree):
        if not bool(row["certified"].item()):
            at = ", ".join(f"{name}={float(row[name]):.4g}" for name in swept_names(tree)) or "this fit"
            lines.append(Text.assemble((f"{at}: not certified", "bold red"), f" - {row['reason'].item()}"))
    return lines


def num_uncertified(tree: xr.DataTree) -> int:
    return int((~tree["sweep"]["certified"].to_numpy().astype(bool)).sum())


def parameter_table(tree: xr.DataTree, at: Mapping[str, float] | None = None) -> Table:
    """Mean, sd, 90% interval and diagnostics of each parameter at one strength. Fits 80 columns."""
    one = select(tree, **at) if at else tree
    idle = {f"{site}_z" for site in tie_records(tree)}
    shown = [str(name) for name in one["posterior"].data_vars if name not in idle]
    summary: Any = azs.summary(one, var_names=shown, ci_prob=0.9, ci_kind="eti", round_to="none")
    title = ", ".join(f"{name} = {value:g}" for name, value in (at or {}).items())
    table = _table(title=title or None)
    table.add_column("parameter", overflow="fold", min_width=16)
    for column in ("mean", "sd", "5%", "95%", "ESS bulk", "ESS tail", "R-hat"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, row in summary.head(MAX_PARAMETERS).iterrows():
        # Three digits of the sd say all that the draws know about the other numbers.
        digits = max(0, 2 - math.floor(math.log10(row["sd"]))) if row["sd"] > 0 else 4
        numbers = [row[name] for name in ("mean", "sd", "eti90_lb", "eti90_ub")]
        table.add_row(
            Text(str(label)),
            *(f"{number:.{digits}f}" for number in numbers),
            _judged(row["ess_bulk"], "{:.0f}", row["ess_bulk"] < MIN_ESS),
            _judged(row["ess_tail"], "{:.0f}", row["ess_tail"] < MIN_ESS),
            _judged(row["r_hat"], "{:.3f}", row["r_hat"] > MAX_RHAT),
        )
    if len(summary) > MAX_PARAMETERS:
        table.caption = f"{len(summary) - MAX_PARAMETERS} more parameters are in the file."
    return table


def provenance(tree: xr.DataTree) -> Text:
    """The model, how it was called and with what, in one dim paragraph."""
    attrs = tree.attrs
    seconds = attrs.get("seconds_total")
    parts = [
        f"model {attrs.get('model', '?')}",
        f"seed {attrs.get('seed', '?')}",
        f"device {attrs.get('device', '?')}",
        f"bayestie {attrs.get('bayestie_version', '?')}",
        f"torch {attrs.get('torch_version', '?')}",
        f"pyro {attrs.get('pyro_version', '?')}",
    ]
    if isinstance(seconds, int | float):
        parts.append(f"{seconds:.1f} s")
    return Text(", ".join(parts), style="dim")


def overview(tree: xr.DataTree, words: str, at: Sequence[Mapping[str, float]] = ()) -> RenderableType:
    """The answer first, then the strengths, then whatever parameters were asked for."""
    answer = Panel(Text(words), title="[bold]answer[/]", title_align="left", border_style="cyan")
    blocks: list[RenderableType] = [answer, Group(strengths_table(tree), *reasons(tree))]
    if not swept_names(tree):
        blocks.append(parameter_table(tree))
    blocks += [parameter_table(tree, point) for point in at]
    return Group(*(part for block in [*blocks, provenance(tree)] for part in (block, Text())))
