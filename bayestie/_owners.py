"""Which observation belongs to which copy of a tied site: read off the model, or as given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._collect import TieUse
from bayestie._density import MAX_ELEMENTS
from bayestie._errors import ModelError, NameLookupError, ShapeError
from bayestie._leave_out import observation_shapes
from bayestie._program import LaneProgram
from bayestie._simulate import Given

Groups = Mapping[str, Any] | Sequence[int] | Tensor | np.ndarray


def found_owners(program: LaneProgram, use: TieUse) -> dict[str, np.ndarray]:
    """Observed site -> copy of each observation, -1 where it moves with none."""
    owners, moved = {}, False
    for name, moves in _dependence(program, use).items():
        number = moves.sum(-1)
        if (number > 1).any():
            first = tuple(int(i) for i in np.argwhere(number > 1)[0])
            copies = np.flatnonzero(moves[first])
            raise ModelError(
                f"observed site '{name}'",
                found=f"observation {first} depends on {len(copies)} copies of '{use.name}': "
                f"{copies[:6].tolist()}{'...' if len(copies) > 6 else ''}",
                expected="observations that each belong to one copy",
                fix="Say which copy each observation belongs to by groups=.",
            )
        moved |= bool((number > 0).any())
        owners[name] = np.where(number > 0, moves.argmax(-1), -1)
    if not moved:
        raise ModelError(
            f"tied site '{use.name}'",
            found="no observation whose distribution moves with a copy, the other latents held",
            expected="observations that depend on copies",
            fix="Say which copy each observation belongs to by groups=.",
        )
    return owners


def _dependence(program: LaneProgram, use: TieUse) -> dict[str, np.ndarray]:
    """Observed site -> (*observations, K): whether the log density changes when one copy alone does."""
    inputs, axis = program.point(0), -1 - len(use.about["event_shape"])
    found: dict[str, np.ndarray] = {}
    for attempt in range(2):  # a difference that vanishes by chance does not vanish twice
        generator = torch.Generator().manual_seed(attempt)
        position = 0.5 * torch.randn(program.num_latent, dtype=program.dtype, generator=generator)
        position = position.to(program.device)
        with torch.no_grad(), program.quiet():
            theta = program.run_lane(position, inputs).messages[use.name]["value"]
        # Copies apart, so that no symmetry hides one; a step in proportion to where they are.
        noise = torch.randn(2, *theta.shape, dtype=program.dtype, generator=generator).to(theta)
        theta = theta + 0.1 * noise[0]
        step = 0.5 * (1.0 + theta.abs()) * noise[1]

        def densities(value: Tensor, position: Tensor = position, inputs: Any = inputs) -> dict[str, Tensor]:
            with Given({use.name: value}):
                lane = program.run_lane(position, inputs)
            return {name: lane.log_densities[name] for name in program.observed}

        with torch.no_grad(), program.quiet():
            before = densities(theta)
            rows = sum(x.numel() for x in before.values()) + theta.numel()
            width = max(1, MAX_ELEMENTS // 8 // rows)
            for start in range(0, use.tie.num_copies, width):
                index = torch.arange(start, min(start + width, use.tie.num_copies), device=theta.device)
                moved = theta.unsqueeze(0).repeat(len(index), *[1] * theta.dim())
                for row, copy in enumerate(index.tolist()):
                    moved[row].select(axis, copy).add_(step.select(axis, copy))
                after = _rows(densities, moved)
                for name, old in before.items():
                    change = (after[name] - old).abs() > 1e-10 * (1.0 + old.abs())
                    out = found.setdefault(name, np.zeros((*old.shape, use.tie.num_copies), dtype=bool))
                    out[..., index.cpu().numpy()] |= change.movedim(0, -1).cpu().numpy()
    return found


def _rows(function: Callable[[Tensor], dict[str, Tensor]], values: Tensor) -> dict[str, Tensor]:
    try:
        return torch.vmap(function)(values)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        rows = [function(value) for value in values]  # a model that only runs one lane at a time
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def given_owners(program: LaneProgram, use: TieUse, groups: Groups) -> dict[str, np.ndarray]:
    shapes = observation_shapes(program)
    if not isinstance(groups, Mapping):
        if len(shapes) != 1:
            raise ShapeError(
                "groups",
                found=f"one list for the observed sites {sorted(shapes)}",
                expected="a dict from observed site to the copy of each of its observations",
                fix="Write groups={'y': ...}.",
            )
        groups = {next(iter(shapes)): groups}
    unknown = sorted(set(groups) - set(shapes))
    if unknown:
        raise NameLookupError(
            f"groups['{unknown[0]}']",
            found="no such observed site",
            expected=f"one of {sorted(shapes)}",
            fix="Correct the name.",
        )
    owners = {name: np.full(tuple(shape), -1) for name, shape in shapes.items()}
    for name, given in groups.items():
        own = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
        shape = tuple(shapes[name])
        whole = own.dtype.kind in "iu" and own.shape == shape
        if not whole or own.min(initial=0) < -1 or own.max(initial=0) >= use.tie.num_copies:
            raise ShapeError(
                f"groups['{name}']",
                found=f"{own.dtype} of shape {own.shape}"
                + (f" from {own.min()} to {own.max()}" if own.size and own.dtype.kind in "iuf" else ""),
                expected=f"whole numbers from -1 to {use.tie.num_copies - 1} of shape {shape}",
                fix="Give each observation the 0-based number of its copy, -1 for none.",
            )
        owners[name] = own
    return owners
