"""Elementwise likelihoods as functions of their predictors: which there are, and their constants."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import ExpTransform, biject_to, constraints

from bayestie._lane import LaneInputs
from bayestie._messages import base_distribution
from bayestie._program import LaneProgram


def _constraints(base: Any) -> dict[str, Any] | None:
    """Constructor parameters of an elementwise distribution -> their map from the real line, if any."""
    if base.event_shape or not isinstance(getattr(type(base), "arg_constraints", None), dict):
        return None
    given = {n: c for n, c in type(base).arg_constraints.items() if n in base.__dict__}  # logits or probs
    return {n: link_of(c) for n, c in given.items()}


def link_of(constraint: Any) -> Any:
    """The map from the real line to a parameter's values; None is the identity, or none is known."""
    if isinstance(constraint, type(constraints.real)) or constraints.is_dependent(constraint):
        return None
    if getattr(constraint, "lower_bound", None) == 0 and not hasattr(constraint, "upper_bound"):
        return ExpTransform()  # biject_to would compose it with a shift by zero
    try:
        return biject_to(constraint)
    except NotImplementedError:
        return None  # torch registers no map for it: the parameter itself is tried as the predictor


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
class Cumulant:
    """A of a natural likelihood: log p = target eta - weight A(eta) + constant.

    The methods that end in an underscore overwrite what they are given: they are the innermost loop of every
    sweep. They may overflow to infinity far out, where `value` does not.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    value_: Callable[[Tensor], Tensor]
    total_: Callable[[Tensor], Tensor]  # of rows (P, M, batch): summed over M
    # (eta, work) -> A(eta), written to work; eta becomes limit - A'(eta)
    value_and_slope_: Callable[[Tensor, Tensor], Tensor]
    limit: float
    curvature: Callable[[Tensor], Tensor]
    at_zero: float


def _logistic_value_and_slope(eta: Tensor, work: Tensor) -> Tensor:
    odds = eta.exp_().add_(1.0)
    torch.log(odds, out=work)
    odds.reciprocal_()
    return work


def _poisson_value_and_slope(eta: Tensor, work: Tensor) -> Tensor:
    torch.exp(eta, out=work)
    torch.neg(work, out=eta)
    return work


def _gaussian_value_and_slope(eta: Tensor, work: Tensor) -> Tensor:
    torch.mul(eta, eta, out=work).mul_(0.5)
    eta.neg_()
    return work


_FACTORS = 8  # whose logarithms are taken as one


def _logistic_total(eta: Tensor) -> Tensor:
    odds = eta.exp_().add_(1.0)
    whole = odds.shape[1] // _FACTORS * _FACTORS
    products = odds[:, :whole].unflatten(1, (-1, _FACTORS)).prod(2) if whole else odds[:, :0]
    return products.log_().sum(1) + odds[:, whole:].log_().sum(1)


_LOGISTIC = Cumulant(
    "logistic",
    torch.nn.functional.softplus,
    lambda eta: eta.exp_().add_(1.0).log_(),
    _logistic_total,
    _logistic_value_and_slope,
    1.0,
    lambda eta: 0.25 / torch.cosh(0.5 * eta).square(),
    math.log(2.0),
)
_POISSON = Cumulant(
    "poisson",
    torch.exp,
    torch.exp_,
    lambda eta: eta.exp_().sum(1),
    _poisson_value_and_slope,
    0.0,
    torch.exp,
    1.0,
)
_GAUSSIAN = Cumulant(
    "gaussian",
    lambda eta: 0.5 * eta.square(),
    lambda eta: eta.square_().mul_(0.5),
    lambda eta: 0.5 * eta.square_().sum(1),
    _gaussian_value_and_slope,
    0.0,
    torch.ones_like,
    0.0,
)


@dataclass(frozen=True)
class Natural:
    """log p of a whole site = sum of target eta - weight A(eta), plus constant."""

    cumulant: Cumulant
    target: Tensor  # (S, M), or (1, M) where all points agree
    weight: Tensor | None  # the same, or None where it is one everywhere
    constant: Tensor  # (S,) or (1,), summed over the site

    @property
    def is_gaussian(self) -> bool:
        return self.cumulant is _GAUSSIAN


@dataclass(frozen=True)
class Family:
    """An elementwise likelihood as a function of its predictors (parameters on the real line)."""

    site: str
    distribution: type
    names: tuple[str, ...]  # parameters that are functions of the latents
    links: tuple[Any, ...]  # transform predictor -> parameter; None is the identity
    # The other parameters, the data, its scale, mask and weight: (S, M), or (1, M) where all points agree.
    constants: dict[str, Tensor]
    shape: torch.Size

    @property
    def size(self) -> int:
        """Observations M."""
        return self.shape.numel()

    def select(self, points: Tensor) -> dict[str, Tensor]:
        """The constants of some points, ready to broadcast against predictors (P, M, batch)."""
        here = {
            name: x.unsqueeze(-1) if len(x) == 1 else x[points].unsqueeze(-1)
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
        here = {
            name: (x[0, rows] if len(x) == 1 else x[points, rows]).unsqueeze(1)
            for name, x in self.constants.items()
        }
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

    def natural(self) -> Natural | None:
        """The form linear in the predictor but for one convex function of it, where the family has it."""
        constants = self.constants
        value = constants["<value>"]
        scale = constants["<scale>"] * constants["<weight>"] * constants["<mask>"]
        if len(self.names) != 1:
            return None
        name, link = self.names[0], self.links[0]
        kind = self.distribution
        if name == "logits" and link is None and issubclass(kind, torch.distributions.Bernoulli):
            cumulant, weight, target = _LOGISTIC, scale, scale * value
        elif name == "logits" and link is None and issubclass(kind, torch.distributions.Binomial):
            count = constants["total_count"]
            cumulant, weight, target = _LOGISTIC, scale * count, scale * value
        elif (
            isinstance(link, ExpTransform)
            and name == "rate"
            and issubclass(kind, torch.distributions.Poisson)
        ):
            cumulant, weight, target = _POISSON, scale, scale * value
        elif name == "loc" and link is None and issubclass(kind, torch.distributions.Normal):
            weight = scale / constants["scale"].square()
            cumulant, target = _GAUSSIAN, weight * value
        else:
            return None
        at_zero = self.log_density(constants, [torch.zeros_like(target)]) + weight * cumulant.at_zero
        plain = bool((weight == 1.0).all())
        return Natural(cumulant, target, None if plain else weight, at_zero.sum(-1))


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
        links = tuple(link_of(type(base).arg_constraints[n]) for n in moving)
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
    return {n: (x[:1] if bool(alike[n]) else x).reshape(-1, shape.numel()) for n, x in values.items()}
