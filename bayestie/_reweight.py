"""Draws of a whole sweep, reweighted to an average over sigma."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from bayestie._curve import Averaged, Curve
from bayestie._errors import OptionError
from bayestie._path import sites_along, swept_values
from bayestie._psis import psis

# Groups whose rows are posterior draws with the posterior's own draw coordinate.
_DRAWN = ("posterior", "log_likelihood", "log_prior", "tie_energy")
# Numbers in one table of draws by strengths: 80 MB.
_BUDGET = 10_000_000
# Posterior mass of a node of sigma that no average can show.
_NEGLIGIBLE = 1e-15


@dataclass(frozen=True)
class _Pool:
    """Draws of all strengths between 0 and inf, one flat axis (strength, chain, draw)."""

    rows: NDArray[np.intp]  # position of each strength of the curve in the tree
    statistics: list[tuple]  # per tied site: site, energy (strengths, chain, draw, E), levels

    def log_density(self, sigma: NDArray, rows: NDArray) -> NDArray:
        """log p(theta, level | sigma) at given strengths, (strengths given, rows of the flat pool)."""
        out = np.zeros((len(sigma), len(rows)))
        for site, energy, level in self.statistics:
            q = energy.reshape(-1, energy.shape[-1])[rows]
            x = None if level is None else level.reshape(-1, *level.shape[-2:])[rows]
            out += site.log_density(sigma, q, x)
        return out


@dataclass(frozen=True)
class _Target:
    """Prior density times quadrature weight at the nodes from the smallest strength upward."""

    sigma: NDArray[np.float64]
    log_prior: NDArray[np.float64]

    @staticmethod
    def build(curve: Curve, averaged: Averaged) -> "_Target":
        live = (averaged.nodes.region >= 0) & (averaged.mass > _NEGLIGIBLE)
        sigma = averaged.nodes.sigma[live]
        # The mass of a node holds its evidence: divide it out again.
        return _Target(sigma, np.log(averaged.mass[live]) - curve(sigma))


def averaged_draws(
    path: xr.DataTree, name: str, curve: Curve, averaged: Averaged, num_draws: int | None, seed: int
) -> xr.DataTree:
    """The tree that `average` returns; see there."""
    sites = sites_along(path, name)
    if not sites:
        raise OptionError(
            f"average over {name!r}",
            found="a keyword that is no tie's sigma, or that the model uses elsewhere too",
            expected="the sigma of a tie and of nothing else",
            fix="Sweep the sigma of a tie; for other keywords weigh the draws by evidence(path) yourself.",
        )
    values = swept_values(path, name)
    rows = np.array([int(np.flatnonzero(values == s)[0]) for s in curve.values])
    statistics = []
    for site in sites:
        energy, level = site.statistics(path)
        statistics.append((site, energy.values[rows], None if level is None else level[rows]))
    pool = _Pool(rows, statistics)
    posterior = path["posterior"].to_dataset()
    shape = (len(rows), posterior.sizes["chain"], posterior.sizes["draw"])
    target = _Target.build(curve, averaged)
    log_weight, khat = _weights(pool, curve, target, shape)
    generator = np.random.default_rng(seed)
    shares = _shares(curve, averaged)
    hard = int(np.flatnonzero(values == 0)[0]) if curve.hard else rows[0]
    picked = [
        _resample(log_weight[:, chain], shares, rows, hard, num_draws or shape[2], generator)
        for chain in range(shape[1])
    ]
    strength = np.stack([x[0] for x in picked])
    draw = np.stack([x[1] for x in picked])
    stratum = np.stack([x[2] for x in picked])
    sigma = _strengths_of(pool, averaged, target, shape, strength, draw, stratum, curve, generator)
    return _tree(path, name, values, strength, draw, sigma, khat, _size(log_weight, shares), averaged)


def _weights(pool: _Pool, curve: Curve, target: _Target, shape: tuple[int, ...]) -> tuple[NDArray, float]:
    """Balance-heuristic log weights of the pooled draws, (strengths, chain, draw), and their khat."""
    total = math.prod(shape)
    out = np.empty(total)
    step = max(1, _BUDGET // (len(target.sigma) + shape[0]))
    for start in range(0, total, step):
        rows = np.arange(start, min(start + step, total))
        top = np.logaddexp.reduce(pool.log_density(target.sigma, rows) + target.log_prior[:, None], axis=0)
        bottom = np.logaddexp.reduce(
            pool.log_density(curve.values, rows) - curve.log_evidence[:, None], axis=0
        )
        out[rows] = top - bottom
    _, khat = psis(torch.as_tensor(out))
    return out.reshape(shape), float(khat)


def _shares(curve: Curve, averaged: Averaged) -> NDArray:
    """Posterior mass of the strata: point mass, below sigma_1 by draws at 0 and by those at sigma_1, rest."""
    below = averaged.nodes.region < 0
    soft = 1 - averaged.mass_at_zero
    lift = np.minimum(1.0, (averaged.nodes.sigma[below] / curve.values[0]) ** 2)
    mass = averaged.mass[below]
    if curve.hard is None:
        lift = np.ones_like(lift)
    shares = np.array(
        [averaged.mass_at_zero, soft * (mass * (1 - lift)).sum(), soft * (mass * lift).sum(), 0.0]
    )
    shares[3] = max(1 - shares.sum(), 0.0)
    return shares / shares.sum()


def _resample(
    log_weight: NDArray, shares: NDArray, rows: NDArray, hard: int, count: int, generator: np.random.Generator
) -> tuple[NDArray, NDArray, NDArray]:
    """One chain, systematic resampling: strength, draw and stratum of each row."""
    num_draws = log_weight.shape[1]
    inner = np.exp(log_weight - log_weight.max())
    even = np.full(num_draws, 1 / num_draws)
    weight = np.concatenate(
        [shares[0] * even, shares[1] * even, shares[2] * even, shares[3] * inner.ravel() / inner.sum()]
    )
    marks = (np.arange(count) + generator.uniform()) / count * weight.sum()
    # Shuffled first, so that equally spaced marks do not march through the draws in step.
    order = generator.permutation(len(weight))
    chosen = order[np.minimum(np.searchsorted(np.cumsum(weight[order]), marks), len(weight) - 1)]
    chosen = generator.permutation(chosen)
    stratum = np.minimum(chosen // num_draws, 3)
    inside = chosen - 3 * num_draws
    strength = np.select(
        [stratum < 2, stratum == 2],
        [np.full(count, hard), np.full(count, rows[0])],
        rows[np.maximum(inside, 0) // num_draws],
    )
    return strength, np.where(stratum == 3, inside % num_draws, chosen % num_draws), stratum


def _strengths_of(
    pool: _Pool,
    averaged: Averaged,
    target: _Target,
    shape: tuple[int, ...],
    strength: NDArray,
    draw: NDArray,
    stratum: NDArray,
    curve: Curve,
    generator: np.random.Generator,
) -> NDArray:
    """A sigma for every row, (chain, draw), from its conditional given the row's tied parameters."""
    sigma = np.zeros(strength.shape)
    below = averaged.nodes.region < 0
    lift = np.minimum(1.0, (averaged.nodes.sigma[below] / curve.values[0]) ** 2) if curve.hard else 1.0
    mass = averaged.mass[below]
    for which, share in ((1, mass * (1 - lift)), (2, mass * lift)):
        rows = stratum == which
        if rows.any():
            sigma[rows] = generator.choice(
                averaged.nodes.sigma[below], size=int(rows.sum()), p=share / share.sum()
            )
    place = np.full(int(pool.rows.max()) + 1, -1)
    place[pool.rows] = np.arange(len(pool.rows))
    chain, position = np.nonzero(stratum == 3)
    flat = np.ravel_multi_index((place[strength[chain, position]], chain, draw[chain, position]), shape)
    log_mass = pool.log_density(target.sigma, flat) + target.log_prior[:, None]
    share = np.cumsum(np.exp(log_mass - log_mass.max(0)), axis=0)
    picked = (share < share[-1] * generator.uniform(size=len(flat))).sum(0)
    sigma[chain, position] = target.sigma[picked]
    return sigma


def _size(log_weight: NDArray, shares: NDArray) -> float:
    """Kish effective size of the stratified weights."""
    w = np.exp(log_weight - log_weight.max()).ravel()
    inner = w.sum() ** 2 / (w**2).sum()
    even = log_weight[0].size
    return float(1 / ((shares[0] + shares[1]) ** 2 / even + shares[2] ** 2 / even + shares[3] ** 2 / inner))


def _tree(
    path: xr.DataTree,
    name: str,
    values: NDArray,
    strength: NDArray,
    draw: NDArray,
    sigma: NDArray,
    khat: float,
    size: float,
    averaged: Averaged,
) -> xr.DataTree:
    dims = ("chain", "draw")
    at = {
        name: xr.DataArray(strength, dims=dims),
        "chain": xr.DataArray(np.arange(strength.shape[0])[:, None] * np.ones_like(strength), dims=dims),
        "draw": xr.DataArray(draw, dims=dims),
    }
    coords = {"chain": path["posterior"].coords["chain"].values, "draw": np.arange(strength.shape[1])}
    groups: dict[str, xr.Dataset] = {}
    for group in path.children:
        found = path[group].to_dataset()
        if group in _DRAWN:
            chosen = found.isel(at).drop_vars([name, *dims], errors="ignore")
            groups[group] = chosen.transpose(*dims, ...).assign_coords(coords)
        elif group in ("observed_data", "constant_data"):
            groups[group] = found
    groups["posterior"][name] = (dims, sigma)
    weight = np.bincount(strength.ravel(), minlength=len(values)) / strength.size
    groups["average"] = xr.Dataset(
        {
            "weight": ((name,), weight),
            "khat": ((), khat),
            "ess": ((), size),
            "mass_at_zero": ((), averaged.mass_at_zero),
        },
        coords={name: values},
    )
    root = xr.Dataset(attrs={**path.attrs, "swept": "[]", "averaged": name})
    return xr.DataTree.from_dict({"/": root, **{f"/{group}": ds for group, ds in groups.items()}})
