"""The density of models whose likelihood sees the latents only through predictors eta = A u + b.

Generalised linear models, whatever their latents' priors. A and b are found once per point and checked; then
a gradient is two matrix products and an elementwise function, and curvature is A^T W A.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from bayestie._affine_parts import Part
from bayestie._density import MAX_ELEMENTS, triangular_axes
from bayestie._families import Family
from bayestie._latent_scale import LatentScale, ScaleSite, latent_scale
from bayestie._linear_map import Gram, LinearMap
from bayestie._noise_axes import NoiseAxes, find_noise_axes
from bayestie._program import LaneProgram
from bayestie._quadratic import Quadratic
from bayestie._workers import WORTH_A_THREAD, in_worker, run_all, scratch

# Predictors worked on at once on a CPU: what its cache holds. A GPU takes MAX_ELEMENTS.
_CACHED_ELEMENTS = 1 << 18
_NARROWEST = 16  # draws worked on at once, at least
_REMEMBERED = 3  # sets of points whose maps are kept


@dataclass(frozen=True)
class _Selection:
    """An affine density's parts at some points."""

    points: Tensor
    map: LinearMap
    parts: list[Part]
    linear: Tensor  # (P, D): of the natural forms, target A
    pull: Tensor  # (P, D): the constant part of their gradient, (target - limit weight) A
    constant: Tensor  # (P,)
    quadratic: Quadratic | None
    latent_scale: LatentScale | None


class AffineDensity:
    """The density of a model whose likelihood depends on the latents through eta = A u + b alone.

    The rest of the log joint (priors, Jacobians, factors) is a quadratic in u where it is one
    (Gaussian priors), else the lane program with the likelihood left out. Gaussian likelihoods of known
    scale join the quadratic.
    """

    route = "affine"

    def __init__(
        self,
        program: LaneProgram,
        families: Sequence[Family],
        matrix: Tensor,
        offset: Tensor,
        rest: Callable[..., Any],
        rest_hessian: Callable[..., Tensor],
        quadratic: Quadratic | None,
        scale_site: ScaleSite | None = None,
    ):
        self.program, self.num_latent = program, program.num_latent
        self.families, self.matrix, self.offset = list(families), matrix, offset  # (S, M, D), (S, M)
        self.naturals = [family.natural() for family in families]
        self._rest, self._rest_hessian, self.quadratic = rest, rest_hessian, quadratic
        self.latent_scale: LatentScale | None = None
        self._gram: Gram | None = None
        self._selections: list[tuple[Tensor, list[tuple[slice, _Selection]]]] = []
        if scale_site is not None:
            self.latent_scale = latent_scale(scale_site, families, matrix, offset)
            self._drop(scale_site.families)
        if quadratic is not None:
            self._absorb(quadratic)
        self.elements = MAX_ELEMENTS if program.device.type == "cuda" else _CACHED_ELEMENTS

    def _absorb(self, quadratic: Quadratic) -> None:
        """Gaussian likelihoods into the quadratic, written about its own top where it is all there is."""
        points = torch.arange(self.program.num_points, device=self.matrix.device)
        parts = self._parts(points)
        absorbed = [
            (part, part.natural) for part in parts if part.natural is not None and part.natural.is_gaussian
        ]
        if not absorbed:
            return
        curvature, slope = quadratic.curvature, quadratic.slope
        for part, natural in absorbed:
            matrix, offset = self.matrix[:, part.rows], self.offset[:, part.rows].unsqueeze(-1)
            weight = torch.ones_like(offset[:1]) if part.weight is None else part.weight
            pull = (natural.target.unsqueeze(-1) - weight * offset).expand(len(matrix), -1, 1)
            slope = slope + torch.bmm(matrix.mT, pull).squeeze(-1)
            curvature = curvature - torch.bmm((matrix * weight).mT, matrix)
        centre = quadratic.centre
        if len(absorbed) == len(parts) and self.latent_scale is None:
            factor, info = torch.linalg.cholesky_ex(-curvature)
            top = centre + torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
            usable = (info == 0) & torch.isfinite(top).all(-1)
            centre = torch.where(usable.unsqueeze(-1), top, centre)
        # Value and slope at the centre from the sites themselves: sums of squared residuals, which keep the
        # digits that expanding the square about the origin would lose.
        constant, slope = (x.squeeze(1) for x in self._rest(points, centre.unsqueeze(1)))
        eta = torch.baddbmm(self.offset.unsqueeze(-1), self.matrix, centre.unsqueeze(-1))
        for part, _ in absorbed:
            plain = replace(part, natural=None)
            constant = constant + plain.value_and_slope_(eta, eta).squeeze(-1)
            slope = slope + torch.bmm(self.matrix[:, part.rows].mT, eta[:, part.rows]).squeeze(-1)
        self.quadratic = Quadratic(centre, constant, slope, curvature)
        self._drop([i for i, n in enumerate(self.naturals) if n is not None and n.is_gaussian])

    def _drop(self, numbers: Sequence[int]) -> None:
        """Leave out families that are accounted for elsewhere, with their predictors."""
        rows, start = torch.ones(self.matrix.shape[1], dtype=torch.bool, device=self.matrix.device), 0
        for number, family in enumerate(self.families):
            stop = start + family.size * len(family.names)
            rows[start:stop] = number not in numbers
            start = stop
        self.matrix, self.offset = self.matrix[:, rows], self.offset[:, rows]
        kept = [i for i in range(len(self.families)) if i not in numbers]
        self.families = [self.families[i] for i in kept]
        self.naturals = [self.naturals[i] for i in kept]

    def _parts(self, points: Tensor) -> list[Part]:
        parts, start = [], 0
        for family, natural in zip(self.families, self.naturals, strict=True):
            stop = start + family.size * len(family.names)
            weight = None
            if natural is not None and natural.weight is not None:
                weight = natural.weight if len(natural.weight) == 1 else natural.weight[points]
                weight = weight.unsqueeze(-1)
            parts.append(Part(slice(start, stop), family, family.select(points), natural, weight))
            start = stop
        return parts

    def _pieces(self, points: Tensor) -> list[tuple[slice, _Selection]]:
        """Points by as many as the cache holds, with what the density needs of them.

        Engines ask for the same points thousands of times, or for fewer and fewer.
        """
        for known, pieces in self._selections:
            if known is points or torch.equal(known, points):
                return pieces
        together = max(1, self.elements // (max(1, self.matrix.shape[1]) * _NARROWEST))
        if self.matrix.device.type == "cpu":  # a share for every thread
            together = min(together, -(-len(points) // torch.get_num_threads()))
        starts = range(0, len(points), together)
        pieces = [(slice(i, i + together), self._select(points[i : i + together])) for i in starts]
        self._selections = [(points, pieces), *self._selections[: _REMEMBERED - 1]]
        return pieces

    def _select(self, points: Tensor) -> _Selection:
        matrix, offset, parts = self.matrix[points], self.offset[points], self._parts(points)
        linear, steady, constant = self.natural_sums(points)
        quadratic = None if self.quadratic is None else self.quadratic.take(points)
        scale = None if self.latent_scale is None else self.latent_scale.take(points)
        pull = linear - steady
        return _Selection(points, LinearMap(matrix, offset), parts, linear, pull, constant, quadratic, scale)

    def natural_sums(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the natural forms, target A (P, D), limit weight A (P, D), and what is constant of them (P,)."""
        matrix, offset = self.matrix[points], self.offset[points]
        linear, constant = matrix.new_zeros(len(points), self.num_latent), matrix.new_zeros(len(points))
        steady = linear
        for part in self._parts(points):
            if part.natural is None:
                continue
            n, own = part.natural, matrix[:, part.rows]
            target = (n.target if len(n.target) == 1 else n.target[points]).expand(len(points), -1)
            weight = torch.ones_like(target) if part.weight is None else part.weight.squeeze(-1)
            limit = (n.cumulant.limit * weight).expand(len(points), -1)
            linear = linear + torch.bmm(target.unsqueeze(1), own).squeeze(1)
            steady = steady + torch.bmm(limit.unsqueeze(1), own).squeeze(1)
            here = n.constant if len(n.constant) == 1 else n.constant[points]
            constant = constant + here + (target * offset[:, part.rows]).sum(1)
        return linear, steady, constant

    def _jobs(self, points: Tensor, position: Tensor) -> Iterator[tuple[_Selection, slice, slice]]:
        """Points and draws that are worked on together, small enough for the cache."""
        for some, here in self._pieces(points):
            batch = max(_NARROWEST, self.elements // (max(1, self.matrix.shape[1]) * len(here.points)))
            for start in range(0, position.shape[1], batch):
                yield here, some, slice(start, start + batch)

    @functools.cached_property
    def noise_axes(self) -> NoiseAxes | None:
        """Axes that make single numbers of everything, where all is Gaussian given one noise."""
        if self.latent_scale is None or self.quadratic is None or self.families:
            return None
        with torch.no_grad():
            return find_noise_axes(self.latent_scale, self.quadratic)

    @property
    def is_threadable(self) -> bool:
        """Whether no model runs in it any more."""
        return self.quadratic is not None

    @property
    def is_skew_along_axes(self) -> bool:
        """Only the likelihoods are skew, each along its predictors."""
        return self.quadratic is not None and self.latent_scale is None

    def _is_much(self, position: Tensor) -> bool:
        lanes = position.numel() // max(1, self.num_latent)
        return lanes * (self.num_latent + sum(f.size for f in self.families)) >= WORTH_A_THREAD

    def _run(self, jobs: list[Callable[[], None]], is_much: bool = True) -> None:
        """Pieces of work, on all cores where there is much of it."""
        with torch.no_grad(), contextlib.nullcontext() if in_worker() else self.program.quiet():
            if self.is_threadable and is_much:
                run_all(jobs)
            else:
                for job in jobs:
                    job()

    def value(self, points: Tensor, position: Tensor) -> Tensor:
        """log density, (P, batch)."""
        out = position.new_empty(position.shape[:2])

        def job(here: _Selection, some: slice, draws: slice) -> None:
            out[some, draws] = self._value(here, position[some, draws])

        self._run([partial(job, *piece) for piece in self._jobs(points, position)], self._is_much(position))
        return out

    def _value(self, here: _Selection, position: Tensor) -> Tensor:
        value = self._rest_of(here, position)[0]
        if here.parts:
            eta = self._predictors(here, position)
            value = value + self._linear(here, position) + sum(part.value_(eta) for part in here.parts)
            value = self._finite(here, position, value)
        return value

    def value_and_grad(self, points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """log density (P, batch) and gradient (P, batch, D)."""
        value, grad = position.new_empty(position.shape[:2]), torch.empty_like(position)

        def job(here: _Selection, some: slice, draws: slice) -> None:
            value[some, draws], grad[some, draws] = self._value_and_grad(here, position[some, draws])

        self._run([partial(job, *piece) for piece in self._jobs(points, position)], self._is_much(position))
        return value, grad

    def _value_and_grad(self, here: _Selection, position: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self._rest_of(here, position)
        if here.parts:
            eta = self._predictors(here, position)
            work = scratch("work", tuple(eta.shape), eta)
            value = value + self._linear(here, position)
            value = value + sum(part.value_and_slope_(eta, work) for part in here.parts)
            grad = grad + here.pull.unsqueeze(1) + here.map.backward(eta)
            value = self._finite(here, position, value)
        return value, grad

    @staticmethod
    def _predictors(here: _Selection, position: Tensor) -> Tensor:
        shape = (*here.map.shape[:2], position.shape[1])
        return here.map.forward(position, out=scratch("predictors", shape, position))

    @staticmethod
    def _linear(here: _Selection, position: Tensor) -> Tensor:
        """The natural forms' linear part, (P, batch)."""
        return here.constant.unsqueeze(1) + torch.bmm(position, here.linear.unsqueeze(-1)).squeeze(-1)

    def _finite(self, here: _Selection, position: Tensor, value: Tensor) -> Tensor:
        """Values again by the distributions themselves where the short forms overflowed."""
        far = ~torch.isfinite(value).all(1)
        if not bool(far.any()):
            return value
        value = value.clone()
        for i in torch.nonzero(far).squeeze(1).tolist():
            one = self._select(here.points[i : i + 1])
            eta = self._predictors(one, position[i : i + 1])
            total = self._rest_of(one, position[i : i + 1])[0]
            value[i] = (total + sum(replace(p, natural=None).value_(eta) for p in one.parts))[0]
        return value

    def hessian(self, points: Tensor, position: Tensor) -> Tensor:
        """Second derivatives (P, D, D) at one position per point (P, D)."""
        hessian = self._prior_hessian(points, position).clone()
        if not self.families:
            return hessian
        if self._gram is None:
            self._gram = Gram(self.matrix)
        eta = self._moved(points, position.unsqueeze(-1)) + self.offset[points].unsqueeze(-1)
        weight = torch.zeros_like(eta).squeeze(-1)
        with self.program.quiet():
            for part in self._parts(points):
                if part.natural is None:
                    hessian += part.hessian(self.matrix[points][:, part.rows], eta)
                else:
                    weight[:, part.rows] = part.curvature(part.natural, eta)
        return hessian - self._gram(points, weight)

    def axes(self, points: Tensor, factor: Tensor) -> Tensor:
        """Triangular axes where each moves few predictors, else axes by pivoted QR of the predictors.

        The triangular ones are single copies given what they share, where copies do not see one another.
        Otherwise (graphs, spectral coordinates) the j-th axis of the QR of the whitened predictors, the
        least certain first, leaves the first j - 1 pivots still, so that late axes are one predictor's
        conditional given nearly all others: where a likelihood is skew, it is skew along predictors.
        """
        triangular = triangular_axes(factor)
        if not self.matrix.shape[1]:  # Gaussian: no axis is better than another
            return triangular
        # Point by point: at sigma = 0 copies move nothing, whatever they do elsewhere.
        share = triangular.new_empty(len(points))
        for some, here in self._pieces(points):
            moved = here.map.product(triangular[some].mT).abs_()
            does = moved > 1e-12 * moved.amax((1, 2), keepdim=True)
            share[some] = does.sum((1, 2)).to(share) / does[0].numel()
        found = triangular.clone()
        for i in torch.nonzero(share >= 0.3).squeeze(1).tolist():
            rows = self.matrix[points[i]]
            if len(rows) > 8 * self.num_latent:  # a spread of the observations points the same way
                rows = rows[:: len(rows) // (8 * self.num_latent)]
            pivoted: Any = scipy.linalg.qr((rows @ factor[i]).mT.cpu().numpy(), mode="full", pivoting=True)
            rotation = torch.as_tensor(pivoted[0][:, : self.num_latent].copy())
            found[i] = factor[i] @ rotation.to(factor)
        return found

    def _moved(self, points: Tensor, columns: Tensor) -> Tensor:
        """What steps (P, D, n) move the predictors, (P, M, n)."""
        out = columns.new_empty(len(points), self.matrix.shape[1], columns.shape[2])
        for some, here in self._pieces(points):
            here.map.product(columns[some].mT, out=out[some])
        return out

    def profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        """As `Density.profile`: most axes move few predictors, and only those are evaluated."""
        out = self._rest_profile(points, mode, factor, nodes)

        def job(some: slice, here: _Selection) -> None:
            moved = here.map.product(factor[some].mT)
            centre = here.map.forward(mode[some].unsqueeze(1)).squeeze(-1)
            own = nodes if nodes.dim() == 1 else nodes[some]
            for part in here.parts:
                rows = part.rows
                part.add_profile(here.points, centre[:, rows], moved[:, rows], own, self.elements, out[some])

        self._run([partial(job, *piece) for piece in self._pieces(points)])
        return out

    def _rest_profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        if self.quadratic is not None and self.latent_scale is None:
            here = self.quadratic.take(points)
            slope = here.value_and_grad(mode.unsqueeze(1))[1]
            first = (slope @ factor).squeeze(1)
            second = (factor * (here.curvature @ factor)).sum(1)
            return first.unsqueeze(-1) * nodes + 0.5 * second.unsqueeze(-1) * nodes.square()
        steps = (factor.mT.unsqueeze(2) * nodes.unsqueeze(-1)).flatten(1, 2)
        value = self.rest(points, mode.unsqueeze(1) + steps)[0] - self.rest(points, mode.unsqueeze(1))[0]
        return value.reshape(len(points), factor.shape[2], -1)

    def _prior_hessian(self, points: Tensor, position: Tensor) -> Tensor:
        if self.quadratic is None:
            return self._rest_hessian(points, position)
        curvature = self.quadratic.curvature[points]
        return (
            curvature
            if self.latent_scale is None
            else curvature + self.latent_scale.take(points).hessian(position)
        )

    def rest(self, points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint without the affine likelihoods still in ``families``, and its gradient."""
        if self.quadratic is None:
            return self._rest(points, position)
        scale = None if self.latent_scale is None else self.latent_scale.take(points)
        return _smooth(self.quadratic.take(points), scale, position)

    def _rest_of(self, here: _Selection, position: Tensor) -> tuple[Tensor, Tensor]:
        if here.quadratic is not None:
            return _smooth(here.quadratic, here.latent_scale, position)
        return self._rest(here.points, position)


def _smooth(quadratic: Quadratic, scale: LatentScale | None, position: Tensor) -> tuple[Tensor, Tensor]:
    value, grad = quadratic.value_and_grad(position)
    if scale is not None:
        own, slope = scale.value_and_grad(position)
        value, grad = value + own, grad + slope
    return value, grad
