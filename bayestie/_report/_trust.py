"""Which numbers of which strength must not be trusted, and why: the table of diagnostics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bayestie._evidence import KHAT_LIMIT
from bayestie._psis import good_k
from bayestie._results import SAMPLE_DIMS, swept_names
from bayestie.plots._style import number

# Vehtari et al. (2021), Rank-normalization, folding, and localization, Bayesian Analysis 16(2): section 4.
MAX_RHAT = 1.01
MIN_ESS = 400
MOST_ROWS = 200


@dataclass(frozen=True)
class Cell:
    """One number of the table; `warning` says why it must not be trusted, empty where it may."""

    text: str
    warning: str = ""


@dataclass(frozen=True)
class Row:
    """One strength: its name, short and in full, its cells in the order of COLUMNS, the engine's reason."""

    short: str
    strength: str
    cells: tuple[Cell, ...]
    reason: str

    @property
    def warnings(self) -> list[str]:
        return [cell.warning for cell in self.cells if cell.warning]


@dataclass(frozen=True)
class _Column:
    variable: str
    title: str
    help: str
    show: Callable[[Any], str]
    judge: Callable[[Any, int], str]


# All judgements below are written so that NaN fails them: a check that could not be made was not passed.
def _fine(value: Any, num_draws: int) -> str:
    return ""


def _plain(value: Any) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "\N{EN DASH}"


def _khat_text(value: float) -> str:
    if math.isnan(value):
        return "\N{EN DASH}"
    return "exact" if value == -math.inf else ("∞" if value == math.inf else f"{value:.2f}")


def _judge_khat(value: float, num_draws: int) -> str:
    return f"importance weights unreliable: khat above {KHAT_LIMIT}" if not value <= KHAT_LIMIT else ""


def _only_evidence(cell: Cell, here: xr.Dataset) -> Cell:
    """Where draws are not made by weights (infinite ESS), a bad khat spoils an estimate of evidence only."""
    if cell.warning and "ess_weights" in here and here["ess_weights"].item() == math.inf:
        what = "evidence by importance sampling unreliable"
        return Cell(cell.text, f"{what}: khat above {KHAT_LIMIT} (the draws are not affected)")
    return cell


def _judge_pareto(value: float, num_draws: int) -> str:
    limit = good_k(max(num_draws, 10))
    return f"LOO score unreliable: largest Pareto k above {limit:.2f}" if not value <= limit else ""


def _judge_ess(which: str) -> Callable[[float, int], str]:
    return lambda value, _: (
        f"too few effective draws in the {which}: below {MIN_ESS}" if not value >= MIN_ESS else ""
    )


COLUMNS = (
    _Column("engine", "Engine", "How the draws were made.", str, _fine),
    _Column(
        "certified",
        "Certified",
        "Whether every check of the engine passed.",
        lambda value: "yes" if value else "no",
        lambda value, _: "" if value else "not certified by the engine",
    ),
    _Column(
        "khat", "k̂", "Shape of the tail of the importance weights; small is good.", _khat_text, _judge_khat
    ),
    _Column(
        "max_rhat",
        "R̂",
        f"Largest over all parameters; chains agree below {MAX_RHAT}.",
        lambda value: f"{value:.3f}" if np.isfinite(value) else "\N{EN DASH}",
        lambda value, _: f"chains disagree: R-hat above {MAX_RHAT}" if not value <= MAX_RHAT else "",
    ),
    _Column(
        "min_ess_bulk", "ESS bulk", "Smallest effective number of draws, centre.", _plain, _judge_ess("bulk")
    ),
    _Column(
        "min_ess_tail", "ESS tail", "Smallest effective number of draws, tails.", _plain, _judge_ess("tails")
    ),
    _Column(
        "ess_weights", "ESS weights", "Effective number of importance draws.", _plain, _judge_ess("weights")
    ),
    _Column(
        "divergences",
        "Divergences",
        "Trajectories that broke down; any is a warning.",
        _plain,
        lambda value, _: (
            "divergent trajectories: parts of the posterior may be missing" if not value <= 0 else ""
        ),
    ),
    _Column(
        "max_pareto_k", "LOO k", "Largest Pareto k of the leave-one-out scores.", _khat_text, _judge_pareto
    ),
    _Column("seconds", "Seconds", "Time spent on this strength.", lambda value: f"{value:.3g}", _fine),
)


def trust_table(tree: xr.DataTree) -> list[Row]:
    """A row per swept point, in rising order; a single row for a fit."""
    sweep = tree["sweep"].to_dataset()
    names = swept_names(tree)
    num_draws = int(np.prod([tree["posterior"].sizes[dim] for dim in SAMPLE_DIMS]))
    rows = []
    for point in _points(sweep, names):
        here = sweep.isel(dict(zip(names, point, strict=True)))
        values = [number(float(here[name])) for name in names]
        strength = ", ".join(f"{name} = {value}" for name, value in zip(names, values, strict=True))
        cells = []
        for column in COLUMNS:
            if column.variable not in here:
                cells.append(Cell("\N{EN DASH}"))
                continue
            value = here[column.variable].item()
            cell = Cell(column.show(value), column.judge(value, num_draws))
            cells.append(_only_evidence(cell, here) if column.variable == "khat" else cell)
        reason = str(here["reason"].item()) if "reason" in here else ""
        rows.append(Row(", ".join(values) or "fit", strength or "this fit", tuple(cells), reason))
    return rows


def doubts_of(rows: list[Row]) -> list[str]:
    """The kinds of warning and at how many of the strengths each was raised, the most frequent first."""
    counts = Counter(warning for row in rows for warning in row.warnings)
    return [
        f"{warning[0].upper()}{warning[1:]} ({count} of {len(rows)})"
        for warning, count in counts.most_common()
    ]


def _points(sweep: xr.Dataset, names: list[str]) -> list[tuple[int, ...]]:
    orders = [np.argsort(sweep[name].values, kind="stable") for name in names]
    grids = np.meshgrid(*orders, indexing="ij") if orders else []
    return [tuple(int(i) for i in point) for point in zip(*(g.ravel() for g in grids), strict=True)] or [()]
