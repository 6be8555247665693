"""Draws of a lane program -> named arrays: sites, log likelihood, log prior, tie energies, predictions."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._lane import LaneInputs
from bayestie._messages import base_distribution
from bayestie._program import LaneProgram
from bayestie._run_context import seeded

PREDICTIVE_DRAWS = 100  # posterior predictive draws kept per strength
# Numbers of one lane batch: large enough to pay for a run of the model, small enough to stay near the cores.
ELEMENTS = 1_000_000


@dataclass(frozen=True)
class TieUse:
    """A `tied` statement of the model: the tie, its form and how its strength depends on the sweep."""

    name: str
    about: dict[str, Any]

    @property
    def tie(self) -> Any:
        return self.about["tie"]


def tie_uses(program: LaneProgram) -> list[TieUse]:
    """The tied statements, as the validated run saw them."""
    return [
        TieUse(name, dict(site.infer["bayestie"]))
        for name, site in program.deterministic.items()
        if "bayestie" in site.infer
    ]


def describe_lane(
    program: LaneProgram, position: Tensor, inputs: LaneInputs, observed: bool
) -> dict[str, Tensor]:
    """What the results keep of one draw, by group/name: all of it, or what needs no observed site.

    A model states its likelihood last, and that is where its work is: it is left before.
    """
    parameters: dict[str, Tensor] = {}

    def see(msg: Any) -> None:
        base, site = base_distribution(msg["fn"]), msg["name"]
        if program.observed_families[site] is None:
            return
        for name, constraint in type(base).arg_constraints.items():
            value = base.__dict__.get(name)
            if isinstance(value, Tensor):
                # Of a Categorical, an observation has a vector of logits.
                own = value.shape[value.dim() - constraint.event_dim :]
                parameters[f"parameter/{site}/{name}"] = value.expand((*program.observed[site].shape, *own))

    if observed:
        lane = program.run_lane(position, inputs, on_observed=see)
    else:
        sites = {*program.latent, *program.deterministic}
        lane = program.run_lane(position, inputs, without=set(program.observed), until=sites)
    out: dict[str, Tensor] = {}
    for name in (*program.latent, *program.deterministic):
        out[f"posterior/{name}"] = lane.messages[name]["value"]
    for name in program.observed if observed else ():
        out[f"log_likelihood/{name}"] = lane.log_densities[name]
    tied_z = set()
    for name in program.deterministic:
        about = lane.messages[name]["infer"].get("bayestie")
        if about is None:
            continue
        prior, z = about["prior"], about["z"]
        tied_z.add(f"{name}_z")
        event = tuple(about["event_shape"])
        zero = position.new_zeros(())
        out[f"log_prior/{name}"] = zero if z is None else prior.deviation_log_prob(z)
        out[f"tie_energy/{name}"] = zero.expand(event) if z is None else prior.energy(z).expand(event)
    for name in program.latent:
        if name not in tied_z:
            out[f"log_prior/{name}"] = lane.log_densities[name].sum()
    return out | parameters


def quantities(program: LaneProgram, points: Tensor, position: Tensor, names: Sequence[str] = ()) -> Tensor:
    """Posterior variables, all or those ``names``, of draws (P, chains, draws, D) as columns (..., Q)."""
    chosen = {f"posterior/{name}" for name in names}

    def wanted(key: str) -> bool:
        return key in chosen if chosen else key.startswith("posterior/")

    lead, out = position.shape[:-1], position.new_empty(0)
    for part, values in _parts(program, points, position, wanted):
        columns = [x.reshape(len(x), -1) for x in values.values() if x.is_floating_point()]
        if not len(out):
            out = columns[0].new_empty(math.prod(lead), sum(x.shape[1] for x in columns))
        torch.cat(columns, 1, out=out[part])
    return out.reshape(*lead, out.shape[-1])


def collect(
    program: LaneProgram, points: Tensor, position: Tensor, wanted: Callable[[str], bool]
) -> dict[str, np.ndarray]:
    """Arrays (P, chains, draws, ...) by group/name, for the groups and names that ``wanted`` accepts."""

    def chosen(key: str) -> bool:
        # With enumerated sites an observation's density is a sum over them, not one site's own.
        own = not (program.enumerated and key.startswith(("log_likelihood/", "parameter/")))
        return own and wanted(key)

    return {key: x.cpu().numpy() for key, x in _vectorised(program, points, position, chosen).items()}


def _vectorised(
    program: LaneProgram, points: Tensor, position: Tensor, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    lead, arrays = position.shape[:-1], dict[str, Tensor]()
    for part, values in _parts(program, points, position, wanted):
        for key, value in values.items():
            if key not in arrays:
                arrays[key] = value.new_empty((math.prod(lead), *value.shape[1:]))
            arrays[key][part] = value
    return {key: x.reshape(*lead, *x.shape[1:]) for key, x in arrays.items()}


def _parts(
    program: LaneProgram, points: Tensor, position: Tensor, wanted: Callable[[str], bool]
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """What is wanted of so many draws at a time as lanes, by group/name."""
    lead = position.shape[:-1]
    flat = position.reshape(-1, position.shape[-1])
    index = points.repeat_interleave(math.prod(lead[1:]))
    observed = any(wanted(key) for key in _observed_keys(program))
    rows = program.num_latent + sum(math.prod(site.shape) for site in program.deterministic.values())
    if observed:
        rows += sum(v.numel() for v in program.observed_values.values())
    chunk = max(1, min(len(flat), ELEMENTS // max(1, rows)))
    for start in range(0, len(flat), chunk):
        part = slice(start, min(start + chunk, len(flat)))
        inputs = program.point_inputs(index[part])
        with torch.no_grad(), program.quiet():
            values = _lanes(program, flat[part], inputs, wanted, observed)
        yield part, values


def _observed_keys(program: LaneProgram) -> list[str]:
    """A key of every group that only the observed sites give."""
    return [f"{group}/{name}" for name in program.observed for group in ("log_likelihood", "parameter")]


def _lanes(
    program: LaneProgram,
    position: Tensor,
    inputs: LaneInputs,
    wanted: Callable[[str], bool],
    observed: bool,
) -> dict[str, Tensor]:
    def one(u: Tensor, *flat: Tensor) -> dict[str, Tensor]:
        found = describe_lane(program, u, inputs.unflatten(flat), observed)
        return {key: value for key, value in found.items() if wanted(key)}

    if program.loop_reason is None:
        return torch.vmap(one)(position, *inputs.flat())
    rows = [one(position[i], *(x[i] for x in inputs.flat())) for i in range(len(position))]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def predict(program: LaneProgram, name: str, parameters: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """Draws of an observed site from its distribution's parameters, each (..., *site shape).

    Drawn outside vmap, where every distribution can sample.
    """
    tensors = {key: torch.as_tensor(value) for key, value in parameters.items()}
    family: Any = program.observed_families[name]
    with seeded(seed, torch.device("cpu")), program.quiet():
        return family(**tensors, validate_args=False).sample().numpy()
