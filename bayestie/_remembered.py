"""What was learned of a model, for the next call with it: the structure of its density, its graphs.

Working out a density's structure takes longer than many a sweep, and another seed, engine or number of draws
changes nothing of it. A model is a function that may read anything: it is the same only if its own log joint
density, at positions kept for that, is the same to the last bit.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayestie._affine import AffineDensity
from bayestie._build_density import build_density
from bayestie._density import Density, ProgramDensity
from bayestie._program import LaneProgram, identity

_MOST = 2  # models
_NUMBERS = 20_000_000  # of a density's matrices and of its data: more are not held on to
_POINTS = 32  # at most, that the log joint is compared at
_REACH = (0.5, 3.0)  # standard deviations of the positions that the log joint is compared at


@dataclass
class Known:
    """A program, its density if that is an affine one, and the log joint density at some positions."""

    program: LaneProgram
    affine: AffineDensity | None
    position: Tensor
    log_joint: Tensor


_known: OrderedDict[tuple[int, int], Known] = OrderedDict()  # by identity of the model, which it keeps alive


def program_of(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    swept: Mapping[str, Tensor],
    *,
    device: torch.device,
    seed: int,
) -> tuple[LaneProgram, Known | None]:
    """The lane program of a call, and what is known of it from the last calls."""
    before = _known.get(identity(model))
    validated = None if before is None else before.program
    program = LaneProgram(model, args, kwargs, swept, device=device, seed=seed, validated=validated)
    if before is None or _is_same(program, before):
        return program, before
    return LaneProgram(model, args, kwargs, swept, device=device, seed=seed), None


def density_of(program: LaneProgram, known: Known | None = None) -> Density:
    """The cheapest exact density of a program: the one known, or `build_density`'s.

    The program's graphs, too, are those made before; which of them a call uses is decided anew.
    """
    key = identity(program.model)
    if known is not None:
        _known.move_to_end(key)
        known.program.tiers = program.tiers = known.program.tiers.again()
        return ProgramDensity(program) if known.affine is None else known.affine
    density = build_density(program)
    affine = density if isinstance(density, AffineDensity) else None
    _known.pop(key, None)
    if program.loop_reason is None and _size(program, affine) <= _NUMBERS:
        position = _positions(program)
        log_joint = _log_joint(program, position)
        if log_joint is not None:
            _known[key] = Known(program, affine, position, log_joint)
            if len(_known) > _MOST:
                _known.popitem(last=False)
    return density


def _size(program: LaneProgram, affine: AffineDensity | None) -> int:
    numbers = sum(x.numel() for x in (*_tensors(program), *program.observed_values.values()))
    if affine is not None:
        points, rows, dim = affine.matrix.shape
        numbers += points * dim * (2 * rows + 6 * dim)
    return numbers


def _tensors(program: LaneProgram) -> list[Tensor]:
    parts = (program.args, program.kwargs, program.params, program.points.flat())
    return [x for x in tree_leaves(parts) if isinstance(x, Tensor)]


def _is_same(program: LaneProgram, before: Known) -> bool:
    old = before.program
    if not program.has_inputs_of(old) or _layout(program) != _layout(old):
        return False
    found = _log_joint(program, before.position)
    return found is not None and torch.equal(found, before.log_joint)


def _layout(program: LaneProgram) -> list[Any]:
    sites = (program.latent, program.observed, program.deterministic)
    found = [site for part in sites for site in part.values()]
    return [program.minibatches] + [
        (site.name, site.shape, site.dims, site.start, site.unconstrained_shape) for site in found
    ]


def _positions(program: LaneProgram) -> Tensor:
    generator = torch.Generator().manual_seed(program.seed + 17)
    noise = torch.randn(len(_REACH), program.num_latent, dtype=program.dtype, generator=generator)
    return noise.to(program.device) * torch.tensor(_REACH).to(noise).unsqueeze(1)


def _log_joint(program: LaneProgram, position: Tensor) -> Tensor | None:
    """At every position, of some points, by the model itself; None where it cannot be."""
    last, num = program.num_points - 1, min(program.num_points, _POINTS)
    points = torch.linspace(0, last, num, device=program.device).round().long()
    inputs = program.point_inputs(points.repeat_interleave(len(position)))
    try:
        with program.quiet(), torch.no_grad():
            return program.batched(False, inputs)(position.repeat(num, 1), *inputs.flat())
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None
