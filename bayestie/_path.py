"""Reading a sweep: which swept keyword is which tie's strength, and what the prior says of it."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bayestie._errors import NameLookupError, OptionError
from bayestie._results import swept_names, tie_records
from bayestie._ties import Tie

SAMPLE = ("chain", "draw")


@dataclass(frozen=True)
class Part:
    """One connected component of a tie, or several handled as one, and the copies it holds."""

    tie: Tie
    copies: np.ndarray

    @property
    def hub(self) -> bool:
        return self.tie.kind == "exchangeable"


@dataclass(frozen=True)
class TiedSite:
    """A tied site of a sweep: the record that the tree keeps of it, with the prior's formulas.

    The deviations have variance v_j along eigenvector j, and the level variance var_c per component:
    DESIGN's three forms. Arrays over the event shape are flat, (E,); over eigenvalues, (r,).
    """

    name: str
    record: dict[str, Any]

    @property
    def form(self) -> str:
        return self.record["form"]

    @property
    def axis(self) -> str | None:
        """Swept keyword that is this tie's sigma; None where sigma was not swept."""
        return self.record.get("sigma_from")

    @property
    def rank(self) -> int:
        return int(self.record["rank"])

    @property
    def num_components(self) -> int:
        return int(self.record["num_components"])

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.record.get("event_shape") or ())

    @property
    def num_event(self) -> int:
        return math.prod(self.event_shape)

    @cached_property
    def event_variances(self) -> np.ndarray | None:
        """diag(T T^T) per event element, (E,), T the recorded event_scale_tril; None where T is learned."""
        tril = self.record.get("event_scale_tril")
        if tril is None:
            return np.ones(self.num_event)
        if isinstance(tril, str):
            return None
        own = np.square(np.asarray(tril, dtype=float)).sum(-1)
        return np.broadcast_to(own, self.event_shape).reshape(-1)

    @property
    def copy_dims(self) -> list[str]:
        return list(self.record["copy_dims"])

    @cached_property
    def base(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and sd of a Gaussian base over the event shape, (E,) each; None for any other base."""
        # Other families have a loc and a scale too, but the scale is not their sd.
        if not str(self.record.get("base")).startswith("Normal"):
            return None
        loc, scale = self.record.get("base_loc"), self.record.get("base_scale")
        if scale is None:
            number = r"(-?[\d.]+(?:[eE][-+]?\d+)?)"
            found = re.fullmatch(rf"Normal\({number}, {number}\)", str(self.record.get("base")))
            if found is None:
                return None
            loc, scale = float(found[1]), float(found[2])
        means, sds = (
            np.broadcast_to(np.asarray(x, dtype=float), self.event_shape).reshape(-1) for x in (loc, scale)
        )
        return means, sds

    @property
    def known_level(self) -> np.ndarray | None:
        """The level where it is a number and no site, over the event shape (E,); else None."""
        known = self.record.get("base_known")
        if known is None:
            return None
        return np.broadcast_to(np.asarray(known, dtype=float), self.event_shape).reshape(-1)

    @cached_property
    def parts(self) -> list[Part]:
        return _parts(self.record)

    @cached_property
    def eigenvalues(self) -> list[np.ndarray]:
        """Eigenvalues of each part, (r_part,)."""
        return [part.tie.eigenvalues.numpy() for part in self.parts]

    def deviation_variances(self, sigma: float) -> list[np.ndarray]:
        """v_j of each part: (E, r_part), or (1, r_part) in form `level`, where no event element differs."""
        return [self.filter(l, sigma) for l in self.eigenvalues]

    def filter(self, eigenvalues: np.ndarray, sigma: float) -> np.ndarray:
        """v(sigma) on eigenvalues (r,): (E, r), or (1, r) in form `level`."""
        if self.form == "level":
            return sigma**2 / eigenvalues[None]
        _, scale = self._gaussian()
        with np.errstate(divide="ignore"):
            return 1 / (eigenvalues / np.float64(sigma) ** 2 + 1 / scale[:, None] ** 2)

    def unit_variance(self, sigma: float) -> np.ndarray:
        """v(sigma) at eigenvalue 1: (E,), or (1,) in form `level`."""
        return self.filter(np.ones(1), sigma)[:, 0]

    def level_variances(self, sigma: float) -> np.ndarray:
        """Prior variance of the level of each part in a Gaussian form, (E, parts)."""
        _, scale = self._gaussian()
        columns = []
        for part, v in zip(self.parts, self.deviation_variances(sigma), strict=True):
            num = len(part.copies)
            match self.form:
                case "level":
                    columns.append(scale**2)
                case "copies":
                    columns.append(scale**2 / num)
                case _:
                    columns.append(scale**2 - v[:, 0] if part.hub else scale**2 - v.sum(-1) / num)
        return np.stack(columns, -1)

    def log_normaliser(self, sigma: float) -> float:
        """-1/2 sum_j log v_j over the event, up to a constant that does not move with sigma."""
        if self.form == "level":
            return -self.rank * self.num_event * math.log(sigma)
        return -0.5 * sum(float(np.log(v).sum()) for v in self.deviation_variances(sigma))

    def score(self, sigma: float, energy: np.ndarray, level: np.ndarray | None) -> np.ndarray:
        """d log p(theta, level | sigma) / d log sigma of each draw.

        Per event element E: `level` q / sigma^2 - r; `copies` q / sigma^2 - sum_j l_j v_j / sigma^2;
        `matched` the same plus 1/2 (d log var_c / d log sigma)((level_c - m)^2 / var_c - 1) per level.
        The ends sigma = 0 and inf are flat: 0.

        Args:
            sigma: the strength.
            energy: q, (..., E).
            level: (..., E, parts), needed by form `matched` only.

        Returns:
            Shape (...).
        """
        if sigma == 0 or math.isinf(sigma):
            return np.zeros(energy.shape[:-1])
        total = energy.sum(-1) / sigma**2
        if self.form == "level":
            return total - self.rank * self.num_event
        variances = self.deviation_variances(sigma)
        for l, v in zip(self.eigenvalues, variances, strict=True):
            total = total - (l * v).sum() / sigma**2
        if self.form == "matched":
            assert level is not None
            loc, _ = self._gaussian()
            var = self.level_variances(sigma)
            slope = np.stack(
                [
                    -2 * l[0] * v[:, 0] ** 2 / sigma**2
                    if part.hub
                    else -2 * (l * v**2).sum(-1) / sigma**2 / len(part.copies)
                    for part, l, v in zip(self.parts, self.eigenvalues, variances, strict=True)
                ],
                -1,
            )
            standard = (level - loc[:, None]) ** 2 / var - 1
            total = total + 0.5 * (slope / var * standard).sum((-2, -1))
        return total

    def log_density(self, sigma: np.ndarray, energy: np.ndarray, level: np.ndarray | None) -> np.ndarray:
        """log p(theta, level | sigma) of draws at several strengths, up to a constant in sigma.

        Args:
            sigma: strengths > 0, (n,).
            energy, level: as in `score`, with draws (m,) in front.

        Returns:
            Shape (n, m).
        """
        scale = np.array([self.log_normaliser(float(s)) for s in sigma])
        with np.errstate(divide="ignore"):
            total = scale[:, None] - 0.5 * sigma[:, None] ** -2.0 * energy.sum(-1)
        if self.form == "matched":
            assert level is not None
            loc, _ = self._gaussian()
            squares = (level - loc[:, None]) ** 2
            for row, s in zip(total, sigma, strict=True):
                var = self.level_variances(float(s))
                row -= 0.5 * (np.log(var) + squares / var).sum((-2, -1))
        return total

    def statistics(self, path: xr.DataTree) -> tuple[xr.DataArray, np.ndarray | None]:
        """What the draws say about sigma: q summed over nothing, as (swept..., chain, draw, E), and levels.

        Returns:
            The energy with one flat dim ``event``, and for form `matched` the levels (..., E, parts).
        """
        lead = [*swept_names(path), *SAMPLE]
        energy = require(path, "tie_energy", self.name)
        energy = energy.transpose(*lead, ...)
        flat = energy.values.reshape(*energy.shape[: len(lead)], self.num_event)
        coords = {dim: energy.coords[dim] for dim in lead}
        energy = xr.DataArray(flat, dims=(*lead, "event"), coords=coords)
        if self.form != "matched":
            return energy, None
        level = require(path, "posterior", f"{self.name}_level").transpose(*lead, ...)
        values = level.values.reshape(*level.shape[: len(lead)], len(self.parts), self.num_event)
        return energy, np.moveaxis(values, -1, -2)

    def _gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        if self.base is None:
            raise OptionError(
                f"base of tied site {self.name!r}",
                found=f"{self.record.get('base')!r}",
                expected=f"a Gaussian base, which form {self.form!r} has",
                fix="Sweep again with this version, which records the mean and sd of the base.",
            )
        return self.base


def along_strength(
    path: xr.DataTree, site: TiedSite, formula: Callable[[float], np.ndarray], inner: Sequence[str]
) -> xr.DataArray | None:
    """A function of the site's strength over the swept values of it, or at the one strength of the tree.

    Args:
        formula: sigma -> array with the dims `inner`.

    Returns:
        Dims (axis, *inner), or only `inner` at one strength; None where the tree does not say it.
    """
    if site.axis in swept_names(path):
        values = swept_values(path, site.axis)
        rows = np.stack([formula(float(s)) for s in values])
        return xr.DataArray(rows, dims=(site.axis, *inner), coords={site.axis: values})
    one = json.loads(path.attrs.get("selected", "{}")).get(site.axis, site.record.get("sigma"))
    return None if one is None else xr.DataArray(formula(float(one)), dims=inner)


def tied_sites(path: xr.DataTree) -> dict[str, TiedSite]:
    """The tied sites of a tree by name, in the model's order."""
    return {name: TiedSite(name, record) for name, record in tie_records(path).items()}


def sites_along(path: xr.DataTree, axis: str) -> list[TiedSite]:
    """Tied sites whose sigma is the swept keyword `axis` and nothing else in the model is; else none.

    The thermodynamic identity and reweighting hold only then.
    """
    if axis in _entangled(path):
        return []
    return [site for site in tied_sites(path).values() if site.axis == axis]


def _entangled(path: xr.DataTree) -> list[str]:
    return [
        str(site.record.get("sigma_from"))
        for site in tied_sites(path).values()
        if site.record.get("sigma_elsewhere")
    ]


def swept_values(path: xr.DataTree, name: str) -> np.ndarray:
    """Values of a swept keyword, in the tree's order."""
    return np.asarray(path["sweep"].coords[name].values, dtype=float)


def sweep_value(path: xr.DataTree, name: str) -> xr.DataArray | None:
    """A variable of the sweep group, or None where it was not kept."""
    return path["sweep"].to_dataset().get(name)


def holds(path: xr.DataTree, group: str, name: str) -> bool:
    """Whether the tree kept a variable."""
    return group in path.children and name in path[group].data_vars


def require(path: xr.DataTree, group: str, name: str) -> xr.DataArray:
    """A variable of the tree, or a named error that says what is kept."""
    if not holds(path, group, name):
        kept = [f"{g}/{v}" for g in path.children for v in path[g].data_vars]
        raise NameLookupError(
            f"{group}/{name}",
            found=f"a tree that holds {', '.join(kept[:8])}, ...",
            expected=f"the variable {name!r} in group {group!r}",
            fix="Fit or sweep again without leaving that group out by keep=.",
        )
    return path[group].to_dataset()[name]


def _parts(record: dict[str, Any]) -> list[Part]:
    num = int(record["num_copies"])
    scaled = bool(record.get("scaled"))
    shape: Sequence[int] = record.get("shape") or [num]
    whole = {
        "exchangeable": lambda: Tie.exchangeable(num, scaled=scaled),
        "complete": lambda: Tie.complete(num, scaled=scaled),
        "chain": lambda: Tie.chain(num, scaled=scaled),
        "anchored_chain": lambda: Tie.chain(num, anchored=True, scaled=scaled),
        "ring": lambda: Tie.ring(num, scaled=scaled),
        "grid": lambda: Tie.grid(*shape, scaled=scaled),
    }
    if record["kind"] in whole:
        return [Part(whole[record["kind"]](), np.arange(num))]
    if "edges" not in record:
        raise OptionError(
            f"edges of a tie of kind {record['kind']!r}",
            found=f"{record.get('num_edges', 'too many')} edges, which the tree does not hold",
            expected="at most 20,000 edges",
            fix="Ask for this answer on a smaller graph, or on a chain, ring, grid or exchangeable tie.",
        )
    return _parts_of_graph(
        num, np.asarray(record["edges"], dtype=int).reshape(-1, 2), record.get("edge_weights")
    )


def _parts_of_graph(num: int, edges: np.ndarray, weights: Sequence[float] | None) -> list[Part]:
    # Recorded weights are those after scaling. Nodes past the copies are hubs.
    weight = np.ones(len(edges)) if weights is None else np.asarray(weights, dtype=float)
    hub_of = {int(i): int(j) for i, j in edges if j >= num}
    size = max(num, int(edges.max(initial=-1)) + 1)
    _, labels = connected_components(coo_array((weight, edges.T), shape=(size, size)), directed=False)
    parts = []
    for label in dict.fromkeys(labels[:num].tolist()):
        copies = np.flatnonzero(labels[:num] == label)
        if int(copies[0]) in hub_of:
            parts.append(Part(Tie.exchangeable(len(copies)), copies))
            continue
        own = np.isin(edges[:, 0], copies)
        local = np.searchsorted(copies, edges[own])
        tie = (
            Tie.edges(len(copies), torch.as_tensor(local), torch.as_tensor(weight[own]))
            if own.any()
            else Tie.chain(1)
        )
        parts.append(Part(tie, copies))
    return parts
