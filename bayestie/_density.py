"""Batched log density of a sweep: value, gradient and curvature.

Positions have shape (points, batch, num_latent): a rectangle of lanes, one row of it per swept point.
`ProgramDensity` runs the lane program itself, and serves every model; curvature costs it num_latent gradient
passes. `bayestie._affine` has a cheaper route for generalised linear models.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from bayestie._lane import LaneInputs
from bayestie._program import LaneProgram

# Lanes evaluated at once are bounded so that intermediate tensors stay within this many numbers.
MAX_ELEMENTS = 16_000_000


class Density(Protocol):
    """log density of all points; ``points`` (P,) says which, positions are (P, batch, num_latent)."""

    num_latent: int
    route: str

    @property
    def is_threadable(self) -> bool:
        """Whether several threads may call it at once: Pyro's effect stack is one for all."""
        ...

    @property
    def is_skew_along_axes(self) -> bool:
        """Whether `axes` are the ones the density is skew along wherever one stands, as in linear models."""
        ...

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
        """Rotate factors of covariances (P, D, D): columns become axes that the density is skew along."""
        ...

    def profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        """log density at mode + nodes_g factor[:, j] less that at the mode, (P, n, G).

        Columns ``factor`` (P, D, n); nodes (G,) shared by all, or (P, n, G).
        """
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
    is_threadable = False
    is_skew_along_axes = False

    def __init__(self, program: LaneProgram):
        self.program = program
        self.num_latent = program.num_latent
        self.max_lanes = self._max_lanes({})

    def value(self, points: Tensor, position: Tensor) -> Tensor:
        return self._lanes(points, position, gradient=False)[0]

    def value_and_grad(
        self, points: Tensor, position: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """log density and gradient; of ``rows`` by plate, scaled to stand for all, where these are given."""
        value, grad = self._lanes(points, position, gradient=True, rows=rows or {})
        return value, grad

    def _lanes(
        self, points: Tensor, position: Tensor, gradient: bool, rows: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        num_points, batch, dim = position.shape
        flat = position.reshape(-1, dim)
        index = points.repeat_interleave(batch)
        values, grads = [], []
        chunk = min(self._max_lanes(rows) if rows else self.max_lanes, len(flat))
        for start in range(0, len(flat), chunk):
            stop = min(start + chunk, len(flat))
            count = stop - start
            width = _widths(count) if self.program.loop_reason is None else count
            pad = torch.arange(start, start + width, device=flat.device).clamp(max=stop - 1)
            inputs = self.program.point_inputs(index[pad])
            out = self.program.evaluate(flat[pad], inputs, gradient=gradient, rows=rows)
            value, grad = out if gradient else (out, None)
            values.append(value[:count])
            if grad is not None:
                grads.append(grad[:count])
        value = torch.cat(values).reshape(num_points, batch)
        return value, torch.cat(grads).reshape(num_points, batch, dim) if gradient else None

    def _max_lanes(self, rows: Mapping[str, Tensor]) -> int:
        program, elements = self.program, self.num_latent
        for name, value in program.observed_values.items():
            plates = [plate for plate in program.observed[name].dims if plate in rows]
            elements += value.numel() * math.prod(len(rows[p]) / program.minibatches[p][1] for p in plates)
        return max(1, int(MAX_ELEMENTS // elements // 4))

    def hessian(self, points: Tensor, position: Tensor) -> Tensor:
        if self.program.loop_reason is not None:
            return self._loop_hessian(points, position)
        return hessian_by_lanes(self.program, self.program.log_joint, points, position, self.max_lanes)

    def axes(self, points: Tensor, factor: Tensor) -> Tensor:
        return triangular_axes(factor)

    def profile(self, points: Tensor, mode: Tensor, factor: Tensor, nodes: Tensor) -> Tensor:
        steps = (factor.mT.unsqueeze(2) * nodes.unsqueeze(-1)).flatten(1, 2)
        value = self.value(points, mode.unsqueeze(1) + steps)
        return (value - self.value(points, mode.unsqueeze(1))).reshape(len(points), factor.shape[2], -1)

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
    """Second derivatives of a lane function at one position per point, all columns as lanes."""
    num_points, dim = position.shape
    eye = torch.eye(dim, dtype=position.dtype, device=position.device).repeat(num_points, 1)
    lanes = (points.repeat_interleave(dim), position.repeat_interleave(dim, 0), eye)
    hessian = hessian_products(program, log_density, *lanes, max_lanes).reshape(num_points, dim, dim)
    return 0.5 * (hessian + hessian.mT)


def hessian_products(
    program: LaneProgram,
    log_density: Callable[[Tensor, LaneInputs], Tensor],
    points: Tensor,
    position: Tensor,
    vectors: Tensor,
    max_lanes: int,
) -> Tensor:
    """Second derivatives at points (L,) and positions (L, D) times vectors (L, D), (L, D).

    Reverse mode over reverse mode.
    """
    found = []
    for start in range(0, len(position), max_lanes):
        part = slice(start, start + max_lanes)
        inputs = program.point_inputs(points[part])
        forward = torch.vmap(lambda u, *xs, like=inputs: log_density(u, like.unflatten(xs)))
        with program.quiet(), torch.enable_grad():
            u = position[part].clone().requires_grad_(True)
            value = forward(u, *inputs.flat())
            (grad,) = torch.autograd.grad(value.sum(), u, create_graph=True)
            if grad.requires_grad:
                (product,) = torch.autograd.grad((grad * vectors[part]).sum(), u, materialize_grads=True)
            else:
                product = torch.zeros_like(u)  # a density linear in u
        found.append(product)
    return torch.cat(found)
