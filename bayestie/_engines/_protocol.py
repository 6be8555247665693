"""What an engine is given and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._density import Density
from bayestie._program import LaneProgram


@dataclass(frozen=True)
class Task:
    """The work: a density at every point of a sweep, and how much to draw from it."""

    program: LaneProgram
    density: Density
    num_points: int
    num_chains: int
    num_draws: int
    target_ess: float
    seed: int
    progress: Callable[[dict[str, Any]], None]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def points(self) -> Tensor:
        return torch.arange(self.num_points, device=self.program.device)

    def generator(self, *key: int) -> np.random.Generator:
        """Noise keyed by the seed and ``key`` (point, chain, ...), whatever else runs beside it."""
        return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence([self.seed, *key])))

    def normals(self, shape: tuple[int, ...], *key: int) -> Tensor:
        """Standard normals of their own stream ``key``."""
        noise = self.generator(*key).standard_normal(shape)
        return torch.as_tensor(noise, dtype=self.program.dtype, device=self.program.device)


@dataclass
class Draws:
    """Equal-weight draws at some points, with what is known about their quality.

    Every field leads with the points axis P; ``position`` is (P, chains, draws, num_latent).
    """

    points: Tensor
    position: Tensor
    log_density: Tensor  # (P, chains, draws)
    engine: list[str]
    certified: list[bool]
    reason: list[str]
    exact: list[bool]
    khat: Tensor  # (P,), -inf where the posterior is Gaussian, +inf where there is no fit
    ess_weights: Tensor  # (P,), inf where draws carry no weights
    log_evidence: Tensor
    log_evidence_error: Tensor
    seconds: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)  # (P, chains, draws) each

    def replace(self, other: "Draws") -> None:
        """Take over another engine's draws at its points, in place."""
        where = {int(p): i for i, p in enumerate(self.points)}
        for j, point in enumerate(other.points.tolist()):
            i = where[point]
            for name in ("position", "log_density"):
                getattr(self, name)[i] = getattr(other, name)[j]
            for name in ("engine", "certified", "reason", "exact"):
                getattr(self, name)[i] = getattr(other, name)[j]
            for name in ("khat", "ess_weights", "log_evidence", "log_evidence_error"):
                getattr(self, name)[i] = getattr(other, name)[j]
            self.seconds[i] += other.seconds[j]
            for name, values in other.stats.items():
                if name not in self.stats:
                    self.stats[name] = torch.zeros(
                        self.log_density.shape, dtype=values.dtype, device=values.device
                    )
                self.stats[name][i] = values[j]
