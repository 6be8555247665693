"""What analyses of a claim do alike: numbers expected and found with their errors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xarray as xr

ROUNDING = 1e-10  # what an exact number may be off


@dataclass(frozen=True)
class Finding:
    """A number that a claim predicts, and the number found.

    Args:
        what: the quantity, in words.
        expected: the number the claim predicts, or the bound that `kind` says.
        found: the number found.
        error: Monte Carlo standard error of what was found; 0 where it is exact.
        num_errors: how many of them it may be off.
        rounding: what an exact number, or a limit that is only neared, may be off, in absolute terms.
        kind: whether `found` should equal `expected`, or lie below or above it.
    """

    what: str
    expected: float
    found: float
    error: float = 0.0
    num_errors: float = 4.0
    rounding: float = ROUNDING
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
        """The expected number in words, with what it may be off where it is a limit that is only neared."""
        sign = {"equal": "", "below": "< ", "above": "> "}[self.kind]
        beside = f" within {self.rounding:.2g}" if self.kind == "equal" and self.rounding > ROUNDING else ""
        return f"{sign}{_number(self.expected)}{beside}"

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


def slope(x: np.ndarray, y: np.ndarray, error: np.ndarray | None = None) -> tuple[float, float]:
    """Least-squares slope of y on x, and its standard error given that of each y."""
    centred = x - x.mean()
    weight = centred / (centred**2).sum()
    return float(weight @ y), 0.0 if error is None else float(np.sqrt((weight**2) @ error**2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e13 else f"{value:.4g}"
