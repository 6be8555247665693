"""What an engine is given and what it gives back."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._density import Density
from bayestie._engines._whitened import Whitened
from bayestie._program import LaneProgram
from bayestie._sparse_density import SparseDensity
from bayestie._workers import WORTH_A_THREAD, run_all


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
    # (points, positions (P, chains, draws, D)) -> the posterior variables judged (P, chains, draws, Q)
    quantities: Callable[[Tensor, Tensor], Tensor] | None = None
    monitor: tuple[str, ...] = ()  # their names, where not all are judged
    sparse: SparseDensity | None = None  # the density in the coordinates of the copies, where it is used
    refusal: str = ""  # why it is not, where it was tried

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

    def normals_of(self, shape: tuple[int, ...], keys: Sequence[tuple[int, ...]]) -> Tensor:
        """The same of several streams, (keys, *shape), a thread to each."""
        noise = torch.empty(len(keys), *shape, dtype=torch.float64)

        def fill(key: tuple[int, ...], out: np.ndarray) -> None:
            self.generator(*key).standard_normal(out=out)

        jobs = [partial(fill, key, out) for key, out in zip(keys, noise.numpy(), strict=True)]
        if noise.numel() >= WORTH_A_THREAD:
            run_all(jobs)
        else:
            for job in jobs:
                job()
        return noise.to(dtype=self.program.dtype, device=self.program.device)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an engine; ``draws`` holds the points that were finished."""

    def __init__(self, draws: "Draws"):
        super().__init__()
        self.draws = draws


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
    # (P, 3): max R-hat, min bulk and min tail effective sample size over all draws made, thinned or not;
    # NaN where the engine draws independently.
    quality: Tensor = field(default_factory=lambda: torch.empty(0, 3))
    nested_rhat: Tensor = field(default_factory=lambda: torch.empty(0))  # (P,), NaN without superchains
    divergences: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # (P,)
    stats: dict[str, Tensor] = field(default_factory=dict)  # (P, chains, draws) each
    # lp and laplace_log_density (P, n) at independent draws from the Laplace Gaussian, for bridge sampling
    pool: dict[str, Tensor] = field(default_factory=dict)
    # (P, columns or quantiles x columns) each: moments over all draws made, where not all are kept
    summary: dict[str, Tensor] = field(default_factory=dict)
    whitened: list[Whitened] = field(default_factory=list)  # of the sparse route, for `overlap`

    def __post_init__(self) -> None:
        count = len(self.points)
        if len(self.quality) != count:
            self.quality = torch.full((count, 3), torch.nan, dtype=torch.float64)
        if len(self.nested_rhat) != count:
            self.nested_rhat = torch.full((count,), torch.nan, dtype=torch.float64)
        if len(self.divergences) != count:
            self.divergences = torch.zeros(count, dtype=torch.long)

    def take(self, rows: list[int]) -> "Draws":
        """The draws of the points in ``rows``."""
        index = torch.tensor(rows, dtype=torch.long, device=self.points.device)

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index.to(value.device)]
            if isinstance(value, dict):
                return {name: pick(x) for name, x in value.items()}
            return [value[i] for i in rows] if value else []

        return Draws(**{f.name: pick(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def replace(self, other: "Draws") -> None:
        """Take over another engine's draws at its points, in place."""
        where = {int(p): i for i, p in enumerate(self.points)}
        for j, point in enumerate(other.points.tolist()):
            i = where[point]
            for name in ("position", "log_density"):
                getattr(self, name)[i] = getattr(other, name)[j]
            for name in ("engine", "certified", "reason", "exact"):
                getattr(self, name)[i] = getattr(other, name)[j]
            for name in ("ess_weights", "quality", "nested_rhat", "divergences"):
                getattr(self, name)[i] = getattr(other, name)[j]
            if torch.isfinite(other.log_evidence[j]):  # else the evidence of the draws replaced stands
                for name in ("khat", "log_evidence", "log_evidence_error"):
                    getattr(self, name)[i] = getattr(other, name)[j]
            self.seconds[i] += other.seconds[j]
            for name, values in other.stats.items():
                if name not in self.stats:
                    self.stats[name] = torch.zeros(
                        self.log_density.shape, dtype=values.dtype, device=values.device
                    )
                self.stats[name][i] = values[j]
