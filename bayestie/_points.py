"""Many fits as points of few batched calls: strengths times data sets, or times observations left out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._density import build_density
from bayestie._collect import quantities
from bayestie._engines import Draws, LaplaceFit, Task
from bayestie._errors import KeywordError
from bayestie._program import LaneProgram
from bayestie._sweep import check_options, checked_over, run_engine

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
        return {n: torch.as_tensor(x.reshape(-1)).to(index.device)[index] for n, x in zip(self.values, mesh, strict=True)}

    def coords(self) -> dict[str, np.ndarray]:
        return dict(self.values)


def read_over(over: Mapping[str, Sequence[float]] | None, kwargs: Mapping[str, Any]) -> Grid:
    """The strengths asked for; none is one point without swept keywords.

    Raises:
        OptionError, StrengthError: values that cannot be swept.
        KeywordError: a keyword given and swept.
    """
    values = {} if over is None else checked_over(over)
    clash = [name for name in kwargs if name in values]
    if clash:
        raise KeywordError(
            f"keyword '{clash[0]}'",
            found="a value for a keyword that is swept as well",
            expected="one or the other",
            fix="Drop it from the call, or from over=.",
        )
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

    def run(self, program: LaneProgram, batch: int = 0) -> tuple[Draws, LaplaceFit | None]:
        """All points of a program by one call of the engine; ``batch`` gives each call its own noise."""
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
        return run_engine(self.engine, task)

    def batches(self, base: LaneProgram, num_points: int, least: int = 1) -> Iterator[range]:
        """Points 0 .. num_points - 1 in runs that fit in memory, each a multiple of ``least`` long."""
        rows = sum(v.numel() for v in base.observed_values.values())
        draws = self.num_chains * self.num_draws
        each = base.num_latent * (3 * draws + rows + 2 * base.num_latent)
        length = max(1, MAX_NUMBERS // max(1, each) // least) * least
        for start in range(0, num_points, length):
            yield range(start, min(start + length, num_points))
