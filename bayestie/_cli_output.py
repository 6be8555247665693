"""What the command line shows: progress, the table of strengths, parameters, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import arviz_stats as azs
import numpy as np
import rich.box
import xarray as xr
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bayestie._errors import BayestieError
from bayestie._results import select, swept_names

MAX_PARAMETERS = 40
# Vehtari et al. (2021): R-hat below 1.01; Vehtari et al. (2024): Pareto khat below 0.7.
MAX_RHAT, MAX_KHAT = 1.01, 0.7


class ProgressBars:
    """Bars for strengths and draws; a `progress` callable for `fit` and `sweep`, used as a context."""

    def __init__(self, console: Console, unit: str = "strengths"):
        self._bars = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._certified = self._bars.add_task(unit, total=None, count="")
        self._draws = self._bars.add_task("draws", total=None, count="", visible=False)

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        total, done = event.get("strengths_total") or 0, event.get("strengths_done") or 0
        stage = event.get("stage") or ""
        message = event.get("message") or ""
        certified = event.get("certified") or 0
        self._bars.update(
            self._certified,
            description=" ".join(filter(None, (stage, message))) or "strengths",
            total=total or None,
            completed=done,
            count=f"{done}/{total} strengths, {certified} certified" if total else "",
        )
        draws, draws_total, ess = (
            event.get("draws_done") or 0,
            event.get("draws_total") or 0,
            event.get("min_ess"),
        )
        self._bars.update(
            self._draws,
            visible=bool(draws_total),
            total=draws_total or None,
            completed=draws,
            count=f"{draws:,}/{draws_total:,} draws" + (f", least ESS {ess:,.0f}" if ess is not None else ""),
        )


def error_block(error: BayestieError) -> RenderableType:
    """What was found, what was expected, what to do: one panel."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold red", no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("found", Text(error.found))
    lines.add_row("expected", Text(error.expected))
    lines.add_row("do", Text(error.fix))
    return Panel(lines, title=Text(error.what, style="bold red"), title_align="left", border_style="red")


def strengths_table(tree: xr.DataTree) -> Table:
    """A row per swept point: what drew it, whether to trust it, and its scores."""
    sweep = tree["sweep"].to_dataset()
    names = swept_names(tree)
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for title in ("ok", "log evidence", "elpd (LOO)", "khat", "R-hat", "ESS bulk", "ESS tail", "div."):
        table.add_column(title, justify="right", no_wrap=title == "ok")
    points = sweep.stack(point=names) if names else sweep.expand_dims("point")
    for i in range(points.sizes["point"]):
        row = points.isel(point=i)
        table.add_row(*(f"{float(row[name]):.4g}" for name in names), *_strength_cells(row))
    return table


def _strength_cells(row: xr.Dataset) -> list[Text]:
    def number(name: str) -> float:
        return float(row[name].item()) if name in row else math.nan

    certified = bool(row["certified"].item())
    khat, divergences = number("khat"), number("divergences")
    sampled = divergences > 0 or "nuts" in str(row["engine"].item())
    return [
        Text(str(row["engine"].item())),
        Text("yes", style="green") if certified else Text("NO", style="bold red"),
        Text(_with_error(number("log_evidence"), number("log_evidence_error"))),
        Text(_with_error(number("elpd"), number("elpd_se"))),
        Text("exact") if khat == -math.inf else _judged(khat, "{:.2f}", khat > MAX_KHAT and not sampled),
        _judged(number("max_rhat"), "{:.3f}", number("max_rhat") > MAX_RHAT),
        _judged(number("min_ess_bulk"), "{:.0f}", not certified and number("min_ess_bulk") < _target(row)),
        _judged(number("min_ess_tail"), "{:.0f}", not certified and number("min_ess_tail") < _target(row)),
        _judged(divergences, "{:.0f}", divergences > 0),
    ]


def _target(row: xr.Dataset) -> float:
    return float(row.attrs.get("target_ess", 400))


def _judged(value: float, form: str, bad: bool) -> Text:
    text = form.format(value) if math.isfinite(value) else "-"
    return Text(text, style="bold red" if bad else "")


def _with_error(value: float, error: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" + (f" ± {error:.2g}" if math.isfinite(error) and error > 0 else "")


def reasons(tree: xr.DataTree) -> list[Text]:
    """A line per point that is not certified: why."""
    sweep = tree["sweep"].to_dataset()
    names = swept_names(tree)
    points = sweep.stack(point=names) if names else sweep.expand_dims("point")
    lines = []
    for i in range(points.sizes["point"]):
        row = points.isel(point=i)
        if not bool(row["certified"].item()):
            at = ", ".join(f"{name}={float(row[name]):.4g}" for name in names) or "this fit"
            lines.append(Text.assemble((f"{at}: not certified", "bold red"), f" - {row['reason'].item()}"))
    return lines


def num_uncertified(tree: xr.DataTree) -> int:
    return int((~tree["sweep"]["certified"].values.astype(bool)).sum())


def parameter_table(tree: xr.DataTree, at: Mapping[str, float] | None = None) -> Table:
    """Mean, sd, interval and diagnostics of each parameter at one strength."""
    one = select(tree, **at) if at else tree
    hidden = {name for name in one["posterior"].data_vars if str(name).endswith("_z")}
    shown = [str(name) for name in one["posterior"].data_vars if name not in hidden]
    summary = azs.summary(one, var_names=shown, round_to="none")
    title = ", ".join(f"{name} = {value:g}" for name, value in (at or {}).items())
    table = Table(
        box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold", title=title or None
    )
    table.add_column("parameter", overflow="fold")
    for column in summary.columns:
        table.add_column(str(column), justify="right", no_wrap=True)
    for label, row in list(summary.iterrows())[:MAX_PARAMETERS]:
        table.add_row(Text(str(label)), *(_plain_number(value) for value in row))
    if len(summary) > MAX_PARAMETERS:
        table.caption = f"{len(summary) - MAX_PARAMETERS} more parameters are in the file."
    return table


def _plain_number(value: Any) -> str:
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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


def overview(tree: xr.DataTree, words: str | None, at: Sequence[Mapping[str, float]] = ()) -> RenderableType:
    """The answer first, then the strengths, then whatever parameters were asked for."""
    blocks: list[RenderableType] = []
    if words:
        blocks.append(Panel(Text(words), title="[bold]answer[/]", title_align="left", border_style="cyan"))
    blocks += [strengths_table(tree), *reasons(tree)]
    if not json.loads(tree.attrs.get("swept", "[]")):
        blocks.append(parameter_table(tree))
    blocks += [parameter_table(tree, point) for point in at]
    return Group(*blocks, provenance(tree))
