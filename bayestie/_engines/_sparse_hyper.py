"""A few latents h beside a Gaussian x: p(h | y) with x integrated out, then x given h.

log p(h, y) costs one sparse factorisation. Its mode and curvature give a Student-t proposal of h; draws are
gathered at a few nodes h_g, at each of which x is drawn from N(x_hat(h), Q(h_g)^-1); importance weights of
the joint draws correct the nodes' coarseness and the proposal's shape alike. In the joint density of (x, h)
the mode would be elsewhere: by sqrt(p_eff^2 / 2M) sd for the noise of M rows that tell of p_eff effects.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from scipy.cluster.vq import kmeans2
from scipy.special import gammaln

DEGREES = 8.0  # of freedom of the proposal
NODES = (3, 12, 48)  # tried in turn


@dataclass
class HyperFit:
    """The mode of log p(h, y), the lower factor of its inverse curvature, and whether it is one."""

    mode: np.ndarray
    factor: np.ndarray
    value: float
    converged: bool

    def propose(self, rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Student-t draws (num, d) and their log density."""
        dim = len(self.mode)
        normal = rng.standard_normal((num, dim))
        stretch = np.sqrt(DEGREES / rng.chisquare(DEGREES, num))
        t = normal * stretch[:, None]
        log_density = (
            gammaln((DEGREES + dim) / 2) - gammaln(DEGREES / 2) - 0.5 * dim * math.log(DEGREES * math.pi)
            - np.log(self.factor.diagonal()).sum()
            - 0.5 * (DEGREES + dim) * np.log1p(np.square(t).sum(1) / DEGREES)
        )  # fmt: skip
        return self.mode + t @ self.factor.T, log_density


def fit_hyper(
    objective: Callable[[np.ndarray], float], start: np.ndarray, spread: np.ndarray | None = None
) -> HyperFit:
    """Maximise log p(h, y) by BFGS on central differences; its curvature by differences of 0.3 sd.

    Args:
        objective: log p(h, y) but for a constant; -inf where it has no value.
        start: where to begin, (d,).
        spread: sds of h as far as known, say at another strength, (d,).
    """
    dim, known = len(start), {}

    def negative(h: np.ndarray) -> float:
        key = h.tobytes()
        if key not in known:
            value = objective(h)
            known[key] = -value if math.isfinite(value) else 1e300
        return known[key]

    def bends(h: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Curvature along each axis."""
        both = [negative(h + e) + negative(h - e) for e in np.diag(step)]
        return (np.array(both) - 2.0 * negative(h)) / step**2

    def sds(h: np.ndarray, step: np.ndarray) -> np.ndarray:
        return 1.0 / np.sqrt(np.clip(np.abs(bends(h, step)), 1e-4, 1e12))

    def slope(h: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.array([(negative(h + e) - negative(h - e)) / 2.0 for e in np.diag(step)]) / step

    # In units of about one sd: a posterior of many rows would send a first step of its gradient anywhere.
    unit = sds(start, np.full(dim, 1e-2) if spread is None else 0.3 * spread)
    found = scipy.optimize.minimize(
        lambda v: negative(start + unit * v),
        np.zeros(dim),
        jac=lambda v: unit * slope(start + unit * v, 0.1 * unit),
        method="BFGS",
        options={"gtol": 0.02},
    )
    mode = start + unit * found.x
    step = np.clip(0.3 * unit, 1e-4, 0.5)
    sd = sds(mode, step)
    if (np.abs(np.log(sd / unit)) > math.log(2.0)).any():
        step = np.clip(0.3 * sd, 1e-4, 0.5)
    hessian = np.diag(bends(mode, step))
    for i in range(dim):
        for j in range(i):
            a, b = np.eye(dim)[i] * step[i], np.eye(dim)[j] * step[j]
            mixed = negative(mode + a + b) - negative(mode + a - b)
            mixed += negative(mode - a - b) - negative(mode - a + b)
            hessian[i, j] = hessian[j, i] = mixed / (4 * step[i] * step[j])
    values, vectors = np.linalg.eigh(hessian)
    good = bool((values > 0).all()) and bool(np.isfinite(values).all())
    values = np.clip(np.nan_to_num(np.abs(values), nan=1.0), 1e-6, None)
    factor = np.linalg.cholesky((vectors / values) @ vectors.T)
    # Whether the optimiser stopped at the top is judged by the slope in units of the curvature.
    ascent = float(np.linalg.norm(factor.T @ slope(mode, step)))
    return HyperFit(mode, factor, -negative(mode), good and ascent < 0.05)


def gather(h: np.ndarray, factor: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (G, d) for draws h (S, d), and each draw's node."""
    num = min(most, len(h))
    if h.shape[1] == 1:
        edges = np.linspace(h.min(), h.max(), num + 1)
        label = np.clip(np.searchsorted(edges, h[:, 0], side="right") - 1, 0, num - 1)
    else:
        white = np.linalg.solve(factor, h.T).T
        label = kmeans2(white, num, minit="++", rng=np.random.default_rng(seed), iter=10)[1]
    used, label = np.unique(label, return_inverse=True)
    return np.stack([h[label == g].mean(0) for g in range(len(used))]), label
