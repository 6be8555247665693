"""Batched R-hat and effective sample sizes against arviz-stats, one quantity at a time."""

from typing import Any

import arviz_stats.base as stats
import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import rankdata
from zoo import numbers

from bayestie._diagnostics import convergence
from bayestie._engines._quality import MAX_RHAT, Quality, draws_for_rhat, is_good, qualities
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
    rhat, bulk, tail, *_ = convergence(tensor)
    for i in range(draws.shape[-1]):
        one = draws[..., i]
        if shape[0] > 1:
            assert float(rhat[i]) == pytest.approx(arviz("rhat", one), rel=1e-9)
        assert float(bulk[i]) == pytest.approx(arviz("ess", one, method="bulk"), rel=1e-9)
        expected = arviz("ess", one, method="tail", prob=(0.05, 0.95))
        assert float(tail[i]) == pytest.approx(expected, rel=1e-9)


def test_a_constant_counts_every_draw():
    _, bulk, tail, varies, _ = convergence(torch.ones(4, 50, 1, dtype=torch.float64))
    assert bulk.tolist() == tail.tolist() == [200.0] and not bool(varies)


@pytest.mark.parametrize("spread", [1e-13, 3e-12, 1.0])
def test_draws_that_differ_in_their_last_digits_only(spread):
    # Sorting puts a draw's number in place of the last bits.
    draws = 1.0 + spread * chains("independent", 4, 250)
    draws[:, ::7, 0] = -0.0
    draws[:, ::5, 0] = 0.0
    found = convergence(torch.as_tensor(draws))
    for i in range(3):
        assert float(found.rhat[i]) == pytest.approx(arviz("rhat", draws[..., i]), rel=1e-9)
        assert float(found.ess_bulk[i]) == pytest.approx(arviz("ess", draws[..., i], method="bulk"), rel=1e-9)


def nested(draws: np.ndarray, pieces: int) -> float:
    """Margossian et al. (2024), eq. 6 and 7, of the scores of ranks and of folded ranks, as they stand there.

    Args:
        draws: one quantity, (superchains, draws): chains end to end.
        pieces: chains in a superchain.
    """
    values = []
    for x in (draws, abs(draws - np.median(draws))):
        scores = ndtri((rankdata(x).reshape(x.shape) - 0.375) / (x.size + 0.25))
        chain = scores.reshape(len(x), pieces, -1)
        between = chain.mean((1, 2)).var(ddof=1)
        among = chain.mean(2).var(1, ddof=1) if pieces > 1 else np.zeros(len(x))
        values.append(np.sqrt(1.0 + between / (among + chain.var(2, ddof=1).mean(1)).mean()))
    return max(values)


@pytest.mark.parametrize(("pieces", "shape"), [(1, (4, 100)), (5, (4, 100)), (4, (2, 32)), (2, (3, 250))])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_rhat_is_its_formula(kind, pieces, shape):
    draws = chains(kind, *shape)
    found = convergence(torch.as_tensor(draws), pieces).nested_rhat
    for i in range(draws.shape[-1]):
        assert float(found[i]) == pytest.approx(nested(draws[..., i], pieces), rel=1e-9)


def test_nested_rhat_of_superchains_of_one_chain_is_the_classical():
    draws = chains("sticky", 4, 100)
    found = convergence(torch.as_tensor(draws)).nested_rhat
    for i in range(draws.shape[-1]):
        one = draws[..., i]
        classical = []
        for x in (one, abs(one - np.median(one))):
            scores = ndtri((rankdata(x).reshape(x.shape) - 0.375) / (x.size + 0.25))
            classical.append(arviz("rhat", scores, method="identity"))
        assert float(found[i]) ** 2 == pytest.approx(max(classical) ** 2 + 1 / 100, rel=1e-9)


def test_nested_rhat_where_the_middle_draw_is_in_no_half():
    # 3 chains of 11: the middle one loses its middle draw, and the third begins a draw earlier.
    draws = chains("apart", 4, 33)
    kept = np.delete(draws, 16, 1)
    found = convergence(torch.as_tensor(draws), 3).nested_rhat
    for i in range(draws.shape[-1]):
        values = []
        middle = np.median(kept[..., i])
        for x in (kept[..., i], abs(kept[..., i] - middle)):
            scores = ndtri((rankdata(x).reshape(x.shape) - 0.375) / (x.size + 0.25))
            own = [scores[:, :11], scores[:, 11:21], scores[:, 21:]]
            means = np.stack([c.mean(1) for c in own], 1)
            within = means.var(1, ddof=1) + np.stack([c.var(1, ddof=1) for c in own], 1).mean(1)
            values.append(np.sqrt(1 + means.mean(1).var(ddof=1) / within.mean()))
        assert float(found[i]) == pytest.approx(max(values), rel=1e-9)


def test_nested_rhat_of_independent_draws_is_that_of_their_number():
    # nR^2 - 1 is near chi^2_{K-1} / ((K - 1) M n): 1 / (M n) in the mean; folding and the larger of both add.
    draws = numbers(400, 4, 5 * 50, 1, seed=4)
    excess = convergence(draws, 5).nested_rhat.square() - 1.0
    assert float(excess.mean()) > 1 / 250 - 3 * float(excess.std()) / 20
    assert float(excess.mean()) < 2 / 250


def test_short_chains_that_never_leave_their_starts_are_refused():
    # Superchains begin apart and their chains stay where they began: as many draws as one likes say so.
    starts = numbers(1, 4, 1, 1, seed=5).expand(1, 4, 5 * 400, 1)
    draws = starts + 0.3 * numbers(1, 4, 5 * 400, 1, seed=6)
    (found,) = qualities(draws, 5)
    assert found.nested_rhat > 1.5
    (mixed,) = qualities(numbers(1, 4, 5 * 400, 1, seed=6), 5)
    assert 1.0 <= mixed.nested_rhat < MAX_RHAT and is_good(mixed, 400.0)


def test_nested_rhat_alone_refuses():
    assert is_good(Quality(1.005, 900.0, 900.0, 1.005), 400.0)
    assert not is_good(Quality(1.005, 900.0, 900.0, 1.02), 400.0)
    assert is_good(Quality(1.005, 900.0, 900.0), 400.0)  # no superchains
    assert not is_good(Quality(1.02, 900.0, 900.0, 1.005), 400.0)


def test_superchains_apart_that_split_rhat_passes():
    # Means of the superchains 0.11 sd apart: with the noise of halves split R-hat lies on one side of 1.01,
    # nested R-hat, which has half as many means to average over, on the other.
    base = numbers(1, 4, 4 * 1000, 1, seed=7)
    halves = base.unflatten(2, (2, -1))
    halves = (halves - halves.mean(3, keepdim=True)) / halves.std(3, keepdim=True)
    level = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(1, 4, 1, 1)
    (found,) = qualities(halves.flatten(2, 3) + 0.127 * level, 4)
    assert found.rhat < MAX_RHAT <= found.nested_rhat
    assert not is_good(found, 400.0)


@pytest.mark.parametrize(("columns", "chains"), [(5, 4), (60, 4), (20, 2)])
def test_draws_planned_for_rhat_are_about_as_many_as_it_takes(columns, chains):
    draws = round(draws_for_rhat(columns, chains))
    independent = numbers(80, chains, draws, columns, seed=3)
    good = sum(rhat < MAX_RHAT for rhat, *_ in qualities(independent))
    assert good >= 49  # 60 of 80 at least, less three binomial standard deviations
    fewer = sum(rhat < MAX_RHAT for rhat, *_ in qualities(independent[:, :, : round(0.4 * draws)]))
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
