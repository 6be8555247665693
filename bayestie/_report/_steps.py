"""One strength at a time: every copy, replicated against observed data, and the main numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from markupsafe import Markup

from bayestie._report._svg import inline_svg
from bayestie._report._sweep_view import SweepView, Table
from bayestie._results import select, tie_records
from bayestie.plots import plot_copies
from bayestie.plots._copies import value_limits
from bayestie.plots._curves import Score, pooled_of
from bayestie.plots._paths import highlighted
from bayestie.plots._predictive import Check, check_limits, checks_of, draw_checks
from bayestie.plots._style import number
from bayestie.plots._values import Copies, copies_of

WIDTH = 3.5
_MOST_LABELS = 100
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Step:
    """What the reader sees of one strength."""

    key: str
    label: str
    summary: tuple[tuple[str, str], ...]
    drawings: tuple[Markup, ...]
    caption: str
    table: Table
    chosen: bool


def steps_of(view: SweepView) -> list[Step]:
    """One panel per strength, all on the same axes of values, the best strength chosen."""
    trees = [select(view.tree, **{view.axis.name: float(view.axis.values[point])}) for point in view.steps]
    checks = [_checks(tree) for tree in trees]
    limits = value_limits(view.groups)
    found = []
    for place, point in enumerate(view.steps):
        key = f"s{place}"
        drawings, caption = _drawn(trees[place], key, view.groups, point, limits, checks[place], checks)
        summary = [(score.title, _score_text(score, point)) for score in view.scores]
        summary += [(pooled.title, f"{pooled.values[point]:.1f}") for pooled in view.pooled]
        found.append(
            Step(
                key=key,
                label=_label(view, point),
                summary=tuple(summary),
                drawings=drawings,
                caption=caption,
                table=copies_table(view.groups, point),
                chosen=point == view.best,
            )
        )
    return found


def single_step(tree: xr.DataTree) -> Step:
    """The same panel for a fit at one strength."""
    groups, checks = copies_of(tree, None), _checks(tree)
    sweep = tree["sweep"].to_dataset()
    summary = []
    for name, error, title in (
        ("log_evidence", "log_evidence_error", "Log evidence"),
        ("elpd", "elpd_se", "Predictive score (LOO elpd)"),
    ):
        if name in sweep and np.isfinite(sweep[name].item()):
            summary.append((title, _signed(f"{sweep[name].item():.2f} ± {sweep[error].item():.2g}")))
    summary += [(pooled.title, f"{pooled.values.item():.1f}") for pooled in pooled_of(tree)]
    drawings, caption = _drawn(tree, "s0", groups, 0, value_limits(groups), checks, [checks])
    return Step("s0", "", tuple(summary), drawings, caption, copies_table(groups, 0), chosen=True)


def copies_table(groups: Sequence[Copies], point: int) -> Table:
    """Posterior mean, sd and 90% interval of the copies at one strength."""
    rows, total = [], 0
    for group in groups:
        total += len(group.labels)
        many = len(group.labels) > _MOST_LABELS
        for k in highlighted(group, _MOST_LABELS) if many else range(len(group.labels)):
            low, high = group.quantiles[0, point, k], group.quantiles[3, point, k]
            label = group.labels[k] if len(groups) == 1 else f"{group.title}: {group.labels[k]}"
            cells = (
                _signed(f"{value:.3g}") for value in (group.mean[point, k], group.sd[point, k], low, high)
            )
            rows.append((label, *cells))
    remark = f"{len(rows)} of {total}: those that move farthest along the sweep." if len(rows) < total else ""
    return Table(("", "mean", "sd", "5%", "95%"), tuple(rows), remark)


def _checks(tree: xr.DataTree) -> list[Check]:
    stored = {"posterior_predictive", "observed_data"} <= set(tree.children)
    return checks_of(tree) if stored else []


def _drawn(
    tree: xr.DataTree,
    key: str,
    groups: Sequence[Copies],
    point: int,
    limits: tuple[float, float],
    checks: list[Check],
    all_checks: list[list[Check]],
) -> tuple[tuple[Markup, ...], str]:
    means = " ".join(
        f"{group.title}: means from {group.mean[point].min():.3g} to {group.mean[point].max():.3g}."
        for group in groups
    )
    figure = plot_copies(tree, width=WIDTH, limits=limits)
    drawings = [inline_svg(figure, name=f"{key}-copies", description=f"Posterior of each copy. {means}")]
    caption = "Blue, the posterior of each copy: its mean, 50% and 90% intervals. "
    for site, check in enumerate(checks):
        low, high = np.quantile(check.replicated, (0.05, 0.95), axis=0)
        inside = int(((check.observed >= low) & (check.observed <= high)).sum())
        words = (
            f"{inside} of {check.observed.size} values of {check.xlabel} lie inside the 90% interval of "
            f"data replicated from the posterior."
        )
        axis = check_limits([others[site] for others in all_checks])
        figure = draw_checks([(check.title, check)], WIDTH, axis)
        drawings.append(inline_svg(figure, name=f"{key}-data{site}", description=words))
        caption += f"Orange, what was observed: {words} "
    return tuple(drawings), caption.strip()


def _score_text(score: Score, point: int) -> str:
    value, spread = score.values[point], score.spread[point]
    less = score.values[score.best] - value
    below = "the best" if point == score.best else f"{less:.2f} below the best"
    if point != score.best and less < 0.005:
        below = "as good as the best"
    error = f" ± {spread:.2g}" if spread > 0 else ""
    return _signed(f"{value:.2f}{error}, {below}" + ("" if score.trusted[point] else " (not to be trusted)"))


def _label(view: SweepView, point: int) -> str:
    value = float(view.axis.values[point])
    tied = view.axis.name in [record.get("sigma_from") for record in tie_records(view.tree).values()]
    return number(value) + ({0.0: " (hard)", np.inf: " (free)"}.get(value, "") if tied else "")


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)
