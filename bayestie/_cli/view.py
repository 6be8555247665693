"""What the command line shows: the answer, the table of strengths, parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import arviz_stats as azs
import numpy as np
import rich.box
import xarray as xr
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bayestie._results import select, swept_names

MAX_PARAMETERS = 40
# Vehtari et al. (2021): R-hat below 1.01; Vehtari et al. (2024): Pareto khat below 0.7.
MAX_RHAT, MAX_KHAT = 1.01, 0.7


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
    return int((~tree["sweep"]["certified"].to_numpy().astype(bool)).sum())


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
