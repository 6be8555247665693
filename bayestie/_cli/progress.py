"""Bars that show how far a fit or sweep has come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
