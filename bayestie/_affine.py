"""The density of models whose likelihood sees the latents only through predictors eta = A u + b.

Generalised linear models, whatever their latents' priors. A and b are found once per point and checked; then
a gradient is two matrix products and an elementwise function, and curvature is A^T W A.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from bayestie._density import MAX_ELEMENTS, Density, ProgramDensity, hessian_by_lanes, triangular_axes
from bayestie._families import Family, Natural, NotAffine, find_families, predictors_of
from bayestie._lane import LaneInputs
from bayestie._latent_scale import LatentScale, ScaleSite, find_scale_site, latent_scale, value_and_slope
from bayestie._linear_map import LinearMap
from bayestie._program import LaneProgram
from bayestie._quadratic import Quadratic
from bayestie._workers import in_worker, run_all, scratch

# An affine map is kept dense; past this many numbers over all points the program route is used.
MAX_AFFINE = 60_000_000
# Predictors worked on at once on a CPU: what its cache holds. A GPU takes MAX_ELEMENTS.
_CACHED_ELEMENTS = 1 << 18
_NARROWEST = 16  # draws worked on at once, at least
_REMEMBERED = 3  # sets of points whose maps are kept


@dataclass(frozen=True)
class _Part:
    """One likelihood site's share of the predictors, at some points."""

    rows: slice
    family: Family
    constants: dict[str, Tensor]
    natural: Natural | None
    weight: Tensor | None  # of the natural form, (P or 1, M, 1)

    def predictors(self, eta: Tensor) -> list[Tensor]:
        return list(eta[:, self.rows].split(self.family.size, 1))

    def value_(self, eta: Tensor) -> Tensor:
        """(P, M, batch) -> (P, batch), without the natural form's linear part; overwrites its rows of eta."""
        if self.natural is None:
            return self.family.log_density(self.constants, self.predictors(eta)).sum(1)
        return -self._total(self.natural.cumulant.value_(eta[:, self.rows]))

    def value_and_slope_(self, eta: Tensor, work: Tensor) -> Tensor:
        """The same; its rows of eta become the derivative by the predictors, less what is constant of it."""
        own = eta[:, self.rows]
        if self.natural is not None:
            value = self._total(self.natural.cumulant.value_and_slope_(own, work[:, self.rows]))
            if self.weight is not None:
                own.mul_(self.weight)
            return -value
        with torch.enable_grad():
            leaf = own.detach().clone().requires_grad_(True)
            value = self.family.log_density(self.constants, list(leaf.split(self.family.size, 1))).sum(1)
            own.copy_(torch.autograd.grad(value.sum(), leaf)[0])
        return value.detach()

    def _total(self, size: Tensor) -> Tensor:
        if self.weight is None:
            return size.sum(1)
        return torch.matmul(self.weight.mT, size).squeeze(1)


@dataclass(frozen=True)
class _Selection:
    """An affine density's parts at some points."""

    points: Tensor
    map: LinearMap
    parts: list[_Part]
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

    def _parts(self, points: Tensor) -> list[_Part]:
        parts, start = [], 0
        for family, natural in zip(self.families, self.naturals, strict=True):
            stop = start + family.size * len(family.names)
            weight = None
            if natural is not None and natural.weight is not None:
                weight = natural.weight if len(natural.weight) == 1 else natural.weight[points]
                weight = weight.unsqueeze(-1)
            parts.append(_Part(slice(start, stop), family, family.select(points), natural, weight))
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
        matrix, offset = self.matrix[points], self.offset[points]
        linear, constant = matrix.new_zeros(len(points), self.num_latent), matrix.new_zeros(len(points))
        pull, parts = linear, self._parts(points)
        for part in parts:
            if part.natural is None:
                continue
            n, own = part.natural, matrix[:, part.rows]
            target = (n.target if len(n.target) == 1 else n.target[points]).expand(len(points), -1)
            weight = torch.ones_like(target) if part.weight is None else part.weight.squeeze(-1)
            steady = (target - n.cumulant.limit * weight).expand(len(points), -1)
            linear = linear + torch.bmm(target.unsqueeze(1), own).squeeze(1)
            pull = pull + torch.bmm(steady.unsqueeze(1), own).squeeze(1)
            here = n.constant if len(n.constant) == 1 else n.constant[points]
            constant = constant + here + (target * offset[:, part.rows]).sum(1)
        quadratic = None if self.quadratic is None else self.quadratic.take(points)
        scale = None if self.latent_scale is None else self.latent_scale.take(points)
        return _Selection(points, LinearMap(matrix, offset), parts, linear, pull, constant, quadratic, scale)

    def _jobs(self, points: Tensor, position: Tensor) -> Iterator[tuple[_Selection, slice, slice]]:
        """Points and draws that are worked on together, small enough for the cache."""
        for some, here in self._pieces(points):
            batch = max(_NARROWEST, self.elements // (max(1, self.matrix.shape[1]) * len(here.points)))
            for start in range(0, position.shape[1], batch):
                yield here, some, slice(start, start + batch)

    @property
    def is_threadable(self) -> bool:
        """Whether no model runs in it any more."""
        return self.quadratic is not None

    @property
    def is_skew_along_axes(self) -> bool:
        """Only the likelihoods are skew, each along its predictors."""
        return self.quadratic is not None and self.latent_scale is None

    def _run(self, jobs: list[Callable[[], None]]) -> None:
        with torch.no_grad(), contextlib.nullcontext() if in_worker() else self.program.quiet():
            if self.is_threadable:
                run_all(jobs)
            else:
                for job in jobs:
                    job()

    def value(self, points: Tensor, position: Tensor) -> Tensor:
        """log density, (P, batch)."""
        out = position.new_empty(position.shape[:2])

        def job(here: _Selection, some: slice, draws: slice) -> None:
            out[some, draws] = self._value(here, position[some, draws])

        self._run([partial(job, *piece) for piece in self._jobs(points, position)])
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

        self._run([partial(job, *piece) for piece in self._jobs(points, position)])
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
        matrix = self.matrix[points]
        hessian = self._prior_hessian(points, position).clone()
        if not self.families:
            return hessian
        with self.program.quiet():
            eta = torch.baddbmm(self.offset[points].unsqueeze(-1), matrix, position.unsqueeze(-1))
            for part in self._parts(points):
                own = matrix[:, part.rows]
                if part.natural is not None:
                    weight = part.natural.cumulant.curvature(eta[:, part.rows])
                    weight = weight if part.weight is None else weight * part.weight
                    hessian -= torch.bmm((own * weight).mT, own)
                else:
                    hessian += self._general_hessian(part, own, eta)
        return hessian

    @staticmethod
    def _general_hessian(part: _Part, matrix: Tensor, eta: Tensor) -> Tensor:
        total: Any = 0.0
        blocks = matrix.split(part.family.size, 1)
        with torch.enable_grad():
            predictors = [x.detach().requires_grad_(True) for x in part.predictors(eta)]
            summed = part.family.log_density(part.constants, predictors).sum()
            first = torch.autograd.grad(summed, predictors, create_graph=True)
            for left, slope in zip(blocks, first, strict=True):
                # Elementwise density: the gradient of the summed slope is one row of every observation's
                # own block of second derivatives.
                second = torch.autograd.grad(
                    slope.sum(), predictors, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for right, weight in zip(blocks, second, strict=True):
                    total = total + torch.bmm((left * weight.detach()).mT, right)
        return total

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
        moved = torch.bmm(self.matrix[points], triangular).abs()
        share = (moved > 1e-12 * moved.amax((1, 2), keepdim=True)).to(moved).mean((1, 2))
        found = triangular.clone()
        for i in torch.nonzero(share >= 0.3).squeeze(1).tolist():
            rows = self.matrix[points[i]]
            if len(rows) > 8 * self.num_latent:  # a spread of the observations points the same way
                rows = rows[:: len(rows) // (8 * self.num_latent)]
            pivoted: Any = scipy.linalg.qr((rows @ factor[i]).mT.cpu().numpy(), mode="full", pivoting=True)
            rotation = torch.as_tensor(pivoted[0][:, : self.num_latent].copy())
            found[i] = factor[i] @ rotation.to(factor)
        return found

    def profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        """Most axes move few predictors; only those are evaluated."""
        matrix = self.matrix[points]
        moved = torch.bmm(matrix, factor)  # (P, M, D)
        centre = torch.einsum("smd,sd->sm", matrix, mode) + self.offset[points]
        out = self._rest_profile(points, mode, factor, nodes)
        with torch.no_grad(), self.program.quiet():
            for part in self._parts(points):
                self._profile_of(part, points, centre[:, part.rows], moved[:, part.rows], nodes, out)
        return out

    def _profile_of(
        self, part: _Part, points: Tensor, centre: Tensor, moved: Tensor, nodes: Tensor, out: Tensor
    ) -> None:
        """Add one site's change along every axis to ``out`` (P, D, G)."""
        family, count = part.family, len(part.family.names)
        steps = moved.reshape(len(points), count, family.size, -1)
        here = centre.reshape(len(points), count, family.size)
        tiny = 1e-12 * steps.abs().amax((2, 3), keepdim=True)
        point, row, axis = torch.nonzero((steps.abs() > tiny).any(1), as_tuple=True)
        chunk = max(1, self.elements // len(nodes))
        for at in (slice(i, i + chunk) for i in range(0, len(point), chunk)):
            p, r, j = point[at], row[at], axis[at]
            base = [here[p, i, r].unsqueeze(1) for i in range(count)]
            along = [b + steps[p, i, r, j].unsqueeze(1) * nodes for i, b in enumerate(base)]
            if part.natural is None:
                change = family.at(points[p], r, along) - family.at(points[p], r, base)
            else:
                target, cumulant = part.natural.target, part.natural.cumulant
                size = cumulant.value(along[0]) - cumulant.value(base[0])
                if part.weight is not None:
                    size = size * part.weight[p if len(part.weight) > 1 else 0, r]
                pull = target[points[p] if len(target) > 1 else 0, r].unsqueeze(1)
                change = pull * (along[0] - base[0]) - size
            out.view(-1, len(nodes)).index_add_(0, p * self.num_latent + j, change)

    def _rest_profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        if self.quadratic is not None and self.latent_scale is None:
            here = self.quadratic.take(points)
            slope = here.value_and_grad(mode.unsqueeze(1))[1]
            first = (slope @ factor).squeeze(1)
            second = (factor * (here.curvature @ factor)).sum(1)
            return first.unsqueeze(-1) * nodes + 0.5 * second.unsqueeze(-1) * nodes.square()
        steps = (factor.mT.unsqueeze(2) * nodes.view(1, 1, -1, 1)).flatten(1, 2)
        value = self.rest(points, mode.unsqueeze(1) + steps)[0] - self.rest(points, mode.unsqueeze(1))[0]
        return value.reshape(len(points), self.num_latent, -1)

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


def build_density(program: LaneProgram) -> Density:
    """The cheapest exact route for a program."""
    general = ProgramDensity(program)
    affine = _affine(program, general) if not program.enumerated and program.loop_reason is None else None
    return general if affine is None else affine


def _affine(program: LaneProgram, general: ProgramDensity) -> AffineDensity | None:
    try:
        return _find_affine(program, general)
    except (NotAffine, RuntimeError, ValueError, NotImplementedError, TypeError):
        return None  # any reason not to be affine is a reason to use the general route


def _find_affine(program: LaneProgram, general: ProgramDensity) -> AffineDensity | None:
    num_points = program.num_points
    points = torch.arange(num_points, device=program.device)
    inputs = program.point_inputs(points)
    dim, dtype, device = program.num_latent, program.dtype, program.device
    generator = torch.Generator().manual_seed(program.seed)
    probe = 0.5 * torch.randn(3, num_points, dim, dtype=dtype, generator=generator).to(device)

    families = find_families(program, probe[0])
    rows = sum(f.size * len(f.names) for f in families)
    if not families or rows * dim * num_points > MAX_AFFINE:
        return None

    def eta(position: Tensor, *flat: Tensor) -> Tensor:
        recorded = predictors_of(program, position, inputs.unflatten(flat))
        parts = [recorded[f.site][1][n].expand(f.shape).reshape(-1) for f in families for n in f.names]
        return torch.cat(parts)

    flat = inputs.flat()
    batched = torch.vmap(eta)
    with program.quiet():
        # The map is affine if anything, so its columns are differences of values: no differentiation.
        offset = batched(torch.zeros_like(probe[0]), *flat)
        eye = torch.eye(dim, dtype=dtype, device=device)
        matrix = torch.empty(num_points, rows, dim, dtype=dtype, device=device)
        width = max(1, MAX_ELEMENTS // (4 * rows * num_points))
        for start in range(0, dim, width):
            part = eye[start : start + width]
            lanes = part.repeat(num_points, 1)
            repeated = [x.repeat_interleave(len(part), 0) for x in flat]
            values = batched(lanes, *repeated).reshape(num_points, len(part), rows)
            matrix[:, :, start : start + width] = (values - offset.unsqueeze(1)).mT
        for at in probe:
            found = batched(at, *flat)
            predicted = torch.einsum("smd,sd->sm", matrix, at) + offset
            scale = 1.0 + found.abs().amax(-1, keepdim=True)
            if not ((found - predicted).abs() <= 1e-9 * scale).all():
                return None

    rest, rest_hessian = _rest_functions(program, {f.site for f in families})
    curvature = rest_hessian(points, torch.zeros_like(probe[0]))
    quadratic, site = None, find_scale_site(program, families, matrix)
    if site is not None:
        own = _without_prior(rest, site)
        near, still = probe.clone(), curvature.clone()
        near[..., site.column].clamp_(-0.5, 0.5)  # far out its prior is all there is, and hides the rest
        still[:, site.column] = 0.0
        still[:, :, site.column] = 0.0
        quadratic = _quadratic(own, still, points, near)
        rest, site = (own, site) if quadratic is not None else (rest, None)
    if quadratic is None:
        quadratic = _quadratic(rest, curvature, points, probe)
    density = AffineDensity(program, families, matrix, offset, rest, rest_hessian, quadratic, site)
    ours, theirs = density.value(points, probe[2].unsqueeze(1)), general.value(points, probe[2].unsqueeze(1))
    agree = (ours - theirs).abs() <= 1e-9 * (1.0 + theirs.abs())
    return density if bool(agree.all()) else None


def _rest_functions(program: LaneProgram, without: set[str]) -> tuple[Any, Any]:
    """The log joint without the sites in ``without``: value with gradient, and curvature."""

    def log_density(position: Tensor, inputs: LaneInputs) -> Tensor:
        return program.run_lane(position, inputs, without=without).log_joint()

    def rest(points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        num_points, batch, dim = position.shape
        inputs = program.point_inputs(points.repeat_interleave(batch))
        forward = torch.vmap(lambda u, *xs: log_density(u, inputs.unflatten(xs)))
        with program.quiet(), torch.enable_grad():
            flat = position.detach().reshape(-1, dim).requires_grad_(True)
            value = forward(flat, *inputs.flat())
            (grad,) = torch.autograd.grad(value.sum(), flat)
        return value.detach().reshape(num_points, batch), grad.reshape(num_points, batch, dim)

    def rest_hessian(points: Tensor, position: Tensor) -> Tensor:
        return hessian_by_lanes(
            program, log_density, points, position, MAX_ELEMENTS // 64 // program.num_latent
        )

    return rest, rest_hessian


def _without_prior(rest: Any, site: ScaleSite) -> Any:
    def without(points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = rest(points, position)
        prior, slope = value_and_slope(site.log_prior, position[..., site.column])
        grad = grad.clone()
        grad[..., site.column] -= slope
        return value - prior, grad

    return without


def _quadratic(rest: Any, curvature: Tensor, points: Tensor, probe: Tensor) -> Quadratic | None:
    """The rest about the origin if it is a quadratic of that curvature at every point, else None."""
    origin = torch.zeros_like(probe[0])
    value, slope = (x.squeeze(1) for x in rest(points, origin.unsqueeze(1)))
    for at in (probe[0], probe[1], 8.0 * probe[2]):
        found, found_slope = (x.squeeze(1) for x in rest(points, at.unsqueeze(1)))
        step = torch.einsum("sij,sj->si", curvature, at)
        expected = value + (at * (slope + 0.5 * step)).sum(-1)
        close = (found - expected).abs() <= 1e-11 * (1.0 + found.abs())
        close_slope = (found_slope - slope - step).abs() <= 1e-11 * (1.0 + found_slope.abs())
        if not (close.all() and close_slope.all() and math.isfinite(float(curvature.abs().max()))):
            return None
    return Quadratic(origin, value, slope, curvature)
