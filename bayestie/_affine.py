"""The density of models whose likelihood sees the latents only through predictors eta = A u + b.

Generalised linear models, whatever their latents' priors. A and b are found once per point and checked; then
a gradient is two matrix products and an elementwise function, and curvature is A^T W A.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from bayestie._density import MAX_ELEMENTS, Density, ProgramDensity, hessian_by_lanes, triangular_axes
from bayestie._families import Family, NotAffine, find_families, predictors_of
from bayestie._program import LaneInputs, LaneProgram

# An affine map is kept dense; past this many numbers over all points the program route is used.
MAX_AFFINE = 60_000_000


class _Map:
    """eta = A u + b for the points at hand, sparse where most of A is zero (indices, one-hot designs)."""

    def __init__(self, matrix: Tensor, offset: Tensor):
        self.offset = offset  # (P, M)
        self.shape = matrix.shape  # (P, M, D)
        density = float((matrix != 0).sum()) / max(1, matrix.numel())
        self.dense = matrix if density > 0.2 or matrix.numel() < 100_000 else None
        if self.dense is None:
            # One block-diagonal matrix over the points: one product serves all of them.
            point, row, column = torch.nonzero(matrix, as_tuple=True)
            num_points, rows, columns = matrix.shape
            values = matrix[point, row, column]
            left, right = point * rows + row, point * columns + column
            self.sparse = _csr(left, right, values, (num_points * rows, num_points * columns))
            self.transposed = _csr(right, left, values, (num_points * columns, num_points * rows))

    def forward(self, position: Tensor) -> Tensor:
        """(P, batch, D) -> (P, batch, M)."""
        if self.dense is not None:
            return torch.baddbmm(self.offset.unsqueeze(1), position, self.dense.mT)
        return self._product(self.sparse, position) + self.offset.unsqueeze(1)

    def backward(self, slope: Tensor) -> Tensor:
        """(P, batch, M) -> (P, batch, D), the transposed map."""
        return (
            torch.bmm(slope, self.dense) if self.dense is not None else self._product(self.transposed, slope)
        )

    @staticmethod
    def _product(matrix: Tensor, x: Tensor) -> Tensor:
        num_points, batch, _ = x.shape
        columns = x.mT.reshape(-1, batch)
        return (matrix @ columns).reshape(num_points, -1, batch).mT.contiguous()


def _csr(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    order = torch.argsort(row * shape[1] + column)
    starts = torch.zeros(shape[0] + 1, dtype=torch.long, device=row.device)
    starts[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        return torch.sparse_csr_tensor(starts, column[order], values[order], shape)


@dataclass(frozen=True)
class _Selection:
    """An affine density's parts at some points."""

    points: Tensor
    map: _Map
    constants: list[dict[str, Tensor]]  # per family
    quadratic: tuple[Tensor, ...] | None


class AffineDensity:
    """The density of a model whose likelihood depends on the latents through eta = A u + b alone.

    The rest of the log joint (priors, Jacobians, factors) is a quadratic in u where it is one
    (Gaussian priors), else the lane program with the likelihood left out.
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
        quadratic: tuple[Tensor, Tensor, Tensor] | None,
    ):
        self.program, self.num_latent = program, program.num_latent
        self.families, self.matrix, self.offset = families, matrix, offset  # (S, M, D), (S, M)
        self._rest, self._rest_hessian, self.quadratic = rest, rest_hessian, quadratic
        self.max_batch = max(1, MAX_ELEMENTS // max(1, matrix.shape[1]))
        self._selected: _Selection | None = None

    def _split(self, eta: Tensor) -> list[list[Tensor]]:
        parts, start = [], 0
        for family in self.families:
            size = family.shape.numel()
            parts.append(
                [
                    eta[..., start + i * size : start + (i + 1) * size].reshape(
                        *eta.shape[:-1], *family.shape
                    )
                    for i in range(len(family.names))
                ]
            )
            start += size * len(family.names)
        return parts

    def _likelihood(self, here: "_Selection", eta: Tensor) -> Tensor:
        total: Any = 0.0
        for family, constants, predictors in zip(
            self.families, here.constants, self._split(eta), strict=True
        ):
            total = total + family.log_density(constants, predictors).reshape(*eta.shape[:2], -1).sum(-1)
        return total

    def value(self, points: Tensor, position: Tensor) -> Tensor:
        return torch.cat([self._value(points, part) for part in self._chunks(points, position)], 1)

    def _chunks(self, points: Tensor, position: Tensor) -> Sequence[Tensor]:
        return position.split(max(1, self.max_batch // max(1, len(points))), 1)

    def _select(self, points: Tensor) -> "_Selection":
        """What the density needs of some points; engines ask for the same ones thousands of times."""
        if self._selected is None or not torch.equal(self._selected.points, points):
            self._selected = _Selection(
                points.clone(),
                _Map(self.matrix[points], self.offset[points]),
                [family.select(points) for family in self.families],
                None if self.quadratic is None else tuple(x[points] for x in self.quadratic),
            )
        return self._selected

    def _value(self, points: Tensor, position: Tensor) -> Tensor:
        here = self._select(points)
        with torch.no_grad(), self.program.quiet():
            likelihood = self._likelihood(here, here.map.forward(position))
        return likelihood + self.rest(points, position)[0]

    def value_and_grad(self, points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        here = self._select(points)
        for part in self._chunks(points, position):
            eta = here.map.forward(part).requires_grad_(True)
            with self.program.quiet(), torch.enable_grad():
                likelihood = self._likelihood(here, eta)
                (slope,) = torch.autograd.grad(likelihood.sum(), eta)
            rest, rest_grad = self.rest(points, part)
            values.append(likelihood.detach() + rest)
            grads.append(here.map.backward(slope) + rest_grad)
        return torch.cat(values, 1), torch.cat(grads, 1)

    def hessian(self, points: Tensor, position: Tensor) -> Tensor:
        matrix, here = self.matrix[points], self._select(points)
        eta = torch.einsum("smd,sd->sm", matrix, position) + self.offset[points]
        eta = eta.unsqueeze(1).requires_grad_(True)
        hessian = self._prior_hessian(points, position).clone()
        start = 0
        with self.program.quiet(), torch.enable_grad():
            for family, constants, predictors in zip(
                self.families, here.constants, self._split(eta), strict=True
            ):
                size, count = family.shape.numel(), len(family.names)
                total = family.log_density(constants, predictors).sum()
                first = torch.autograd.grad(total, predictors, create_graph=True)
                for i in range(count):
                    # Elementwise density: the gradient of the summed slope is the i-th row of every
                    # observation's own block of second derivatives.
                    second = torch.autograd.grad(
                        first[i].sum(),
                        predictors,
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    left = matrix[:, start + i * size : start + (i + 1) * size]
                    for j in range(count):
                        right = matrix[:, start + j * size : start + (j + 1) * size]
                        weight = second[j].detach().reshape(len(points), size, 1)
                        hessian += torch.bmm((left * weight).mT, right)
                start += size * count
        return hessian

    def axes(self, points: Tensor, factor: Tensor) -> Tensor:
        """Triangular axes where each moves few predictors, else axes by pivoted QR of the predictors.

        The triangular ones are single copies given what they share, where copies do not see one another.
        Otherwise (graphs, spectral coordinates) the j-th axis of the QR of the whitened predictors, the
        least certain first, leaves the first j - 1 pivots still, so that late axes are one predictor's
        conditional given nearly all others: where a likelihood is skew, it is skew along predictors.
        """
        triangular = triangular_axes(factor)
        moved = torch.bmm(self.matrix[points[:1]], triangular[:1])
        if float((moved.abs() > 1e-12 * moved.abs().max()).to(moved).mean()) < 0.3:
            return triangular
        rotated = []
        for point, one in zip(points.tolist(), factor, strict=True):
            rows = self.matrix[point]
            if len(rows) > 8 * self.num_latent:  # a spread of the observations points the same way
                rows = rows[:: len(rows) // (8 * self.num_latent)]
            found: Any = scipy.linalg.qr((rows @ one).mT.cpu().numpy(), mode="full", pivoting=True)
            rotation = found[0]
            rotated.append(one @ torch.as_tensor(rotation[:, : self.num_latent].copy()).to(one))
        return torch.stack(rotated)

    def profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        """Most axes move few predictors; only those are evaluated."""
        matrix = self.matrix[points]
        moved = torch.bmm(matrix, factor)  # (P, M, D)
        centre = torch.einsum("smd,sd->sm", matrix, mode) + self.offset[points]
        out = self._rest_profile(points, mode, factor, nodes)
        start = 0
        with torch.no_grad(), self.program.quiet():
            for family in self.families:
                size, count = family.shape.numel(), len(family.names)
                part = slice(start, start + size * count)
                steps = moved[:, part].reshape(len(points), count, size, -1)
                here = centre[:, part].reshape(len(points), count, size)
                tiny = 1e-12 * steps.abs().amax((2, 3), keepdim=True)
                point, row, axis = torch.nonzero((steps.abs() > tiny).any(1), as_tuple=True)
                chunk = max(1, MAX_ELEMENTS // (2 * len(nodes)))
                for at in (slice(i, i + chunk) for i in range(0, len(point), chunk)):
                    p, r, j = point[at], row[at], axis[at]
                    base = [here[p, i, r].unsqueeze(1) for i in range(count)]
                    along = [b + steps[p, i, r, j].unsqueeze(1) * nodes for i, b in enumerate(base)]
                    change = family.at(points[p], r, along) - family.at(points[p], r, base)
                    out.view(-1, len(nodes)).index_add_(0, p * self.num_latent + j, change)
                start += size * count
        return out

    def _rest_profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        if self.quadratic is not None:
            _, slope, curvature = (x[points] for x in self.quadratic)
            first = ((slope + torch.einsum("sij,sj->si", curvature, mode)).unsqueeze(1) @ factor).squeeze(1)
            second = (factor * (curvature @ factor)).sum(1)
            return first.unsqueeze(-1) * nodes + 0.5 * second.unsqueeze(-1) * nodes.square()
        steps = (factor.mT.unsqueeze(2) * nodes.view(1, 1, -1, 1)).flatten(1, 2)
        value = self.rest(points, mode.unsqueeze(1) + steps)[0] - self.rest(points, mode.unsqueeze(1))[0]
        return value.reshape(len(points), self.num_latent, -1)

    def _prior_hessian(self, points: Tensor, position: Tensor) -> Tensor:
        if self.quadratic is not None:
            return self.quadratic[2][points]
        return self._rest_hessian(points, position)

    def rest(self, points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint without the affine likelihood, and its gradient."""
        here = self._select(points).quadratic if self.quadratic is not None else None
        if here is None:
            return self._rest(points, position)
        constant, slope, curvature = here
        half = 0.5 * torch.bmm(position, curvature)
        value = constant.unsqueeze(1) + (position * (slope.unsqueeze(1) + half)).sum(-1)
        return value, slope.unsqueeze(1) + 2.0 * half


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
    rows = sum(f.shape.numel() * len(f.names) for f in families)
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
    density = AffineDensity(
        program, families, matrix, offset, rest, rest_hessian, _quadratic(rest, rest_hessian, points, probe)
    )
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


def _quadratic(
    rest: Any, rest_hessian: Any, points: Tensor, probe: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(constant, slope, curvature) at the origin if the rest is a quadratic at every point, else None."""
    origin = torch.zeros_like(probe[0])
    curvature = rest_hessian(points, origin)
    value, slope = (x.squeeze(1) for x in rest(points, origin.unsqueeze(1)))
    for at in (probe[0], probe[1], 8.0 * probe[2]):
        found, found_slope = (x.squeeze(1) for x in rest(points, at.unsqueeze(1)))
        step = torch.einsum("sij,sj->si", curvature, at)
        expected = value + (at * (slope + 0.5 * step)).sum(-1)
        close = (found - expected).abs() <= 1e-11 * (1.0 + found.abs())
        close_slope = (found_slope - slope - step).abs() <= 1e-11 * (1.0 + found_slope.abs())
        if not (close.all() and close_slope.all() and math.isfinite(float(curvature.abs().max()))):
            return None
    return value, slope, curvature
