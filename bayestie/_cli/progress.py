"""Bars that show how far a fit or sweep has come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBars:
    """A bar for strengths and one for draws: the `progress` callable of `fit` and `sweep`, as a context."""

    def __init__(self, console: Console, num_strengths: int):
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
        self._known: dict[str, Any] = {"strengths_total": num_strengths, "strengths_done": 0, "certified": 0}
        self._strengths = self._bars.add_task("reading the model", total=num_strengths, count="")
        self._draws = self._bars.add_task("draws", total=None, count="", visible=False)

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        # An event says what has changed; a new stage starts its own count of draws.
        if event.get("stage", self._known.get("stage")) != self._known.get("stage"):
            for name in ("draws_done", "draws_total", "min_ess", "message"):
                self._known.pop(name, None)
            self._bars.reset(self._draws)
        self._known |= event
        known = self._known
        strengths = f"{known['strengths_done']}/{known['strengths_total']} strengths"
        self._bars.update(
            self._strengths,
            description=" ".join(filter(None, (known.get("stage"), known.get("message")))),
            total=known["strengths_total"],
            completed=known["strengths_done"],
            count=f"{strengths}, {known['certified']} certified",
        )
        done, total, ess = known.get("draws_done", 0), known.get("draws_total"), known.get("min_ess")
        drawn = f"{done:,}/{total:,} draws" if total else f"{done:,} draws"
        self._bars.update(
            self._draws,
            visible=bool(total or done),
            total=total,
            completed=done,
            count=drawn if ess is None else f"{drawn}, least ESS {ess:,.0f}",
        )
