"""Posterior moments to test against: from draws with their Monte Carlo errors, and without noise."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from bayestie._build_density import build_density
from bayestie._collect import collect, quantities
from bayestie._draws import effective_size
from bayestie._engines import LaplaceFit, Task, fit_laplace
from bayestie._program import LaneProgram

FAMILY_WISE = 1e-3


def limit(count):
    """How many Monte Carlo errors `count` right numbers may be off: 4, or Bonferroni's where more than 16.

    With 16 numbers at 4 errors each, one in a thousand tests of right code fails; for more of them the limit
    that keeps this rate: 4.8 for 700.
    """
    return max(4.0, norm.isf(FAMILY_WISE / (2 * count)))


@dataclass(frozen=True)
class Sample:
    """Draws (chain, draw, ...) of numbers, and the effective size of the weights they were resampled by."""

    draws: np.ndarray
    weights_ess: float = np.inf

    @classmethod
    def of(cls, tree, names, **point):
        """The draws of some sites of a tree as columns (chain, draw, number), at one swept point."""
        data = tree["posterior"].to_dataset().sel(point) if point else tree["posterior"].to_dataset()
        ess = tree["sweep"].to_dataset().sel(point)["ess_weights"] if "sweep" in tree.children else np.inf
        columns = [data[name].transpose("chain", "draw", ...).values for name in names]
        return cls(np.concatenate([x.reshape(*x.shape[:2], -1) for x in columns], -1), float(ess))

    def _error(self, draws):
        """Standard error of the mean of each column."""
        size = 1 / (1 / effective_size(draws) + 1 / self.weights_ess)
        return draws.std((0, 1), ddof=1) / np.sqrt(size)

    @property
    def mean(self):
        return self.draws.mean((0, 1)), self._error(self.draws)

    @property
    def sd(self):
        """By the delta method: the error of the variance over twice the sd."""
        sd = self.draws.std((0, 1), ddof=1)
        return sd, self._error((self.draws - self.draws.mean((0, 1))) ** 2) / (2 * sd)

    def share_below(self, value):
        """Share of the draws below a value: quantiles compared as probabilities need no density."""
        return (self.draws <= value).mean((0, 1)), self._error((self.draws <= value).astype(float))


def scores(found, expected, expected_error: Any = 0.0):
    """(value, error) against an expectation, in joint standard errors."""
    value, error = found
    return (value - np.asarray(expected)) / np.hypot(error, expected_error)


def assert_within(score):
    """Every score within the limit for so many of them."""
    assert np.isfinite(score).all()
    worst = np.abs(score).max()
    assert worst < limit(score.size), f"{worst:.2f} Monte Carlo errors off; {limit(score.size):.2f} allowed"


def assert_same(one, other):
    """Two samples agree in means and sds."""
    differences = []
    for name in ("mean", "sd"):
        (a, a_error), (b, b_error) = getattr(one, name), getattr(other, name)
        differences.append((a - b) / np.hypot(a_error, b_error))
    assert_within(np.stack(differences))


@dataclass(frozen=True)
class Exact:
    """A model's task and Laplace fit, for Gaussian posteriors the posterior itself: nothing here is drawn."""

    program: LaneProgram
    task: Task
    fit: LaplaceFit

    @classmethod
    def of(cls, model, args=(), kwargs=None, over=None):
        over = {} if over is None else over
        points = {name: torch.as_tensor(v, dtype=torch.float64) for name, v in over.items()}
        program = LaneProgram(
            model, tuple(args), dict(kwargs or {}), points, device=torch.device("cpu"), seed=0
        )
        task = Task(
            program=program,
            density=build_density(program),
            num_points=max([1, *(len(v) for v in points.values())]),
            num_chains=1,
            num_draws=10,
            target_ess=10,
            seed=0,
            progress=lambda event: None,
            quantities=lambda at, position: quantities(program, at, position),
        )
        return cls(program, task, fit_laplace(task, task.points))

    def sized(self, *, num_chains, num_draws, target_ess, **options):
        """The task with other sizes, and options of an engine."""
        return dataclasses.replace(
            self.task, num_chains=num_chains, num_draws=num_draws, target_ess=target_ess, options=options
        )

    def sites(self, position, names):
        """Sites at positions of the first point (1, chains, draws, D), as columns (chains, draws, number)."""
        keys = [f"posterior/{name}" for name in names]
        found = collect(self.program, self.task.points[:1], position[:1], lambda key: key in keys)
        return np.concatenate([found[key][0].reshape(*position.shape[1:3], -1) for key in keys], -1)

    def moments(self, site):
        """Mean (P, n) and covariance (P, n, n) of a site that is affine in the latents."""
        mode, factor = self.fit.mode, self.fit.factor
        position = torch.cat([mode.unsqueeze(1), mode.unsqueeze(1) + factor.mT], 1).unsqueeze(1)
        name = f"posterior/{site}"
        values = collect(self.program, self.task.points, position, lambda key: key == name)[name]
        values = values.reshape(*values.shape[:1], values.shape[2], -1)
        columns = values[:, 1:] - values[:, :1]
        return values[:, 0], columns.swapaxes(1, 2) @ columns
