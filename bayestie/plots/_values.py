"""Posterior means and intervals of the copies, as plain arrays with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

from bayestie._errors import NameLookupError
from bayestie._results import SAMPLE_DIMS, swept_names, tie_records

QUANTILES = (0.05, 0.25, 0.75, 0.95)


@dataclass(frozen=True)
class Copies:
    """One event element of one variable: a summary per strength and copy.

    `quantiles` are the ends of the central 90% and 50% intervals, as in QUANTILES.
    """

    title: str
    labels: tuple[str, ...]
    ordered: bool
    mean: Float[np.ndarray, "points copies"]
    sd: Float[np.ndarray, "points copies"]
    quantiles: Float[np.ndarray, "4 points copies"]

    @property
    def moved(self) -> Float[np.ndarray, " copies"]:
        """How far each copy's mean lies apart between the first and last strength, in sds at the last."""
        scale = np.where(self.sd[-1] > 0, self.sd[-1], 1.0)
        return np.abs(self.mean[-1] - self.mean[0]) / scale


def copies_of(
    tree: xr.DataTree, var_names: str | Sequence[str] | None, order: Sequence[int] | None = None
) -> list[Copies]:
    """Summaries of each event element of each variable, the tied sites where none is named.

    Args:
        tree: a sweep over at most one keyword.
        var_names: posterior variables.
        order: the strengths in the order wanted, as indices.
    """
    posterior = tree["posterior"].to_dataset()
    ties = tie_records(tree)
    if var_names is None:
        names = [name for name in ties if name in posterior] or _free_latents(posterior)
    else:
        names = [var_names] if isinstance(var_names, str) else list(var_names)
    found = []
    for name in names:
        if name not in posterior:
            raise NameLookupError(
                "var_names=",
                found=repr(name),
                expected=f"names among {sorted(map(str, posterior.data_vars))}",
                fix="Take one of these; keep= limits what a sweep stores.",
            )
        record = ties.get(name, {})
        found.extend(_split(name, posterior[name], record, swept_names(tree), order))
    return found


def _free_latents(posterior: xr.Dataset) -> list[str]:
    return [str(name) for name in posterior.data_vars]


def _split(
    name: str, draws: xr.DataArray, record: dict, swept: list[str], order: Sequence[int] | None
) -> list[Copies]:
    event = [dim for dim in draws.dims if dim not in (*swept, *SAMPLE_DIMS)]
    copy_dims = [dim for dim in record.get("copy_dims", event) if dim in event] or event
    other = [dim for dim in event if dim not in copy_dims]
    draws = draws.transpose(*swept, *SAMPLE_DIMS, *other, *copy_dims)
    if not swept:
        draws = draws.expand_dims("point")
    num_points = draws.shape[0]
    values = draws.values.reshape(num_points, draws.shape[1] * draws.shape[2], _size(draws, other), -1)
    if order is not None:
        values = values[list(order)]
    labels = tuple(_labels(draws, copy_dims)) if copy_dims else (name,)
    elements = _labels(draws, other) if other else [""]
    ordered = record.get("kind") in ("chain", "ring") and len(copy_dims) == 1
    return [
        Copies(
            title=f"{name}, {element}" if element else name,
            labels=labels,
            ordered=ordered,
            mean=values[:, :, e].mean(1),
            sd=values[:, :, e].std(1),
            quantiles=np.quantile(values[:, :, e], QUANTILES, axis=1),
        )
        for e, element in enumerate(elements)
    ]


def _size(draws: xr.DataArray, dims: Sequence) -> int:
    return int(np.prod([draws.sizes[dim] for dim in dims], dtype=int))


def _labels(draws: xr.DataArray, dims: Sequence) -> list[str]:
    grids = np.meshgrid(*[draws[dim].values.astype(str) for dim in dims], indexing="ij")
    return [", ".join(parts) for parts in zip(*(grid.ravel().tolist() for grid in grids), strict=True)]
