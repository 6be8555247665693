"""The results tree: its schema, labelling arrays, and picking one strength."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from bayestie._errors import NameLookupError, ShapeError
from bayestie._results_files import SCHEMA, SCHEMA_VERSION, load, save

__all__ = ["build_tree", "load", "save", "select", "swept_names", "tie_records"]

SAMPLE_DIMS = ("chain", "draw")

# Every group not listed here holds draws: its arrays lead with (*swept, chain, draw).
_SWEPT_GROUPS = ("sweep", "summary")
_DATA_GROUPS = ("observed_data", "constant_data")
# Summed over the leading (copy) axes of their site, so they keep the names of its last axes.
_REDUCED_GROUPS = ("log_prior", "tie_energy")

_MATCH_TOLERANCE = 1e-6


def build_tree(
    *,
    swept: Mapping[str, Sequence[float]],
    groups: Mapping[str, Mapping[str, Any]],
    event_dims: Mapping[str, Sequence[str | None]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
    group_coords: Mapping[str, Mapping[str, Any]] | None = None,
) -> xr.DataTree:
    """Label arrays as an xarray DataTree in ArviZ's schema, the swept keywords being dimensions.

    An array leads with (*swept, chain, draw), in group ``sweep`` with (*swept), in ``observed_data``
    and ``constant_data`` with nothing; the axes that remain are its event axes.

    Args:
        swept: values of each swept keyword, in the order of the leading axes; empty for a fit.
        groups: arrays by group and variable name; variables of a group share their leading shape.
        event_dims: names of the event axes by variable, or by ``"group/variable"`` where a group
            differs; axes without a name get ArviZ's default, ``{variable}_dim_{i}``.
        coords: labels by dimension name; a dimension without labels is numbered from 0.
        attrs: facts about the run, put at the root; what is not str, int or float is written as JSON.
        group_coords: labels that hold in one group only, such as the thinned draws of
            ``posterior_predictive``.

    Returns:
        The tree; the labels sit in each group, so that groups may differ in their draws.

    Raises:
        ShapeError: labels, names and arrays do not fit together.
        NameLookupError: a variable or dimension name that the schema cannot hold.
    """
    group_coords = group_coords or {}
    swept_coords = {name: np.asarray(values, dtype=float) for name, values in swept.items()}
    datasets: dict[str, xr.Dataset] = {}
    for group, variables in groups.items():
        labels = {**coords, **swept_coords, **group_coords.get(group, {})}
        arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        used: dict[str, np.ndarray] = {}
        for name, values in variables.items():
            array = _plain(values)
            dims = _dims_of(group, name, array, tuple(swept), event_dims)
            for dim, length in zip(dims, array.shape, strict=True):
                used[dim] = _labels_of(dim, length, labels, used, where=f"{group}/{name}")
            arrays[name] = (dims, array)
        datasets[group] = xr.Dataset(arrays, coords={dim: (dim, values) for dim, values in used.items()})
    root = {name: _plain_attr(value) for name, value in attrs.items()}
    root[SCHEMA] = SCHEMA_VERSION
    root.setdefault("swept", json.dumps(list(swept)))
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=root), **datasets})


def swept_names(tree: xr.DataTree) -> list[str]:
    """Names of the swept keywords that are still dimensions of the tree, in order; none for a fit."""
    return list(json.loads(tree.attrs["swept"]))


def tie_records(tree: xr.DataTree) -> dict[str, dict[str, Any]]:
    """What the tree records about each tied site, by site name; empty for a model without ties."""
    return dict(json.loads(tree.attrs.get("ties", "{}")))


def select(tree: xr.DataTree, **swept: float) -> xr.DataTree:
    """Take one swept point: the same tree without those dimensions, as ArviZ expects it.

    Args:
        tree: what ``sweep`` returned.
        **swept: a value per swept keyword, 0 and ``math.inf`` included; it matches a point of the
            sweep exactly or within a relative 1e-6. Keywords left out stay dimensions.

    Returns:
        A tree whose root attribute ``selected`` holds the chosen values as JSON. Without this step
        ArviZ would pool the strengths as if they were observations or parameters.

    Raises:
        NameLookupError: a keyword that was not swept, or a value that is not a point of the sweep.
    """
    names = swept_names(tree)
    indices: dict[str, int] = {}
    chosen: dict[str, float] = dict(json.loads(tree.attrs.get("selected", "{}")))
    for name, value in swept.items():
        if name not in names:
            raise NameLookupError(
                f"select({name}=)",
                found=f"a keyword that is not a swept dimension of this tree{_near(name, names)}",
                expected=f"one of {names}" if names else "no keyword: this tree holds one strength",
                fix="Leave it out, or sweep it first.",
            )
        points = tree["sweep"].coords[name].values
        indices[name] = _match(name, float(value), points)
        chosen[name] = float(points[indices[name]])
    datasets: dict[str, xr.Dataset] = {}
    for node in tree.subtree:
        here = {name: i for name, i in indices.items() if name in node.dims}
        datasets[node.path] = node.to_dataset(inherit=False).isel(here, drop=True)
    remaining = [name for name in names if name not in indices]
    datasets[tree.path].attrs.update(swept=json.dumps(remaining), selected=json.dumps(chosen))
    return xr.DataTree.from_dict(datasets)


def _plain(values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == object:
        # Labels of mixed type have no place in a file; as text they still read the same.
        array = np.array([str(item) for item in array.ravel()], dtype=str).reshape(array.shape)
    if array.dtype.kind == "M":
        # One unit for all times, wide enough for any calendar year, so that files read back the same.
        array = array.astype("datetime64[us]")
    return array


def _plain_attr(value: Any) -> str | int | float:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return value
    return json.dumps(value)


def _dims_of(
    group: str,
    name: str,
    array: np.ndarray,
    swept: tuple[str, ...],
    event_dims: Mapping[str, Sequence[str | None]],
) -> tuple[str, ...]:
    if not name or "/" in name:
        raise NameLookupError(
            f"variable {name!r} of group {group}",
            found="a name that is empty or holds '/'",
            expected="a name that can stand inside a file",
            fix="Rename the site in the model; pyro.contrib.autoname scopes can use another separator.",
        )
    if group in _DATA_GROUPS:
        leading: tuple[str, ...] = ()
    elif group in _SWEPT_GROUPS:
        leading = swept
    else:
        leading = (*swept, *SAMPLE_DIMS)
    num_event = array.ndim - len(leading)
    if num_event < 0:
        raise ShapeError(
            f"variable {name!r} of group {group}",
            found=f"shape {array.shape}",
            expected=f"at least the axes {leading}",
            fix="Give it one axis per swept keyword, then chain and draw.",
        )
    own = event_dims.get(f"{group}/{name}")
    names = list(own if own is not None else event_dims.get(name, ()))
    if own is None and group in _REDUCED_GROUPS:
        names = names[len(names) - num_event :] if num_event else []
    names = names[:num_event] + [None] * (num_event - len(names))
    event = tuple(dim if dim is not None else f"{name}_dim_{i}" for i, dim in enumerate(names))
    dims = (*leading, *event)
    if any("/" in dim for dim in dims):
        raise NameLookupError(
            f"dims of {name!r} in group {group}",
            found=f"{list(dims)}, with '/' in a name",
            expected="names that can stand inside a file",
            fix="Rename the plate or the entry of dims=.",
        )
    if len(set(dims)) != len(dims):
        raise ShapeError(
            f"dims of {name!r} in group {group}",
            found=f"{list(dims)}",
            expected="a different name for every axis",
            fix="Swept keywords, chain and draw are dimensions already; rename the others with dims=.",
        )
    if name in dims:
        raise NameLookupError(
            f"variable {name!r} of group {group}",
            found="a variable with the name of one of its own dimensions",
            expected="two different names",
            fix="Rename the site, or the plate, dims= entry or swept keyword of that name.",
        )
    return dims


def _labels_of(
    dim: str, length: int, labels: Mapping[str, Any], used: Mapping[str, np.ndarray], *, where: str
) -> np.ndarray:
    if dim in used:
        values, source = used[dim], "another variable of the group"
    elif dim in labels:
        values, source = _plain(labels[dim]), "its labels"
    else:
        values, source = np.arange(length), ""
    if values.ndim != 1 or len(values) != length:
        raise ShapeError(
            f"dimension {dim!r} of {where}",
            found=f"length {length}, where {source} has shape {values.shape}",
            expected="one label per element",
            fix=f"Give coords={{{dim!r}: ...}} with {length} labels, or rename this axis with dims=.",
        )
    return values


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _match(name: str, value: float, points: np.ndarray) -> int:
    if not math.isnan(value):
        exact = np.flatnonzero(points == value)
        if exact.size:
            return int(exact[0])
        if math.isfinite(value) and value != 0:
            gaps = np.where(np.isfinite(points), np.abs(points - value), np.inf)
            nearest = int(np.argmin(gaps))
            if gaps[nearest] <= _MATCH_TOLERANCE * abs(value):
                return nearest
    raise NameLookupError(
        f"select({name}=)",
        found=f"{value:g}",
        expected="one of " + ", ".join(f"{point:.8g}" for point in points),
        fix="Take one of these, or sweep again with that strength in the grid.",
    )
