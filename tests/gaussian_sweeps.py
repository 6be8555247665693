"""Exact sweeps of linear Gaussian models with any tie in any form, by dense algebra.

y = sum over ties of X theta + noise, theta = level + sum_j u_j sqrt(v_j) z_j. The prior of the latents
(levels, z) is Gaussian, so the posterior and the evidence are, and draws are i.i.d. Nothing here uses
the formulas under test: covariances are assembled densely.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from bayestie._results import build_tree
from bayestie._ties import Tie


@dataclass(frozen=True)
class Tied:
    """One tied site: its graph, form, Gaussian base, design matrix onto the data, swept keyword."""

    name: str
    tie: Tie
    design: np.ndarray
    form: str = "level"
    base: tuple[float, float] = (0.0, 3.0)
    keyword: str = "sigma"

    @property
    def synthesis(self):
        return self.tie.synthesize(torch.eye(self.tie.rank, dtype=torch.float64)).numpy().T

    @property
    def indicator(self):
        """Which component each copy is in, (K, c)."""
        return np.eye(self.tie.num_components)[self.tie.labels.numpy()]

    def variances(self, sigma):
        """Deviation variances (r,) and level variances (c,)."""
        l, s = self.tie.eigenvalues.numpy(), self.base[1]
        num = self.indicator.sum(0)
        if self.form == "level":
            return sigma**2 / l, np.full(len(num), s**2)
        v = np.zeros_like(l) if sigma == 0 else 1 / (l / sigma**2 + 1 / s**2)
        if self.form == "copies":
            return v, s**2 / num
        if self.tie.has_hub:
            return v, s**2 - v[:1]
        # The trace of each component's deviation covariance, shared out over its copies.
        trace = ((self.synthesis**2 * v) @ np.ones(len(l))) @ self.indicator
        return v, s**2 - trace / num

    def maps(self, sigma):
        """theta = offset + map @ (standardised level, z); variances of the level."""
        v, level = self.variances(sigma)
        return np.hstack([self.indicator * np.sqrt(level), self.synthesis * np.sqrt(v)])

    def record(self):
        return {
            **self.tie.describe(),
            "form": self.form,
            "base": f"Normal({self.base[0]:g}, {self.base[1]:g})",
            "base_loc": self.base[0],
            "base_scale": self.base[1],
            "event_shape": [],
            "sigma_from": self.keyword,
            "copy_dims": [f"{self.name}_copy"],
        }


def _mean_and_map(ties, point):
    maps = [t.design @ t.maps(s) for t, s in zip(ties, point, strict=True)]
    mean = sum(t.design @ np.full(t.tie.num_copies, t.base[0]) for t in ties)
    return mean, np.hstack(maps)


def log_evidence(ties, point, y, noise):
    """log N(y; mean, M M^T + noise^2 I)."""
    mean, design = _mean_and_map(ties, point)
    covariance = design @ design.T + np.diag(np.broadcast_to(noise, y.shape) ** 2)
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), y - mean)
    return -0.5 * (len(y) * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] + whitened @ whitened)


def posterior(ties, point, y, noise):
    """Mean and covariance of the standardised latents."""
    mean, design = _mean_and_map(ties, point)
    weight = np.broadcast_to(noise, y.shape) ** -2.0
    precision = np.eye(design.shape[1]) + design.T @ (weight[:, None] * design)
    covariance = np.linalg.inv(precision)
    return covariance @ design.T @ (weight * (y - mean)), covariance


def gaussian_tree(ties, y, noise, grids, *, num_chains=4, num_draws=250, seed=0, sweep=None, keep=None):
    """The tree that a sweep over `grids` (keyword -> strengths) by an exact engine returns.

    y may be a function of the swept point (a dict): data that vary along a keyword that is no strength.
    """
    generator = np.random.default_rng(seed)
    lead = [len(values) for values in grids.values()]
    shape = (num_chains, num_draws)
    points = list(itertools.product(*grids.values()))
    columns: dict[str, list] = {}
    evidence = []
    for at in points:
        swept = dict(zip(grids, at, strict=True))
        point = [swept[t.keyword] for t in ties]
        data = np.asarray(y(swept) if callable(y) else y)
        found = _draw(ties, point, data, np.broadcast_to(noise, data.shape), shape, generator)
        for key, value in found.items():
            columns.setdefault(key, []).append(value)
        evidence.append(log_evidence(ties, point, data, noise))
    groups: dict[str, dict] = {}
    for key, values in columns.items():
        group, name = key.split("/")
        groups.setdefault(group, {})[name] = np.stack(values).reshape(*lead, *values[0].shape)
    groups = {group: found for group, found in groups.items() if keep is None or group in keep}
    full = {
        "engine": np.full(lead, "laplace"),
        "certified": np.ones(lead, dtype=bool),
        "reason": np.full(lead, "exact"),
        "exact": np.ones(lead, dtype=bool),
        "log_evidence": np.array(evidence).reshape(lead),
        "log_evidence_error": np.zeros(lead),
        "khat": np.full(lead, -np.inf),
        "ess_weights": np.full(lead, np.inf),
        **{key: np.broadcast_to(value, lead) for key, value in (sweep or {}).items()},
    }
    groups["sweep"] = {key: value for key, value in full.items() if value is not None}
    groups["observed_data"] = {"y": data}
    return build_tree(
        swept=grids,
        groups=groups,
        event_dims={**{t.name: [f"{t.name}_copy"] for t in ties}, "y": ["obs"]},
        coords={},
        attrs={"ties": {t.name: t.record() for t in ties}, "seed": seed, "model": "gaussian"},
    )


def _log_normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)


def _draw(ties, point, y, noise, shape, generator):
    mean, covariance = posterior(ties, point, y, noise)
    root = np.linalg.cholesky(covariance)
    white = generator.normal(size=(*shape, len(mean)))
    u = mean + white @ root.T
    out = {}
    location, start = 0.0, 0
    for t, sigma in zip(ties, point, strict=True):
        c, r = t.tie.num_components, t.tie.rank
        own = u[..., start : start + c + r]
        start += c + r
        theta = t.base[0] + own @ t.maps(sigma).T
        level = t.base[0] + own[..., :c] * np.sqrt(t.variances(sigma)[1])
        location = location + theta @ t.design.T
        flat = level[..., 0] if c == 1 else level
        energy = t.tie.energy(torch.as_tensor(theta), torch.as_tensor(flat)).numpy()
        out[f"posterior/{t.name}"] = theta
        out[f"posterior/{t.name}_level"] = flat
        out[f"posterior/{t.name}_z"] = own[..., c:]
        out[f"tie_energy/{t.name}"] = energy
    log_likelihood = _log_normal(y, location, noise)
    out["log_likelihood/y"] = log_likelihood
    out["sample_stats/lp"] = _log_normal(u, 0.0, 1.0).sum(-1) + log_likelihood.sum(-1)
    log_density = -0.5 * (white**2).sum(-1) - np.log(np.diag(root)).sum()
    out["sample_stats/laplace_log_density"] = log_density - 0.5 * len(mean) * math.log(2 * math.pi)
    return out
