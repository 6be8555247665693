"""A model run in one lane: latents from a flat unconstrained vector, the log joint density added up."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from bayestie._messages import (
    cast_outcomes,
    filled,
    given_rows,
    is_deterministic,
    is_enumerated,
    is_subsample,
    weight_of_rows,
)


@dataclass(frozen=True)
class Site:
    """One latent, observed or deterministic statement of the model, as the validated run saw it."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[str | None, ...]  # plate name of each axis; None where no plate claims it
    is_discrete: bool
    infer: Mapping[str, Any]
    unconstrained_shape: tuple[int, ...] = ()
    start: int = 0  # where the site begins in the flat unconstrained vector

    @property
    def size(self) -> int:
        return math.prod(self.unconstrained_shape)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class LaneInputs:
    """What may differ from lane to lane beside the position; every tensor leads with the lane axis."""

    swept: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # observed site -> weight per observation
    data: Mapping[str, Tensor] = field(default_factory=dict)  # model argument -> its value

    def take(self, index: Tensor) -> "LaneInputs":
        """The inputs of the lanes in ``index``, repeated or reordered as it says."""
        return LaneInputs(*({name: x[index] for name, x in part.items()} for part in self._parts()))

    def _parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]:
        return self.swept, self.weights, self.data

    def flat(self) -> list[Tensor]:
        return [x for part in self._parts() for x in part.values()]

    def unflatten(self, tensors: Sequence[Tensor]) -> "LaneInputs":
        rest = iter(tensors)
        return LaneInputs(*({name: next(rest) for name in part} for part in self._parts()))

    def key(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(part) for part in self._parts())


class Enough(Exception):
    """Every site asked for has been seen: the rest of the model need not run."""


class Lane(Messenger):
    """Gives latent sites their value from a flat vector and adds up the log joint density.

    Entered first, so that plates, scales and masks of the model have acted on a message before it is
    seen here. Plates named in ``rows`` hold those rows, and Pyro scales their densities by size / len(rows).
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        position: Tensor,
        weights: Mapping[str, Tensor],
        without: Set[str] = frozenset(),
        on_observed: Callable[[Any], None] | None = None,
        fills: Mapping[str, Tensor] | None = None,
        imputed: Mapping[str, str] | None = None,
        until: Set[str] | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.sites, self.position, self.weights = sites, position, weights
        self.until, self.rows = until, rows or {}
        self.without, self.on_observed = without, on_observed
        self.fills, self.imputed = fills or {}, imputed or {}
        self.log_jacobian = position.new_zeros(())
        self.log_densities: dict[str, Tensor] = {}  # site -> elementwise, scaled and masked
        self.messages: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            cast_outcomes(msg)
        if msg["is_observed"] or msg["done"] or given_rows(msg, self.rows) or is_subsample(msg):
            return
        if is_enumerated(msg):
            # Summed out by poutine.enum where the density is asked for; any category does elsewhere.
            msg["value"], msg["done"] = msg["fn"].enumerate_support(expand=True)[0], True
            return
        site = self.sites[msg["name"]]
        x = self.position[site.slice].reshape(site.unconstrained_shape)
        # The transform is rebuilt from the site's own support, so a support that depends on other
        # sites or on a swept keyword is right in every lane.
        transform = biject_to(msg["fn"].support)
        msg["value"] = transform(x)
        msg["done"] = True
        self.log_jacobian = self.log_jacobian + transform.log_abs_det_jacobian(x, msg["value"]).sum()

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            return
        name = msg["name"]
        msg = self.mended(msg)
        self.messages[name] = msg
        self._score(name, msg)
        if self.until is not None and self.until <= self.messages.keys():
            raise Enough

    def _score(self, name: str, msg: Any) -> None:
        if is_deterministic(msg):
            return
        if self.on_observed is not None and name not in self.sites and not isinstance(msg["fn"], dist.Unit):
            self.on_observed(msg)
        if name in self.without:
            return
        weight = self.weights.get(name)
        if weight is not None:
            msg["scale"] = msg["scale"] * weight_of_rows(msg, weight, self.rows)
        log_density = msg["fn"].log_prob(msg["value"])
        self.log_densities[name] = scale_and_mask(log_density, msg["scale"], msg["mask"])

    def mended(self, msg: Any) -> Any:
        """The message as it is scored, where masks need care; the model itself sees no difference.

        An observation that is masked out may be NaN: its density is dropped, but its gradient would
        stay NaN, so it is scored at a value that the site did observe. A latent that obs_mask= made for
        an observation that is there enters nothing else; scored by its prior, it integrates to one,
        where without a density it would be a flat direction.
        """
        name = msg["name"]
        if name in self.fills:
            return {**msg, "value": filled(msg, self.fills[name])}
        if name in self.imputed:
            return {**msg, "mask": msg["mask"] | self.messages[self.imputed[name]]["mask"]}
        return msg

    def log_joint(self) -> Tensor:
        total = self.log_jacobian
        for log_density in self.log_densities.values():
            total = total + log_density.sum()
        return total
