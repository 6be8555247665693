"""The prior of a tie in the coordinates of its copies: a sparse precision and a few dense directions.

log p(x) = -1/2 (x - m)^T P (x - m) - 1/2 sum_c (u_c^T (x - m))^2 / D_c + constant. P is L / sigma^2, with
I / s^2 in the forms `copies` and `matched`, an arrow around a hub. A level that is the mean of many copies
would fill P: it is a direction u = 1/K of variance D instead, 0 where the level is known. (Rue and Held 2005,
Gaussian Markov random fields, sections 2.3 and 3.2.)
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.distributions import Normal
from torch import Tensor

from bayestie._components import Complete
from bayestie._copy_coordinates import NotSparse
from bayestie._messages import base_distribution
from bayestie._tie_priors import TiePrior

_DENSE_COMPONENT = 16  # a mean over at most this many copies is written into P
_LISTED_EDGES = 40  # edges per copy up to which a complete graph is listed


@dataclass
class PriorPart:
    """One tied statement's share, at one strength; places are counted from the part's own first variable."""

    size: int
    row: list[np.ndarray] = field(default_factory=list)  # of P, either triangle; repeated places add up
    col: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    directions: list[tuple[np.ndarray, float]] = field(default_factory=list)  # places, each of weight 1 / len
    variances: list[float] = field(default_factory=list)
    constant: float = 0.0

    def add(self, row: Any, col: Any, value: Any) -> None:
        row, col, value = np.broadcast_arrays(row, col, value)
        self.row.append(row.ravel())
        self.col.append(col.ravel())
        self.value.append(value.ravel().astype(float))


@dataclass(frozen=True)
class Level:
    """The law of the levels: (c, E) flattened over the event; scale 0 is a known level."""

    loc: np.ndarray
    scale: np.ndarray

    @property
    def known(self) -> bool:
        return bool((self.scale == 0).all())


def level_of(prior: TiePrior) -> Level:
    """Mean and sd of each component's level, (c, E)."""
    shape = (prior.tie.num_components, math.prod(prior.args.event_shape))
    law = prior.level_distribution
    if law is None:
        assert prior.known_level is not None
        loc = prior.known_level.expand(prior.args.level_shape)
        return Level(loc.reshape(shape).cpu().numpy(), np.zeros(shape))
    if prior.level_may_be_fixed:
        loc, scale = prior.base_loc, prior.level_scale()
    else:
        base = base_distribution(law)
        if not isinstance(base, torch.distributions.Normal) and not isinstance(base, Normal):
            raise NotSparse(f"a level's base is {type(base).__name__}, not Normal")
        loc, scale = law.mean, law.variance.sqrt()
    full = [x.expand(prior.args.level_shape).reshape(shape).cpu().numpy() for x in (loc, scale)]
    if 0 < (full[1] == 0).sum() < full[1].size:
        raise NotSparse("some levels of a tied site are known and others are not")
    return Level(*full)


def is_hard(prior: TiePrior) -> bool:
    """Whether sigma = 0: the copies are their level."""
    zero = prior.args.sigma == 0
    if bool(zero.any()) and not bool(zero.all()):
        raise NotSparse("sigma is 0 for some event elements and not for others")
    return bool(zero.all())


def _per_event(value: Tensor, prior: TiePrior) -> np.ndarray:
    """(*E) or less -> (E,)."""
    return value.detach().expand(prior.args.event_shape).reshape(-1).cpu().numpy()


def hard_part(prior: TiePrior) -> PriorPart:
    """At sigma = 0: independent levels, (c, E); nothing where they are known."""
    level = level_of(prior)
    if level.known:
        return PriorPart(0)
    size = level.loc.size
    part = PriorPart(size, mean=level.loc.ravel())
    part.add(np.arange(size), np.arange(size), level.scale.ravel() ** -2)
    part.constant = float(-np.log(level.scale).sum() - 0.5 * size * math.log(2 * math.pi))
    return part


def copies_part(prior: TiePrior) -> PriorPart:
    """At sigma > 0: copies (K, E), then the levels (c, E) of hubs where these are not known.

    Raises:
        NotSparse: more directions than Woodbury's formula should carry, or a base that is not Normal.
    """
    tie, num_events = prior.tie, math.prod(prior.args.event_shape)
    level, num_copies = level_of(prior), tie.num_copies
    hubs = tie.layout.hub_mask.numpy()
    own_hub = np.full(tie.num_components, -1)
    if not level.known:
        own_hub[hubs] = num_copies + np.arange(int(hubs.sum()))
    part = PriorPart((num_copies + int((own_hub >= 0).sum())) * num_events)
    labels = tie.labels.numpy()
    part.mean = np.concatenate([level.loc[labels], level.loc[own_hub >= 0]]).ravel()
    precision, ridge = _deviation_precision(prior, level)
    _edges(part, prior, precision, ridge, own_hub)
    _levels(part, prior, level, precision, ridge, own_hub)
    part.constant += _log_norm(prior, level)
    return part


def _deviation_precision(prior: TiePrior, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Lambda (E, E) beside w_e and the ridge 1 / s^2 (c, E) of the forms `copies` and `matched`."""
    num_events = math.prod(prior.args.event_shape)
    inverse = 1.0 / _per_event(prior.args.sigma, prior)
    if prior.args.event_scale_tril is None:
        precision = np.diag(inverse**2)
    else:
        if len(prior.args.event_shape) != 1 or prior.args.event_scale_tril.dim() != 2:
            raise NotSparse("event_scale_tril has batch dims")
        tril = prior.args.event_scale_tril.detach().cpu().numpy()
        precision = np.linalg.inv(tril @ tril.T) * inverse[:, None] * inverse
    ridge = np.zeros((prior.tie.num_components, num_events))
    if prior.form != "level":
        scale = prior.base_scale.detach().expand(prior.args.level_shape)
        ridge += scale.reshape(ridge.shape).cpu().numpy() ** -2.0
    return precision, ridge


def _edges(
    part: PriorPart, prior: TiePrior, precision: np.ndarray, ridge: np.ndarray, own_hub: np.ndarray
) -> None:
    """L (x) Lambda with the ridge; a large complete graph as its diagonal, the rest in `_levels`."""
    tie, num_events = prior.tie, len(precision)
    events = [(e, f) for e in range(num_events) for f in range(num_events) if precision[e, f] != 0 or e == f]
    num_nodes = tie.num_copies + tie.num_components
    left, right, weight = _listed_edges(prior)
    is_hub = left >= tie.num_copies, right >= tie.num_copies
    node = np.arange(num_nodes)
    node[tie.num_copies :] = own_hub
    for e, f in events:
        w = weight * precision[e, f]
        if e == f:  # around a hub the ridge belongs to the deviation from it
            label = tie.labels.numpy()
            of_hub = ridge[label[np.where(is_hub[0], right, left) % tie.num_copies], e]
            w = w + np.where(is_hub[0] | is_hub[1], of_hub, 0.0)
        diagonal = np.zeros(num_nodes)
        for ends in (left, right):
            diagonal += np.bincount(ends, w, num_nodes)
        diagonal[: tie.num_copies] += _complete_diagonal(prior) * precision[e, f]
        if e == f:
            alone = ~tie.layout.hub_mask.numpy()[tie.labels.numpy()]
            diagonal[: tie.num_copies] += np.where(alone, ridge[tie.labels.numpy(), e], 0.0)
        kept = node >= 0
        if f <= e:
            part.add(node[kept] * num_events + e, node[kept] * num_events + f, diagonal[kept])
        kept = (node[left] >= 0) & (node[right] >= 0)
        if kept.any():
            part.add(node[left[kept]] * num_events + e, node[right[kept]] * num_events + f, -w[kept])


def _is_folded(component: Any) -> bool:
    return isinstance(component, Complete) and component.num_edges > _LISTED_EDGES * component.num_copies


def _listed_edges(prior: TiePrior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tie = prior.tie
    if not any(_is_folded(c) for c in tie.components):
        left, right = tie.edge_index.numpy()
        return left, right, tie.edge_weights.numpy()
    if len(tie.components) > 1:
        raise NotSparse("a large complete graph stands beside other components")
    return np.zeros(0, int), np.zeros(0, int), np.zeros(0)


def _complete_diagonal(prior: TiePrior) -> float:
    component = prior.tie.components[0]
    return float(component.eigenvalues()[0]) if _is_folded(component) else 0.0


def _levels(
    part: PriorPart,
    prior: TiePrior,
    level: Level,
    precision: np.ndarray,
    ridge: np.ndarray,
    own_hub: np.ndarray,
) -> None:
    """What holds the levels: hubs' own prior, the mean or the first copy of the other components."""
    tie, num_events = prior.tie, len(precision)
    folded = _complete_diagonal(prior)
    if folded and (precision != np.diag(precision.diagonal())).any():
        raise NotSparse("a large complete graph has correlated event elements")
    hub_at = np.flatnonzero(own_hub >= 0)
    if len(hub_at):
        places = own_hub[hub_at][:, None] * num_events + np.arange(num_events)
        part.add(places, places, level.scale[hub_at] ** -2.0)
    if prior.form == "copies" and not folded:
        return
    sizes: dict[int, list[int]] = {}
    for number, component in enumerate(tie.components):
        if not component.hub:
            sizes.setdefault(1 if component.anchored else component.num_copies, []).append(number)
    for size, numbers in sizes.items():
        copies = np.stack([tie.layout.copies[n].numpy()[:size] for n in numbers])  # (c, size)
        sd = level.scale[numbers]
        with np.errstate(divide="ignore"):
            held = np.where(sd > 0, sd**-2.0, np.inf)  # precision of the mean
        if prior.form != "level":  # the ridge holds it already
            held = (held if prior.form == "matched" else size * ridge[numbers]) - size * ridge[numbers]
        held = held - folded * size * precision.diagonal()
        _hold_means(part, copies, held, num_events)


def _hold_means(part: PriorPart, copies: np.ndarray, held: np.ndarray, num_events: int) -> None:
    """-1/2 held (mean - m)^2 for components of one size: in P where they are small, else a direction each."""
    size = copies.shape[1]
    dense = size <= _DENSE_COMPONENT and bool(np.isfinite(held).all())
    for e in range(num_events):
        places = copies * num_events + e
        if dense:
            row, col = np.tril_indices(size)
            part.add(places[:, row], places[:, col], held[:, e : e + 1] / size**2)
            continue
        for own, precision in zip(places, held[:, e], strict=True):
            if precision != 0:
                part.directions.append((own, 1.0 / size))
                part.variances.append(0.0 if math.isinf(precision) else 1.0 / float(precision))


def _log_norm(prior: TiePrior, level: Level) -> float:
    """log of what the exponential is multiplied by; a known mean counts as a delta function of it."""
    args, tie = prior.args, prior.tie
    half_log = 0.5 * math.log(2 * math.pi)
    shape = (tie.rank, *args.event_shape)
    scale = prior.coefficient_scale().expand(shape)
    total = -float(scale.log().sum()) - scale.numel() * half_log
    total -= float(prior.log_volume().expand(args.event_shape).sum())
    if level.known:
        means = sum(not part.hub for part in tie.components)
        return total - means * level.loc.shape[1] * half_log
    return total - float(np.log(level.scale).sum()) - level.scale.size * half_log
