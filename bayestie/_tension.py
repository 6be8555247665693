"""Which ties the data pull against."""

import numpy as np
import torch
import xarray as xr
from scipy.stats import norm

from bayestie._copies import copies, labels, own_level, prior_variance, unflatten
from bayestie._draws import mean_error, variance_error
from bayestie._path import Part, TiedSite, along_strength, tied_sites

# Edges that are looked at one by one; denser graphs are answered per copy.
_EDGES = 20_000
# Numbers in one dense map from eigenvectors to edges, worked through in pieces of this size.
_BUDGET = 20_000_000
# Information below this many errors of the posterior variance is taken to be this many errors.
_FLOOR = 3.0


def tension(path: xr.DataTree) -> xr.DataTree:
    r"""Which ties the data pull against, edge by edge.

    For the difference Delta_e across an edge, with prior variance V_e = sigma^2 R_e,

    .. math:: t_e = \frac{E[\Delta_e \mid y]}{\sqrt{V_e - Var(\Delta_e \mid y) + s_e^2}},

    s_e the Monte Carlo error of the mean. In a Gaussian model the denominator is the standard deviation
    of E[Delta_e | y] over data from the model, so t_e ~ N(0, 1) and p-values are uniform when the tie
    holds at this strength; elsewhere this is an approximation. Where the data say nothing of an edge, the
    statistic is near 0 and the p-value near 1.

    Args:
        path: what ``sweep`` returned, or a fit whose tie has a recorded strength.

    Returns:
        A DataTree with a node per tied site whose sigma the tree records (and whose event_scale_tril
        is not learned), over the swept dims and ``edge`` (labels
        "a ~ b"; for exchangeable and complete ties the copy's own labels, its deviation from the level
        standing for its edges) and the event dims: ``difference`` (posterior mean, own units),
        ``statistic``, ``p_value`` (two-sided), ``information`` (1 - Var(Delta_e | y) / V_e: 0 means
        the data are silent). With m edges look for p below 0.05 / m. At sigma = 0 all differences are 0:
        statistic 0, p-value 1.

    Raises:
        NameLookupError: the draws of a tied site were not kept.

    Reference: Box (1980), JRSS A 143, for prior predictive checks; Gabry et al. (2019), JRSS A 182.
    """
    nodes = {name: found for name, site in tied_sites(path).items() if (found := _tension_of(path, site))}
    return xr.DataTree.from_dict({f"/{name}": ds for name, ds in nodes.items()})


def _tension_of(path: xr.DataTree, site: TiedSite) -> xr.Dataset | None:
    theta = copies(path, site)
    names = labels(path, site, theta.sizes["copy"])
    if site.record["kind"] in ("exchangeable", "complete") or int(site.record.get("num_edges") or 0) > _EDGES:
        difference = (theta - own_level(path, site, theta)).rename(copy="edge")
        prior = prior_variance(path, site, theta.sizes["copy"])
        prior = None if prior is None else prior.rename(copy="edge")
    else:
        pairs = [_pairs(part) for part in site.parts]
        difference = _differences(theta, own_level(path, site, theta), pairs)
        prior = _edge_variances(path, site, pairs)
        names = [names[i] if j is None else f"{names[i]} ~ {names[j]}" for pair in pairs for i, j in pair]
    if prior is None:
        return None
    mean, error = mean_error(path, difference)
    variance, spread = variance_error(path, difference)
    room = (prior - variance).clip(min=_FLOOR * spread) + error**2
    statistic = xr.where(room > 0, mean / room.where(room > 0, 1.0) ** 0.5, 0.0)
    data = {
        "difference": mean,
        "difference_error": error,
        "statistic": statistic,
        "p_value": statistic.copy(data=2 * norm.sf(np.abs(statistic.values))),
        "information": (1 - variance / prior.where(prior > 0)).fillna(0.0),
    }
    found = xr.Dataset(
        {key: unflatten(value.transpose(*mean.dims), path, site) for key, value in data.items()}
    )
    return found.assign_coords(edge=names)


Pair = tuple[int, int | None]


def _pairs(part: Part) -> list[Pair]:
    """Both copies of every edge; None for the hub."""
    if part.hub:
        return [(int(k), None) for k in part.copies]
    return [(int(part.copies[i]), int(part.copies[j])) for i, j in part.tie.edge_index.T.tolist()]


def _differences(theta: xr.DataArray, level: xr.DataArray, pairs: list[list[Pair]]) -> xr.DataArray:
    flat = [pair for own in pairs for pair in own]
    first = xr.DataArray([i for i, _ in flat], dims="edge")
    second = xr.DataArray([i if j is None else j for i, j in flat], dims="edge")
    hub = xr.DataArray([j is None for _, j in flat], dims="edge")
    other = xr.where(hub, level.isel(copy=first), theta.isel(copy=second))
    return (theta.isel(copy=first) - other).transpose(*[d if d != "copy" else "edge" for d in theta.dims])


def _edge_variances(path: xr.DataTree, site: TiedSite, pairs: list[list[Pair]]) -> xr.DataArray | None:
    """Prior variance of the difference across every edge, (axis, edge, event); None where unknown."""
    factor = site.event_variances
    if factor is None:
        return None
    live = [(p, l, len(own)) for p, l, own in zip(site.parts, site.eigenvalues, pairs, strict=True) if own]
    resistances = [np.ones(n) if p.hub else p.tie.effective_resistances().numpy() for p, _, n in live]
    dense = site.form != "level"
    loadings = [_edge_loadings(p) if dense and not p.hub else None for p, _, _ in live]

    def at(sigma: float) -> np.ndarray:
        rows = []
        for (_, l, n), resistance, squares in zip(live, resistances, loadings, strict=True):
            # sigma^2 R_e, or v itself at a hub; a filter on the eigenvalues in the other forms.
            unit = site.unit_variance(sigma)[:, None] * resistance
            unit = unit if squares is None else site.filter(l, sigma) @ squares
            rows.append(np.broadcast_to(unit, (site.num_event, n)))
        return (np.concatenate(rows, -1) * factor[:, None]).T

    return along_strength(path, site, at, ("edge", "event"))


def _edge_loadings(part: Part) -> np.ndarray:
    """Squared component of every edge along every eigenvector, (r, num_edges)."""
    index = part.tie.edge_index
    step = max(1, _BUDGET // part.tie.num_copies)
    pieces = []
    for piece in index.split(step, dim=1):
        ends = torch.zeros(piece.shape[1], part.tie.num_copies, dtype=torch.float64)
        rows = torch.arange(piece.shape[1])
        ends[rows, piece[0]], ends[rows, piece[1]] = 1.0, -1.0
        pieces.append(part.tie.analyze(ends).square())
    return torch.cat(pieces).T.numpy()
