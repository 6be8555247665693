"""The cheapest exact density of a program: is its likelihood one of affine predictors, the rest a quadratic?

The structure is guessed from values of the model at few positions, and checked at others.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._compressed import matrices
from bayestie._density import MAX_ELEMENTS, Density, ProgramDensity, hessian_by_lanes, hessian_products
from bayestie._families import NotAffine, find_families, predictors_of
from bayestie._lane import LaneInputs
from bayestie._latent_scale import ScaleSite, find_scale_site, value_and_slope
from bayestie._program import LaneProgram
from bayestie._quadratic import Quadratic
from bayestie._repeated_rows import count_repeats

# An affine map is kept dense; past this many numbers over all points the program route is used.
MAX_AFFINE = 60_000_000


def build_density(program: LaneProgram) -> Density:
    """The cheapest exact route for a program."""
    general = ProgramDensity(program)
    affine = _affine(program, general) if not program.enumerated and program.loop_reason is None else None
    return general if affine is None else affine


def _affine(program: LaneProgram, general: ProgramDensity) -> AffineDensity | None:
    try:
        return _checked_affine(program, general)
    except (NotAffine, RuntimeError, ValueError, NotImplementedError, TypeError):
        return None  # any reason not to be affine is a reason to use the general route


def _checked_affine(program: LaneProgram, general: ProgramDensity) -> AffineDensity | None:
    num_points = program.num_points
    points = torch.arange(num_points, device=program.device)
    inputs = program.point_inputs(points)
    dim, dtype, device = program.num_latent, program.dtype, program.device
    generator = torch.Generator().manual_seed(program.seed)
    probe = 0.5 * torch.randn(3, num_points, dim, dtype=dtype, generator=generator).to(device)

    sites = find_families(program, probe[0])
    rows = sum(f.size * len(f.names) for f in sites)
    if not sites or rows * min(dim, 1 + len(probe)) * num_points > MAX_AFFINE:
        return None

    def eta(position: Tensor, *flat: Tensor) -> Tensor:
        recorded = predictors_of(program, position, inputs.unflatten(flat))
        parts = [recorded[f.site][1][n].expand(f.shape).reshape(-1) for f in sites for n in f.names]
        return torch.cat(parts)

    flat = inputs.flat()
    batched = torch.vmap(eta)
    lanes = max(1, MAX_ELEMENTS // (16 * rows))
    with program.quiet():
        # The map is affine if anything, so its columns are differences of values: no differentiation.
        values = torch.stack([batched(at, *flat) for at in (torch.zeros_like(probe[0]), *probe)])
        families, kept = count_repeats(sites, values.flatten(0, 1))
        if len(kept) * dim * num_points > MAX_AFFINE:
            return None
        offset, *values = values[..., kept]

        def moved(vectors: Tensor, which: Tensor) -> Tensor:
            found = vectors.new_empty(len(vectors), len(kept))
            for part in (slice(i, i + lanes) for i in range(0, len(vectors), lanes)):
                eta_there = batched(vectors[part], *(x[which[part]] for x in flat))
                found[part] = eta_there[:, kept] - offset[which[part]]
            return found

        guesses = matrices(moved, num_points, probe)
        matrix = next((m for m in guesses if _is_map(m, offset, probe, values)), None)
    if matrix is None:
        return None

    rest, products, rest_hessian = _rest_functions(program, {f.site for f in families}, lanes)
    site = find_scale_site(program, families, matrix)
    quadratic, own, near = None, rest, probe
    if site is not None:
        own, near = _without_prior(rest, site), probe.clone()
        near[..., site.column].clamp_(-0.5, 0.5)  # far out its prior is all there is, and hides the rest
    for curvature in matrices(products, num_points, probe):
        curvature = 0.5 * (curvature + curvature.mT)
        if site is not None:
            still = curvature.clone()
            still[:, site.column] = 0.0
            still[:, :, site.column] = 0.0
            quadratic = _quadratic(own, still, points, near)
        if quadratic is not None:
            break
        quadratic = _quadratic(rest, curvature, points, probe)
        if quadratic is not None:
            site = None
            break
    if quadratic is None:
        site = None
    rest = rest if site is None else own
    density = AffineDensity(program, families, matrix, offset, rest, rest_hessian, quadratic, site)
    ours, theirs = density.value(points, probe[2].unsqueeze(1)), general.value(points, probe[2].unsqueeze(1))
    agree = (ours - theirs).abs() <= 1e-9 * (1.0 + theirs.abs())
    return density if bool(agree.all()) else None


def _is_map(matrix: Tensor, offset: Tensor, probe: Tensor, values: Sequence[Tensor]) -> bool:
    """Whether predictors are affine with that matrix where they were evaluated."""
    predicted = torch.einsum("smd,psd->psm", matrix, probe) + offset
    found = torch.stack(list(values))
    scale = 1.0 + found.abs().amax(-1, keepdim=True)
    return bool(((found - predicted).abs() <= 1e-9 * scale).all())


def _rest_functions(program: LaneProgram, without: set[str], most: int) -> tuple[Any, Any, Any]:
    """The log joint without the sites in ``without``: value with gradient, second derivatives twice.

    At most ``most`` lanes at once: what these sites would see is worked out all the same.
    """

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

    lanes = max(1, min(most, MAX_ELEMENTS // 64 // program.num_latent))

    def products(vectors: Tensor, points: Tensor) -> Tensor:
        """Second derivatives at the origin times vectors."""
        return hessian_products(program, log_density, points, torch.zeros_like(vectors), vectors, lanes)

    def rest_hessian(points: Tensor, position: Tensor) -> Tensor:
        return hessian_by_lanes(program, log_density, points, position, lanes)

    return rest, products, rest_hessian


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
