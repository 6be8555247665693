"""Batched Pareto smoothing against ArviZ's, row by row, and its edge cases."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from bayestie._psis import good_k, psis


def _reference(rows, r_eff):
    # ArviZ takes log likelihoods, the negative of the log ratios.
    return array_stats.psislw(-rows, r_eff=r_eff)


def _rows(kind, generator, shape):
    match kind:
        case "normal":
            return generator.normal(size=shape)
        case "light":
            return generator.normal(size=shape) * 0.05
        case "heavy":
            return generator.exponential(size=shape) * 0.9
        case "bounded":
            return np.log(generator.beta(2.0, 1.5, size=shape))
        case "wild":
            return 20 * generator.normal(size=shape) + 1e4


@pytest.mark.parametrize("kind", ["normal", "light", "heavy", "bounded", "wild"])
@pytest.mark.parametrize(("num_draws", "r_eff"), [(60, 1.0), (220, 0.7), (1000, 1.0), (4000, 0.3)])
def test_equals_arviz(kind, num_draws, r_eff):
    rows = _rows(kind, np.random.default_rng(num_draws), (2, 3, num_draws))
    weights, khat = psis(torch.from_numpy(rows), r_eff)
    expected_weights, expected_khat = _reference(rows, r_eff)
    torch.testing.assert_close(khat, torch.as_tensor(expected_khat), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(weights, torch.as_tensor(expected_weights), atol=1e-8, rtol=1e-8)


def test_chunks_do_not_change_rows(monkeypatch):
    rows = torch.randn(37, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = psis(rows)
    monkeypatch.setattr("bayestie._psis._BUDGET", 1)
    for a, b in zip(whole, psis(rows), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_rows_sum_to_one_and_single_row_has_no_batch():
    rows = torch.randn(5, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weights, khat = psis(rows)
    torch.testing.assert_close(weights.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    single, single_khat = psis(rows[2])
    assert single_khat.shape == ()
    torch.testing.assert_close(single, weights[2])
    assert khat[2] == single_khat


def test_khat_finds_the_tail_index():
    # Ratios with density w^(-1/k - 1): the fitted shape is k within its own standard error,
    # (1 + k) / sqrt(M) (Zhang and Stephens, 2009), plus the pull of the prior towards 1/2.
    num_draws, k = 40_000, 0.4
    uniform = torch.rand(50, num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    _, khat = psis(-k * torch.log(uniform))
    num_tail = int(3 * math.sqrt(num_draws))
    error = (1 + k) / math.sqrt(num_tail * 50)
    prior_pull = 10 * (0.5 - k) / (num_tail + 10)
    assert abs(khat.mean() - k - prior_pull) < 4 * error


def test_equal_weights_are_left_alone_with_no_tail():
    weights, khat = psis(torch.full((2, 100), 7.0))
    assert (khat == -math.inf).all()
    torch.testing.assert_close(weights, torch.full((2, 100), -math.log(100), dtype=torch.float64))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_row_is_flagged_and_spoils_no_other(broken):
    rows = torch.randn(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    expected, expected_khat = psis(rows)
    rows[1, 5] = broken
    weights, khat = psis(rows)
    assert khat[1] == math.inf and weights[1, 5] == -math.inf
    assert weights.isnan().sum() == 0
    torch.testing.assert_close(weights[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(khat[[0, 2]], expected_khat[[0, 2]])


def test_zero_weights_are_legal_and_all_zero_is_not():
    rows = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    rows[0, :100] = -math.inf
    rows[1] = -math.inf
    weights, khat = psis(rows)
    assert khat[0].isfinite() and (weights[0, :100] == -math.inf).all()
    assert khat[1] == math.inf and weights[1].isfinite().all()


def test_weights_that_underflow_in_the_tail_are_flagged():
    rows = 1e4 * torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    weights, khat = psis(rows)
    assert (khat == math.inf).all() and weights.isnan().sum() == 0


def test_too_few_draws_cannot_be_judged():
    _, khat = psis(torch.randn(20, generator=torch.Generator().manual_seed(8)))
    assert khat == math.inf


def test_tail_of_ties_cannot_be_judged():
    rows = torch.cat([torch.zeros(200), torch.full((100,), -5.0)])
    _, khat = psis(rows)
    assert khat == math.inf


def test_good_k_is_arviz_threshold():
    assert good_k(100) == pytest.approx(0.5)
    assert good_k(100_000) == 0.7
