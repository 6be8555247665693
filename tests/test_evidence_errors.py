"""Are the errors of the evidence honest? Twenty sweeps of real data: estimates and their 95% intervals."""

import importlib

import numpy as np
import pytest

import bayestie as bt

SEEDS = 20
ESTIMATES = ("laplace", "mbar", "thermodynamic", "combined")
SWEEPS = {
    "contraception": [0.0, *np.geomspace(0.05, 2.0, 4).tolist()],
    # Up to where the posterior is too skew for importance weights and chains take over, which costs minutes.
    "lip_cancer": [0.0, *np.geomspace(0.05, 1.0, 4).tolist()],
}


@pytest.fixture(scope="module", params=list(SWEEPS))
def found(request):
    """Value and error of each estimate, (seeds, strengths)."""
    module = importlib.import_module(f"models.{request.param}")
    rows = []
    for seed in range(SEEDS):
        path = bt.sweep(
            getattr(module, request.param),
            **module.data(),
            over={"sigma": SWEEPS[request.param]},
            seed=seed,
            keep=["overlap"],
        )
        assert bool(path["sweep"].certified.all())
        rows.append(bt.evidence(path))
    return {
        name: tuple(np.stack([row[f"{name}{part}"].values for row in rows]) for part in ("", "_error"))
        for name in ESTIMATES
    }


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say(found):
    # The truth is the mean of twenty combined values, whose own error is a fifth of one's.
    values, _ = found["combined"]
    truth, truth_error = values.mean(0), values.std(0, ddof=1) / np.sqrt(SEEDS)
    for name, (value, error) in found.items():
        inside = np.abs(value - truth) < 1.96 * np.hypot(error, truth_error)
        assert 0.85 <= inside.mean() <= 1.0, (name, inside.mean(0))


@pytest.mark.slow
def test_estimates_have_one_mean(found):
    # Apart from what a single sweep may be off: twenty of them average to the same number.
    (first, _), (second, _) = found["laplace"], found["mbar"]
    gap = first - second
    assert (np.abs(gap.mean(0)) < 4 * gap.std(0, ddof=1) / np.sqrt(SEEDS) + 1e-9).all()


@pytest.mark.slow
def test_mbar_errors_are_the_scatter_of_its_values(found):
    # The mean of 20 squared scores of standard normals has sd sqrt(2 / 19): four of them either side.
    value, error = found["mbar"]
    squares = value.var(0, ddof=1) / (error**2).mean(0)
    assert (np.abs(squares - 1) < 4 * np.sqrt(2 / 19)).all(), squares
