"""Batched log density of a sweep: value, gradient and curvature, by the cheapest exact route.

Positions have shape (points, batch, num_latent): a rectangle of lanes, one row of it per swept point.
Two routes give the same numbers:

- `ProgramDensity` runs the traced lane program; curvature costs num_latent gradient passes.
- `AffineDensity` is for models whose likelihood sees the latents only through predictors eta = A u + b
  (generalised linear models, whatever their latents' priors). A and b are found once per point by
  forward differentiation and checked; then a gradient is two matrix products and an elementwise
  function, and curvature is A^T W A.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.linalg
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import biject_to, constraints

from bayestie._program import LaneInputs, LaneProgram, base_distribution

# Lanes evaluated at once are bounded so that intermediate tensors stay within this many numbers.
MAX_ELEMENTS = 16_000_000
# An affine map is kept dense; past this many numbers over all points the program route is used.
MAX_AFFINE = 60_000_000


class Density(Protocol):
    """log density of all points; ``points`` (P,) says which, positions are (P, batch, num_latent)."""

    num_latent: int
    route: str

    def value(self, points: Tensor, position: Tensor) -> Tensor:
        """log density, shape (P, batch)."""
        ...

    def value_and_grad(self, points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """log density (P, batch) and gradient (P, batch, num_latent)."""
        ...

    def hessian(self, points: Tensor, position: Tensor) -> Tensor:
        """Second derivatives at one position per point: (P, num_latent) -> (P, num_latent, num_latent)."""
        ...

    def axes(self, points: Tensor, factor: Tensor) -> Tensor:
        """Rotate factors of covariances (P, D, D) so that their columns are axes the density is skew along."""
        ...

    def profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        """log density at mode + nodes_g factor[:, j] less that at the mode, (P, D, G)."""
        ...


def triangular_axes(factor: Tensor) -> Tensor:
    """Upper triangular factors of the same covariances: an axis moves a latent and those before it.

    `tied` states the copies before what they share, so an axis of independent copies is one copy alone.
    """
    covariance = factor @ factor.mT
    return torch.linalg.cholesky_ex(covariance.flip(-1, -2))[0].flip(-1, -2)


def _widths(n: int) -> int:
    """The padded width for n lanes: a power of two or three quarters of one."""
    if n <= 4:
        return n
    top = 1 << (n - 1).bit_length()
    return top * 3 // 4 if n <= top * 3 // 4 else top


class ProgramDensity:
    """The density by the lane program itself."""

    route = "program"

    def __init__(self, program: LaneProgram):
        self.program = program
        self.num_latent = program.num_latent
        rows = sum(v.numel() for v in program.observed_values.values()) + program.num_latent
        self.max_lanes = max(1, MAX_ELEMENTS // max(rows, 1) // 4)

    def value(self, points: Tensor, position: Tensor) -> Tensor:
        return self._lanes(points, position, gradient=False)[0]

    def value_and_grad(self, points: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self._lanes(points, position, gradient=True)
        return value, grad

    def _lanes(self, points: Tensor, position: Tensor, gradient: bool) -> tuple[Tensor, Any]:
        num_points, batch, dim = position.shape
        flat = position.reshape(-1, dim)
        index = points.repeat_interleave(batch)
        values, grads = [], []
        chunk = min(self.max_lanes, len(flat))
        for start in range(0, len(flat), chunk):
            stop = min(start + chunk, len(flat))
            count = stop - start
            width = _widths(count) if self.program.loop_reason is None else count
            pad = torch.arange(start, start + width, device=flat.device).clamp(max=stop - 1)
            out = self.program.evaluate(flat[pad], self.program.point_inputs(index[pad]), gradient=gradient)
            value, grad = out if gradient else (out, None)
            values.append(value[:count])
            if grad is not None:
                grads.append(grad[:count])
        value = torch.cat(values).reshape(num_points, batch)
        return value, torch.cat(grads).reshape(num_points, batch, dim) if gradient else None

    def hessian(self, points: Tensor, position: Tensor) -> Tensor:
        if self.program.loop_reason is not None:
            return self._loop_hessian(points, position)
        return hessian_by_lanes(self.program, self.program.log_joint, points, position, self.max_lanes)

    def axes(self, points: Tensor, factor: Tensor) -> Tensor:
        return triangular_axes(factor)

    def profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        steps = (factor.mT.unsqueeze(2) * nodes.view(1, 1, -1, 1)).flatten(1, 2)
        value = self.value(points, mode.unsqueeze(1) + steps)
        return (value - self.value(points, mode.unsqueeze(1))).reshape(len(points), self.num_latent, -1)

    def _loop_hessian(self, points: Tensor, position: Tensor) -> Tensor:
        # Central differences of the gradient: the loop route has no forward mode to lean on.
        step = 1e-5 * (1.0 + position.abs())
        columns = []
        for j in range(self.num_latent):
            shift = torch.zeros_like(position)
            shift[:, j] = step[:, j]
            _, grads = self.value_and_grad(points, torch.stack([position + shift, position - shift], 1))
            columns.append((grads[:, 0] - grads[:, 1]) / (2.0 * step[:, j, None]))
        hessian = torch.stack(columns, -1)
        return 0.5 * (hessian + hessian.mT)


def hessian_by_lanes(
    program: LaneProgram,
    log_density: Callable[[Tensor, LaneInputs], Tensor],
    points: Tensor,
    position: Tensor,
    max_lanes: int,
) -> Tensor:
    """Second derivatives of a lane function at one position per point, all columns as lanes.

    Reverse mode over reverse mode: lane (s, j) gives H_s e_j.
    """
    num_points, dim = position.shape
    index = points.repeat_interleave(dim)
    eye = torch.eye(dim, dtype=position.dtype, device=position.device).repeat(num_points, 1)
    lanes = position.repeat_interleave(dim, 0)
    columns = []
    for start in range(0, len(lanes), max_lanes):
        part = slice(start, start + max_lanes)
        inputs = program.point_inputs(index[part])
        forward = torch.vmap(lambda u, *xs, like=inputs: log_density(u, like.unflatten(xs)))
        with program.quiet(), torch.enable_grad():
            u = lanes[part].clone().requires_grad_(True)
            value = forward(u, *inputs.flat())
            (grad,) = torch.autograd.grad(value.sum(), u, create_graph=True)
            if grad.requires_grad:
                (column,) = torch.autograd.grad((grad * eye[part]).sum(), u, materialize_grads=True)
            else:
                column = torch.zeros_like(u)  # a density linear in u
        columns.append(column)
    hessian = torch.cat(columns).reshape(num_points, dim, dim)
    return 0.5 * (hessian + hessian.mT)


@dataclass(frozen=True)
class _Family:
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
        return scale_and_mask(log_density, here["<scale>"] * here["<weight>"], here["<mask>"].bool())


_MESSAGE = ("<value>", "<scale>", "<mask>", "<weight>")


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
        families: Sequence[_Family],
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
            rotation, _, _ = scipy.linalg.qr((rows @ one).mT.cpu().numpy(), mode="full", pivoting=True)
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
        if self.quadratic is None:
            return self._rest(points, position)
        constant, slope, curvature = self._select(points).quadratic or ()
        half = 0.5 * torch.bmm(position, curvature)
        value = constant.unsqueeze(1) + (position * (slope.unsqueeze(1) + half)).sum(-1)
        return value, slope.unsqueeze(1) + 2.0 * half


def build_density(program: LaneProgram) -> Density:
    """The cheapest exact route for a program."""
    general = ProgramDensity(program)
    affine = _affine(program, general) if not program.enumerated and program.loop_reason is None else None
    return general if affine is None else affine


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


def _predictors(program: LaneProgram, position: Tensor, inputs: LaneInputs) -> dict[str, tuple[Any, dict]]:
    """Observed site -> (message, constructor parameters mapped to the real line)."""
    seen: dict[str, dict[str, Tensor]] = {}

    def see(msg: Any) -> None:
        # Before log_prob is called: after it, lazy parameters (logits of probs) are filled in too.
        base = base_distribution(msg["fn"])
        constraint = _constraints(base)
        if constraint is None:
            raise _NotAffine(f"site '{msg['name']}' is not elementwise")
        seen[msg["name"]] = {
            name: getattr(base, name) if link is None else link.inv(getattr(base, name))
            for name, link in constraint.items()
        }

    lane = program.run_lane(position, inputs, without=set(program.observed), on_observed=see)
    return {name: (lane.messages[name], parameters) for name, parameters in seen.items()}


class _NotAffine(Exception):
    """This model has no affine likelihood; the program route serves it."""


def _affine(program: LaneProgram, general: ProgramDensity) -> AffineDensity | None:
    try:
        return _find_affine(program, general)
    except (_NotAffine, RuntimeError, ValueError, NotImplementedError, TypeError):
        return None  # any reason not to be affine is a reason to use the general route


def _find_affine(program: LaneProgram, general: ProgramDensity) -> AffineDensity | None:
    num_points = program.num_points
    points = torch.arange(num_points, device=program.device)
    inputs = program.point_inputs(points)
    dim, dtype, device = program.num_latent, program.dtype, program.device
    generator = torch.Generator().manual_seed(program.seed)
    probe = 0.5 * torch.randn(3, num_points, dim, dtype=dtype, generator=generator).to(device)

    families = _families(program, probe[0])
    rows = sum(f.shape.numel() * len(f.names) for f in families)
    if not families or rows * dim * num_points > MAX_AFFINE:
        return None

    def eta(position: Tensor, *flat: Tensor) -> Tensor:
        recorded = _predictors(program, position, inputs.unflatten(flat))
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


def _families(program: LaneProgram, position: Tensor) -> list[_Family]:
    """The likelihood sites whose parameters move with the latents, with their constants at every point."""
    first = program.point(0)
    with program.quiet():
        here, there = (_predictors(program, at, first) for at in (position[0], position[0] + 0.37))
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
        families.append(_Family(name, type(base), moving, links, constants, shape))
    return families


def _constants(
    program: LaneProgram, site: str, names: tuple[str, ...], shape: torch.Size, position: Tensor
) -> dict[str, Tensor]:
    inputs = program.points

    def one(u: Tensor, *flat: Tensor) -> dict[str, Tensor]:
        own = inputs.unflatten(flat)
        msg = _predictors(program, u, own)[site][0]
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
