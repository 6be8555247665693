"""Draws of a tied site by copy, with the prior variances that belong to them."""

import numpy as np
import torch
import xarray as xr

from bayestie._path import SAMPLE, TiedSite, along_strength, require
from bayestie._results import swept_names


def copies(path: xr.DataTree, site: TiedSite) -> xr.DataArray:
    """theta as (swept..., chain, draw, copy, event), copies and event elements flat."""
    theta = require(path, "posterior", site.name)
    lead = [*swept_names(path), *SAMPLE]
    theta = theta.transpose(*lead, ...)
    flat = theta.values.reshape(*theta.shape[: len(lead)], -1, site.num_event)
    return xr.DataArray(flat, dims=(*lead, "copy", "event"), coords={d: theta.coords[d] for d in lead})


def levels(path: xr.DataTree, site: TiedSite) -> xr.DataArray:
    """The levels as (swept..., chain, draw, component, event)."""
    lead = [*swept_names(path), *SAMPLE]
    known = site.known_level
    if known is not None:
        like = path["posterior"].to_dataset()
        shape = [like.sizes[dim] for dim in lead]
        values = np.broadcast_to(known, (*shape, site.num_components, site.num_event))
        return xr.DataArray(
            values, dims=(*lead, "component", "event"), coords={d: like.coords[d] for d in lead}
        )
    level = require(path, "posterior", f"{site.name}_level")
    level = level.transpose(*lead, ...)
    flat = level.values.reshape(*level.shape[: len(lead)], -1, site.num_event)
    return xr.DataArray(flat, dims=(*lead, "component", "event"), coords={d: level.coords[d] for d in lead})


def own_level(path: xr.DataTree, site: TiedSite, theta: xr.DataArray) -> xr.DataArray:
    """The level of each copy's component, laid out as theta."""
    found = levels(path, site)
    component = np.zeros(theta.sizes["copy"], dtype=int)
    if found.sizes["component"] > 1:
        for number, part in enumerate(site.parts):
            component[part.copies] = number
    return found.isel(component=xr.DataArray(component, dims="copy")).transpose(*theta.dims)


def prior_variance(path: xr.DataTree, site: TiedSite, num_copies: int) -> xr.DataArray | None:
    """Prior variance of each copy's deviation from its level, (axis, copy, event); None where unknown."""
    factor = site.event_variances
    if factor is None:
        return None

    def at(sigma: float) -> np.ndarray:
        out = np.zeros((site.num_event, num_copies))
        for part, v in zip(site.parts, site.deviation_variances(sigma), strict=True):
            if part.tie.rank:
                out[:, part.copies] = part.tie.diagonal(torch.as_tensor(np.ascontiguousarray(v))).numpy()
        return (out * factor[:, None]).T

    return along_strength(path, site, at, ("copy", "event"))


def labels(path: xr.DataTree, site: TiedSite, num: int) -> list[str]:
    """What the user calls each copy; several copy dims (a grid) read "row, column"."""
    coords = path["posterior"].coords
    columns = [[_text(x) for x in coords[dim].values] for dim in site.copy_dims if dim in coords]
    names = [""]
    for column in columns:
        names = [f"{name}, {x}" if name else x for name in names for x in column]
    return names if len(names) == num else [str(k) for k in range(num)]


def unflatten(value: xr.DataArray, path: xr.DataTree, site: TiedSite) -> xr.DataArray:
    """Flat copies and event elements under the dims, shapes and labels of the posterior."""
    theta = require(path, "posterior", site.name)
    inner = [dim for dim in theta.dims if dim not in (*swept_names(path), *SAMPLE)]
    own, event = inner[: len(inner) - len(site.event_shape)], inner[len(inner) - len(site.event_shape) :]
    for flat, dims in (("copy", own), ("event", event)):
        if flat not in value.dims:
            continue
        lead = [dim for dim in value.dims if dim != flat]
        moved = value.transpose(*lead, flat)
        shape = [theta.sizes[dim] for dim in dims]
        coords = {dim: moved.coords[dim] for dim in lead if dim in moved.coords}
        coords |= {dim: theta.coords[dim] for dim in dims if dim in theta.coords}
        data = moved.values.reshape((*moved.shape[:-1], *shape))
        value = xr.DataArray(data, dims=[*lead, *dims], coords=coords)
    kept = [dim for dim in (*swept_names(path), *own, *event) if dim in value.dims]
    return value.transpose(
        *[d for d in value.dims if d not in (*own, *event)], *[d for d in kept if d in (*own, *event)]
    )


def _text(x: object) -> str:
    return f"{x:g}" if isinstance(x, float) else str(x)
