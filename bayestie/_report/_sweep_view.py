"""A sweep as the report looks at it: along one keyword, in rising order, with what its parts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from bayestie.plots._axis import StrengthAxis, along_strength
from bayestie.plots._curves import Pooled, Score, pooled_of, scores_of
from bayestie.plots._style import number
from bayestie.plots._values import copies_of

MOST_STEPS = 20


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure: first column names the rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remark: str = ""


class SweepView:
    """A sweep reduced to the keyword on the axis, with what its sections share."""

    def __init__(self, tree: xr.DataTree):
        self.tree, self.axis, self.remark = along_strength(tree, None)
        order = self.axis.order
        self.axis = StrengthAxis(
            self.axis.name,
            self.axis.values[list(order)],
            self.axis.positions[list(order)],
            tuple(range(len(order))),
            self.axis.is_log,
        )
        self.groups = copies_of(self.tree, None, order=order)
        scores = [_reorder(score, order) for score in scores_of(self.tree)]
        self.scores = [replace(score, best=order.index(score.best)) for score in scores]
        self.best = self.scores[0].best
        steps = np.linspace(0, len(order) - 1, min(MOST_STEPS, len(order))).round().astype(int)
        self.steps = sorted({*steps.tolist(), self.best})
        self.pooled = [_reorder(pooled, order) for pooled in pooled_of(self.tree)]

    def name_of(self, point: int) -> str:
        """A strength in words: `sigma = 0.5`, with the ends called hard and free."""
        return f"{self.axis.name} = {number(self.axis.values[point])}"


def _reorder[T: (Score, Pooled)](of_points: T, order: Sequence[int]) -> T:
    keep = list(order)
    arrays = {name: getattr(of_points, name)[keep] for name in ("values", "spread", "trusted")}
    return replace(of_points, **arrays)
