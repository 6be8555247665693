"""Elementwise likelihoods as functions of their predictors: which there are, and their constants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import biject_to, constraints

from bayestie._program import LaneInputs, LaneProgram, base_distribution


def _constraints(base: Any) -> dict[str, Any] | None:
    """Constructor parameters of an elementwise distribution -> their map from the real line, if any."""
    if base.event_shape or not isinstance(getattr(type(base), "arg_constraints", None), dict):
        return None
    given = {n: c for n, c in type(base).arg_constraints.items() if n in base.__dict__}  # logits or probs
    return {n: _link(c) for n, c in given.items()}


def _link(constraint: Any) -> Any:
    if isinstance(constraint, type(constraints.real)) or constraints.is_dependent(constraint):
        return None
    try:
        return biject_to(constraint)
    except NotImplementedError:
        return None


def predictors_of(program: LaneProgram, position: Tensor, inputs: LaneInputs) -> dict[str, tuple[Any, dict]]:
    """Observed site -> (message, constructor parameters mapped to the real line)."""
    seen: dict[str, dict[str, Tensor]] = {}

    def see(msg: Any) -> None:
        # Before log_prob is called: after it, lazy parameters (logits of probs) are filled in too.
        base = base_distribution(msg["fn"])
        constraint = _constraints(base)
        if constraint is None:
            raise NotAffine(f"site '{msg['name']}' is not elementwise")
        seen[msg["name"]] = {
            name: getattr(base, name) if link is None else link.inv(getattr(base, name))
            for name, link in constraint.items()
        }

    lane = program.run_lane(position, inputs, without=set(program.observed), on_observed=see)
    return {name: (lane.messages[name], parameters) for name, parameters in seen.items()}


class NotAffine(Exception):
    """This model has no affine likelihood; the program route serves it."""


@dataclass(frozen=True)
class Family:
    """An elementwise likelihood as a function of its predictors (parameters on the real line)."""

    site: str
    distribution: type
    names: tuple[str, ...]  # parameters that are functions of the latents
    links: tuple[Any, ...]  # transform predictor -> parameter; None is the identity
    # The other parameters, the data, its scale, mask and weight: (S, *shape), or (1, *shape) where all
    # points agree.
    constants: dict[str, Tensor]
    shape: torch.Size

    def select(self, points: Tensor) -> dict[str, Tensor]:
        """The constants of some points, ready to broadcast against (P, batch, *shape)."""
        here = {
            name: x.unsqueeze(1) if len(x) == 1 else x[points].unsqueeze(1)
            for name, x in self.constants.items()
        }
        return self._without_trifles(here)

    @staticmethod
    def _without_trifles(here: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scales and masks that are one everywhere cost two passes over all observations: dropped."""
        if all(bool((here[name] == 1).all()) for name in _MESSAGE[1:]):
            here = {name: x for name, x in here.items() if name not in _MESSAGE[1:]}
        return here

    def at(self, points: Tensor, rows: Tensor, predictors: Sequence[Tensor]) -> Tensor:
        """The same for single observations: points and rows (n,), predictors (n, batch)."""
        here = {}
        for name, x in self.constants.items():
            flat = x.reshape(len(x), -1)
            here[name] = (flat[0, rows] if len(x) == 1 else flat[points, rows]).unsqueeze(1)
        return self.log_density(here, predictors)

    def log_density(self, here: dict[str, Tensor], predictors: Sequence[Tensor]) -> Tensor:
        """Elementwise log density, summed over nothing, at constants that broadcast with the predictors."""
        fixed = {name: x for name, x in here.items() if name not in _MESSAGE}
        parameters = {
            n: eta if link is None else link(eta)
            for n, link, eta in zip(self.names, self.links, predictors, strict=True)
        }
        log_density = self.distribution(**parameters, **fixed, validate_args=False).log_prob(here["<value>"])
        if "<scale>" not in here:
            return log_density
        scale: Any = here["<scale>"] * here["<weight>"]
        return scale_and_mask(log_density, scale, here["<mask>"].bool())


_MESSAGE = ("<value>", "<scale>", "<mask>", "<weight>")


def find_families(program: LaneProgram, position: Tensor) -> list[Family]:
    """The likelihood sites whose parameters move with the latents, with their constants at every point."""
    first = program.point(0)
    with program.quiet():
        here, there = (predictors_of(program, at, first) for at in (position[0], position[0] + 0.37))
    families = []
    for name, (msg, parameters) in here.items():
        base = base_distribution(msg["fn"])
        moving = tuple(n for n, x in parameters.items() if not torch.equal(x, there[name][1][n]))
        if not moving:
            continue
        links = tuple(_link(type(base).arg_constraints[n]) for n in moving)
        shape = torch.Size(np.broadcast_shapes(base.batch_shape, msg["value"].shape))
        still = tuple(n for n in parameters if n not in moving)
        constants = _constants(program, name, still, shape, position)
        families.append(Family(name, type(base), moving, links, constants, shape))
    return families


def _constants(
    program: LaneProgram, site: str, names: tuple[str, ...], shape: torch.Size, position: Tensor
) -> dict[str, Tensor]:
    inputs = program.points

    def one(u: Tensor, *flat: Tensor) -> dict[str, Tensor]:
        own = inputs.unflatten(flat)
        msg = predictors_of(program, u, own)[site][0]
        base = base_distribution(msg["fn"])
        mask = True if msg["mask"] is None else msg["mask"]
        found = [msg["value"], msg["scale"], mask, own.weights.get(site, 1.0)]
        found += [getattr(base, n) for n in names]
        tensors = [torch.as_tensor(x, device=u.device).to(u.dtype).expand(shape) for x in found]
        return dict(zip((*_MESSAGE, *names), tensors, strict=True))

    with program.quiet():
        values = torch.vmap(one)(position, *inputs.flat())
    alike = {n: ((x == x[:1]) | (torch.isnan(x) & torch.isnan(x[:1]))).all() for n, x in values.items()}
    return {n: x[:1] if bool(alike[n]) else x for n, x in values.items()}
