"""Many fits as points of few batched calls: strengths times data sets, or times observations left out."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._assemble import Assembly
from bayestie._build_density import build_density
from bayestie._collect import TieUse, quantities, tie_uses
from bayestie._density import ProgramDensity
from bayestie._engines import Draws, Task
from bayestie._errors import KeywordError, NameLookupError, OptionError
from bayestie._model_arguments import argument_names
from bayestie._program import LaneProgram
from bayestie._sweep import run_engine
from bayestie._sweep_options import check_clash, check_options, checked_over

# Numbers (draws, or entries of predictors' matrices) that the points of one batched call may hold.
MAX_NUMBERS = 40_000_000


@dataclass(frozen=True)
class Grid:
    """The strengths of a study: values by swept keyword, their product in row-major order."""

    values: dict[str, np.ndarray]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(v) for v in self.values.values())

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def at(self, index: Tensor) -> dict[str, Tensor]:
        """Swept keyword -> its value at the flat strengths ``index``."""
        mesh = np.meshgrid(*self.values.values(), indexing="ij") if self.values else []
        flat = [torch.as_tensor(x.reshape(-1)).to(index.device) for x in mesh]
        return {name: x[index] for name, x in zip(self.values, flat, strict=True)}

    def coords(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in self.values.items()}


def read_over(over: Mapping[str, Sequence[float]] | None, kwargs: Mapping[str, Any]) -> Grid:
    """The strengths asked for; none is one point without swept keywords.

    Raises:
        OptionError, StrengthError: values that cannot be swept.
        KeywordError: a keyword given and swept.
    """
    values = {} if over is None else checked_over(over)
    check_clash(kwargs, values)
    return Grid(values)


@dataclass(frozen=True)
class Work:
    """How every point is fitted; the options of `sweep`, checked."""

    engine: str
    seed: int
    num_chains: int
    num_draws: int
    target_ess: float
    device: torch.device
    progress: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        check_options(self.engine, self.num_chains, self.num_draws, self.target_ess, None)
        if self.engine.startswith("pyro_"):
            raise OptionError(
                "engine",
                found=f"{self.engine!r}, which fits one data set in which every observation counts",
                expected="'auto', 'laplace', 'nuts' or 'svi'",
                fix="As a reference, call fit with it on each data set.",
            )

    def run(self, program: LaneProgram, batch: int = 0) -> tuple[Draws, Tensor | None]:
        """Draws at all points of a program by one call of the engine, and the modes (P, D) if it found them.

        ``batch`` gives each call its own noise.
        """
        task = Task(
            program=program,
            density=build_density(program),
            num_points=program.num_points,
            num_chains=self.num_chains,
            num_draws=self.num_draws,
            target_ess=self.target_ess,
            seed=self.seed + 1_000_003 * batch,
            progress=self.progress or (lambda event: None),
            quantities=lambda at, position: quantities(program, at, position),
        )
        draws, gaussian = run_engine(self.engine, task)
        return draws, None if gaussian is None else gaussian.fit.mode

    def batches(self, base: LaneProgram, num_points: int, least: int = 1) -> Iterator[range]:
        """Points 0 .. num_points - 1 in runs that fit in memory, each a multiple of ``least`` long."""
        rows = sum(v.numel() for v in base.observed_values.values())
        draws = self.num_chains * self.num_draws
        each = base.num_latent * (3 * draws + rows + 2 * base.num_latent)
        length = max(1, MAX_NUMBERS // max(1, each) // least) * least
        for start in range(0, num_points, length):
            yield range(start, min(start + length, num_points))


def labelled(
    program: LaneProgram,
    grid: Grid,
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
) -> Assembly:
    """Names and labels of the axes, by the rules of `sweep`."""
    idle = Task(program, ProgramDensity(program), program.num_points, 1, 1, 1.0, 0, lambda event: None)
    return Assembly(idle, grid.values, {}, None, dims or {}, coords or {})


def site_dims(labels: Assembly, use: TieUse) -> list[str]:
    """Names of the axes of a tied site, copies first."""
    names = [*labels.dims[use.name]]
    size = 1 + len(use.about["event_shape"])
    names = (names + [None] * size)[:size]
    return [name or f"{use.name}_dim_{i}" for i, name in enumerate(names)]


def one_tie(program: LaneProgram, site: str | None) -> TieUse:
    """The tied site of that name, or the only one.

    Raises:
        NameLookupError: there is none, or several and no name.
    """
    uses = {use.name: use for use in tie_uses(program)}
    if site is None and len(uses) == 1:
        return next(iter(uses.values()))
    if site in uses:
        return uses[site]
    raise NameLookupError(
        "site" if site is None else f"site '{site}'",
        found=f"tied sites {sorted(uses)}" if uses else "a model without a tied site",
        expected="one tied site, or its name in site=" if site is None else "the name of a tied site",
        fix="Name one of them." if uses else "State the copies with bayestie.tied.",
    )


def refuse_options(model: Callable[..., Any], args: Sequence[Any], options: Sequence[str]) -> None:
    """A model argument that is passed by keyword cannot carry the name of an option of the study.

    Raises:
        KeywordError: it does.
    """
    try:
        taken = list(inspect.signature(model).parameters)
    except (TypeError, ValueError):
        return
    clash = [name for name in taken if name in options and name not in argument_names(model, args)]
    if clash:
        raise KeywordError(
            f"keyword '{clash[0]}' of the model",
            found=f"the name of an option of the study ({', '.join(options)})",
            expected="another name, or a positional argument",
            fix=f"Pass '{clash[0]}' by position, or rename it in the model.",
        )
