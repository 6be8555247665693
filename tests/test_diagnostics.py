"""Batched R-hat and effective sample sizes against arviz-stats, one quantity at a time."""

from typing import Any

import arviz_stats.base as stats
import numpy as np
import pytest
import torch
from zoo import numbers

from bayestie._diagnostics import convergence
from bayestie._engines._quality import MAX_RHAT, draws_for_rhat, qualities
from bayestie._workers import solve


def chains(kind: str, num_chains: int, num_draws: int) -> np.ndarray:
    """(chains, draws, quantities)."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((num_chains, num_draws, 3))
    if kind == "independent":
        return noise
    if kind in ("sticky", "alternating"):
        phi, out = (0.9 if kind == "sticky" else -0.6), noise.copy()
        for t in range(1, num_draws):
            out[:, t] = phi * out[:, t - 1] + np.sqrt(1 - phi**2) * noise[:, t]
        return out
    if kind == "ties":
        return np.round(noise)
    if kind == "apart":
        return noise + np.arange(num_chains)[:, None, None]
    if kind == "scales":
        return noise * (1 + np.arange(num_chains))[:, None, None]
    if kind == "two values":
        return (noise > 0.3).astype(float)
    if kind == "heavy":
        return rng.standard_cauchy((num_chains, num_draws, 3))
    raise AssertionError(kind)


def arviz(name: str, draws: np.ndarray, **options) -> float:
    function: Any = getattr(stats.array_stats, name)
    return float(function(draws, **options))


KINDS = ["independent", "sticky", "alternating", "ties", "apart", "scales", "two values", "heavy"]
SHAPES = [(4, 100), (4, 101), (2, 33), (3, 250), (1, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_arviz(kind, shape):
    draws = chains(kind, *shape)
    tensor = torch.as_tensor(draws)
    rhat, bulk, tail, _ = convergence(tensor)
    for i in range(draws.shape[-1]):
        one = draws[..., i]
        if shape[0] > 1:
            assert float(rhat[i]) == pytest.approx(arviz("rhat", one), rel=1e-9)
        assert float(bulk[i]) == pytest.approx(arviz("ess", one, method="bulk"), rel=1e-9)
        expected = arviz("ess", one, method="tail", prob=(0.05, 0.95))
        assert float(tail[i]) == pytest.approx(expected, rel=1e-9)


def test_a_constant_counts_every_draw():
    _, bulk, tail, varies = convergence(torch.ones(4, 50, 1, dtype=torch.float64))
    assert bulk.tolist() == tail.tolist() == [200.0] and not bool(varies)


@pytest.mark.parametrize(("columns", "chains"), [(5, 4), (60, 4), (20, 2)])
def test_draws_planned_for_rhat_are_about_as_many_as_it_takes(columns, chains):
    draws = round(draws_for_rhat(columns, chains))
    independent = numbers(80, chains, draws, columns, seed=3)
    good = sum(rhat < MAX_RHAT for rhat, _, _ in qualities(independent))
    assert good >= 49  # 60 of 80 at least, less three binomial standard deviations
    fewer = sum(rhat < MAX_RHAT for rhat, _, _ in qualities(independent[:, :, : round(0.4 * draws)]))
    assert fewer < 60  # so they are not 2.5 times too many


def test_equations_are_solved_on_several_threads():
    # torch.linalg.solve of this batch, two threads: an error of MKL, or no end.
    matrices, right = numbers(4, 300, 300, seed=1), numbers(4, 300, 2, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = solve(matrices, right)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(matrices @ found, right, rtol=1e-8, atol=1e-8)
