"""What a contender is: a way to get draws at every strength, as a process of its own runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks._workloads import Workload

NUM_CHAINS = 4
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Setting:
    """How one strength is run.

    Attributes:
        centred: parametrisation of the tie, 1 or 0.
        draws: per chain, after warmup.
        warmup: iterations per chain before.
    """

    centred: int = 0
    draws: int = 250
    warmup: int = 300

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Contender(ABC):
    """Draws of a workload's quantities by one library.

    Laws: `run` starts from the data in memory and returns draws in memory; the same settings and seed give
    the same draws; the constructor does what is not timed (imports, reading data).

    Attributes:
        together: all strengths are one computation, so all take the same number of draws.
        parametrisations: which values of `centred` it can run.
    """

    together: ClassVar[bool] = False
    parametrisations: ClassVar[tuple[int, ...]] = (0, 1)

    def __init__(self, workload: Workload, arrays: Path, seed: int):
        self.workload = workload
        self.seed = seed
        self.prepare(arrays)

    @abstractmethod
    def prepare(self, arrays: Path) -> None:
        """Import what is needed and read the data."""

    @abstractmethod
    def run(self, strengths: list[float], settings: list[Setting], progress: Progress) -> list[np.ndarray]:
        """Draws (chains, draws, quantities) at each strength; `progress` is told of each one finished."""

    def claims(self) -> dict[str, Any]:
        """What the last run says about itself, for the record."""
        return {}


def columns(variables: dict[str, Any], names: tuple[str, ...]) -> np.ndarray:
    """Variables (chains, draws, ...) by name -> (chains, draws, quantities), in the order of `names`."""
    parts = [np.asarray(variables[name], dtype=np.float64) for name in names]
    return np.concatenate([x.reshape(*x.shape[:2], -1) for x in parts], -1)
