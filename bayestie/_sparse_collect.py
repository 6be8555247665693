"""Draws of copies -> named arrays, as `bayestie._collect` gives them for draws of (level, z).

A row holds the copies and Gaussian latents x, the latent levels, then the few other latents unconstrained.
`{name}_z` is not made: it is as large as the copies, and a function of them and the level.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._collect import ELEMENTS
from bayestie._copy_coordinates import CopyProgram, GivenCopies, stated
from bayestie._messages import base_distribution
from bayestie._tie_priors import TiePrior, sum_right

_TOGETHER = 1 << 17  # copies whose prior is worked out at once: what a core's cache holds


class Columns:
    """Where each variable lies in a row of draws."""

    def __init__(self, copies: CopyProgram):
        self.copies = copies
        self.sites: dict[str, tuple[slice, tuple[int, ...]]] = {
            b.name: (b.slice, b.shape) for b in copies.blocks
        }
        start = copies.num_x
        self.levels: dict[str, str] = {}  # tied site -> its level's site
        for name, site in copies.tied.items():
            about, level = site.infer["bayestie"], f"{name}_level"
            if level not in copies.program.latent and level not in copies.program.deterministic:
                continue
            tie, event = about["tie"], tuple(about["event_shape"])
            shape = event if tie.num_components == 1 else (tie.num_components, *event)
            self.sites[level] = (slice(start, start + math.prod(shape)), shape)
            self.levels[name] = level
            start += math.prod(shape)
        self.hyper = slice(start, start + copies.num_hyper)
        self.width = self.hyper.stop

    def row(self, x: np.ndarray, levels: dict[str, np.ndarray], hyper: np.ndarray) -> np.ndarray:
        """Rows (batch, width) of copies (batch, num_x), levels (batch, c, E) and h (batch, num_hyper)."""
        found = [levels[name].reshape(len(x), -1) for name in self.levels]
        return np.concatenate([x, *found, hyper], 1)


def collect_copies(
    columns: Columns, points: Tensor, position: Tensor, wanted: Callable[[str], bool]
) -> dict[str, np.ndarray]:
    """Arrays (P, chains, draws, ...) by group/name of rows (P, chains, draws, width)."""
    copies, lead = columns.copies, position.shape[:-1]
    arrays = {
        f"posterior/{name}": position[..., where].reshape(*lead, *shape).numpy()
        for name, (where, shape) in columns.sites.items()
        if wanted(f"posterior/{name}")
    }
    program = copies.program
    others = [f"posterior/{n}" for n in (*copies.hyper, *program.deterministic) if n not in columns.sites]
    own = [f"{group}/{name}" for name in copies.tied for group in ("log_prior", "tie_energy")]
    seen = [f"{group}/{name}" for name in program.observed for group in ("log_likelihood", "parameter")]
    if not any(wanted(key) for key in (*others, *own, *seen)):
        return arrays
    still = _ties_are_still(columns, points)
    if still:
        arrays |= _tie_terms(columns, points, position, wanted)
    if not copies.num_hyper and not any(wanted(key) for key in (*others, *seen)):
        return arrays | _plain_terms(columns, points, position, wanted)
    observed = any(wanted(key) for key in seen)
    flat = position.reshape(-1, position.shape[-1])
    index = points.repeat_interleave(math.prod(lead[1:]))
    rows = position.shape[-1] + observed * sum(v.numel() for v in program.observed_values.values())
    chunk = max(1, ELEMENTS // rows)
    found: dict[str, Tensor] = {}
    for start in range(0, len(flat), chunk):
        part = slice(start, min(start + chunk, len(flat)))
        inputs = program.point_inputs(index[part])

        def one(row: Tensor, *tensors: Tensor, inputs=inputs) -> dict[str, Tensor]:
            values = _describe(columns, row, inputs.unflatten(tensors), observed, ties=not still)
            return {key: value for key, value in values.items() if wanted(key) and key not in arrays}

        with torch.no_grad(), program.quiet():
            values = torch.vmap(one)(flat[part], *inputs.flat())
        for key, value in values.items():
            if key not in found:
                found[key] = value.new_empty((len(flat), *value.shape[1:]))
            found[key][part] = value
    return arrays | {key: x.reshape(*lead, *x.shape[1:]).numpy() for key, x in found.items()}


def _ties_are_still(columns: Columns, points: Tensor) -> bool:
    """Whether what tied statements state depends on the strength alone."""
    copies = columns.copies
    if not copies.num_hyper:
        return True
    zero = torch.zeros(copies.num_x, dtype=torch.float64)
    readings = [copies.read(int(points[0]), zero, copies.hyper_probe(index)) for index in (0, 1)]
    pairs = zip(*(stated(reading.priors) for reading in readings), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _plain_terms(
    columns: Columns, points: Tensor, position: Tensor, wanted: Callable[[str], bool]
) -> dict[str, np.ndarray]:
    """log_prior of Gaussian latents from one run of the model per point, where there are no others."""
    copies, lead = columns.copies, tuple(position.shape[1:3])
    found: dict[str, list[Tensor]] = {}
    zero = torch.zeros(copies.num_x, dtype=torch.float64)
    for p, point in enumerate(points.tolist()):
        reading = copies.read(point, zero, zero[:0])
        flat = position[p].flatten(0, 1)
        for name in copies.plain:
            where, shape = columns.sites[name]
            value = flat[:, where].reshape(-1, *shape)
            density = reading.messages[name]["fn"].log_prob(value).reshape(len(flat), -1).sum(1)
            found.setdefault(f"log_prior/{name}", []).append(density.reshape(lead))
    return {key: torch.stack(value).numpy() for key, value in found.items() if wanted(key)}


def _tie_terms(
    columns: Columns, points: Tensor, position: Tensor, wanted: Callable[[str], bool]
) -> dict[str, np.ndarray]:
    """log_prior and tie_energy of tied statements from one run of the model per point: they do not move."""
    copies, lead = columns.copies, tuple(position.shape[1:3])
    found: dict[str, list[Tensor]] = {}
    zero = torch.zeros(copies.num_x, dtype=torch.float64)
    for p, point in enumerate(points.tolist()):
        reading = copies.read(point, zero, copies.hyper_probe(0))
        flat = position[p].flatten(0, 1)
        for name, prior in reading.priors.items():
            where, shape = columns.sites[name]
            step = max(1, _TOGETHER // math.prod(shape))
            terms = []
            for start in range(0, len(flat), step):
                part = flat[start : start + step]
                level = _level(columns, name, prior, part)
                terms.append(prior_terms(prior, part[:, where].reshape(-1, *shape), level))
            density, energy = (torch.cat(x) for x in zip(*terms, strict=True))
            found.setdefault(f"log_prior/{name}", []).append(density.reshape(lead))
            found.setdefault(f"tie_energy/{name}", []).append(energy.reshape(*lead, *energy.shape[1:]))
            law = prior.level_distribution
            if law is not None and not prior.level_may_be_fixed:
                value = law.log_prob(_level(columns, name, prior, flat))
                found.setdefault(f"log_prior/{columns.levels[name]}", []).append(value.reshape(lead))
    return {key: torch.stack(value).numpy() for key, value in found.items() if wanted(key)}


def summaries(columns: Columns, found: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Moments of rows, (P, width) or (P, quantiles, width) each, as ``{site}_{moment}``."""
    out = {}
    for name, (where, shape) in columns.sites.items():
        for kind, value in found.items():
            own = value[..., where]
            out[f"{name}_{kind}"] = own.reshape(*own.shape[:-1], *shape).numpy()
    return out


def _describe(columns: Columns, row: Tensor, inputs: Any, observed: bool, *, ties: bool) -> dict[str, Tensor]:
    copies, program = columns.copies, columns.copies.program
    parameters: dict[str, Tensor] = {}

    def see(msg: Any) -> None:
        base, site = base_distribution(msg["fn"]), msg["name"]
        for name in type(base).arg_constraints:
            value = base.__dict__.get(name)
            if isinstance(value, Tensor):
                parameters[f"parameter/{site}/{name}"] = value.expand(program.observed[site].shape)

    x = row[: copies.num_x]
    position = copies.position(x, row[columns.hyper])
    with GivenCopies(copies.given(x)) as given:
        if observed:
            lane = program.run_lane(position, inputs, on_observed=see)
        else:
            sites = {
                *copies.plain,
                *(n for n in program.deterministic if n not in columns.sites),
                *(copies.tied if ties else ()),
            }
            lane = program.run_lane(position, inputs, without=set(program.observed), until=sites)
    out = {f"posterior/{n}": m["value"] for n, m in lane.messages.items() if n not in program.observed}
    for name in program.observed if observed else ():
        out[f"log_likelihood/{name}"] = lane.log_densities[name]
    for name in copies.plain:
        out[f"log_prior/{name}"] = lane.log_densities[name].sum()
    for name, prior in given.priors.items() if ties else ():
        level = _level(columns, name, prior, row)
        where, shape = columns.sites[name]
        deviation, energy = prior_terms(prior, row[where].reshape(shape), level)
        out[f"log_prior/{name}"], out[f"tie_energy/{name}"] = deviation, energy
        law = prior.level_distribution
        if law is not None and not prior.level_may_be_fixed:
            out[f"log_prior/{columns.levels[name]}"] = law.log_prob(level).sum()
    return out | parameters


def _level(columns: Columns, name: str, prior: TiePrior, row: Tensor) -> Tensor:
    if name in columns.levels:
        where, shape = columns.sites[columns.levels[name]]
        return row[..., where].reshape((*row.shape[:-1], *shape))
    assert prior.known_level is not None
    return prior.known_level.expand((*row.shape[:-1], *prior.args.level_shape))


def prior_terms(prior: TiePrior, theta: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of the deviations, (), and the energy q, (*E), of copies (..., K, *E) beside their level.

    What `TiePrior.deviation_log_prob` and `TiePrior.energy` find from z.
    """
    args, tie, event_dim = prior.args, prior.tie, prior.args.event_dim
    sigma = args.sigma.expand(args.event_shape)
    soft = sigma > 0
    safe = torch.where(soft, sigma, 1.0)
    if args.event_scale_tril is not None:
        tril = args.event_scale_tril

        def whiten(value: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(tril, (value / safe)[..., None], upper=False)[..., 0]

        energy = sigma.square() * tie.energy(whiten(theta), whiten(level), event_dim=event_dim)
    else:
        energy = tie.energy(theta, level, event_dim=event_dim)
    square = energy / safe.square()
    if prior.form != "level":
        deviation = theta - prior.spread(level, "labels")
        scale = prior.spread(prior.base_scale, "labels")
        square = square + (deviation / scale).square().sum(-1 - event_dim)
    coefficients = prior.coefficient_scale().expand(tie.rank, *args.event_shape)
    logs = torch.where(coefficients > 0, coefficients, 1.0).log().sum(0)
    density = -0.5 * square - logs - 0.5 * tie.rank * math.log(2 * math.pi) - prior.log_volume()
    return sum_right(torch.where(soft, density, 0.0), event_dim), energy
