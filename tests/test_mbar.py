"""MBAR: closed forms at any dimension, honest errors, and the table that a sweep keeps for it."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy.stats import norm
from synthetic import EFFECT, STDERR

import bayestie as bt
from bayestie import _sweep
from bayestie._mbar import mbar, mbar_evidence
from models.eight_schools import eight_schools

SCHOOLS = {"effect": torch.as_tensor(EFFECT), "stderr": torch.as_tensor(STDERR)}
SHORT: dict[str, Any] = {"num_draws": 100, "target_ess": 100}


# -- the estimator -----------------------------------------------------------------------------------------


def _log_gamma_states(shapes, dim, size, generator):
    """A normal, then `dim` copies of exp(a x - e^x), Z = Gamma(a)^dim, each in whitened coordinates.

    Draws are exact: x is the log of a gamma variable. Returns log densities, sources, log Z.
    """
    shapes = np.asarray(shapes)
    scale = shapes**-0.5
    blocks = [generator.normal(size=(size, dim))]
    for a, s in zip(shapes, scale, strict=True):
        x = np.log(generator.gamma(a, size=(size, dim)))
        blocks.append((x - math.log(a)) / s)
    z = np.concatenate(blocks)
    rows = [norm.logpdf(z).sum(-1)]
    for a, s in zip(shapes, scale, strict=True):
        x = math.log(a) + s * z
        rows.append((a * x - np.exp(x) + math.log(s)).sum(-1))
    exact = np.array([0.0, *(dim * math.lgamma(a) for a in shapes)])
    return np.stack(rows), np.repeat(np.arange(len(rows)), size), exact


@pytest.mark.parametrize(
    ("shapes", "dim"),
    [([2.0, 5.0, 20.0], 1), (np.geomspace(4, 4e5, 24), 30), (np.geomspace(100, 1e6, 24), 1000)],
    ids=["1", "30", "1000"],
)
def test_honest_errors_at_any_dimension(shapes, dim):
    num = 60 if dim < 1000 else 12
    scores = []
    for seed in range(num):
        states, source, exact = _log_gamma_states(shapes, dim, 40, np.random.default_rng(seed))
        value, error = mbar(states, source, np.full(len(states), 40.0))
        assert value[0] == 0 and error[0] == 0 and error.max() < 0.5
        scores.append((value[1:] - exact[1:]) / error[1:])
    scores = np.array(scores)
    assert np.abs(scores).max() < 4.5
    # States share draws: only seeds count as independent.
    assert abs((scores**2).mean(0) - 1).max() < 4.5 * math.sqrt(2 / num)


def test_a_state_without_draws_is_read_off_the_others():
    scores = []
    for seed in range(60):
        states, source, exact = _log_gamma_states([3.0, 5.0, 9.0], 2, 60, np.random.default_rng(seed))
        kept = source != 2
        value, error = mbar(states[:, kept], source[kept], np.array([60.0, 60.0, 0.0, 60.0]))
        scores.append((value[2] - exact[2]) / error[2])
    assert 1 - 4.5 * math.sqrt(2 / 60) < np.mean(np.square(scores)) < 1 + 4.5 * math.sqrt(2 / 60)


def test_correlated_draws_count_as_what_they_are_worth():
    # Every draw four times over: the same estimate, with the error of a quarter of the draws.
    states, source, _ = _log_gamma_states([3.0, 9.0], 3, 50, np.random.default_rng(0))
    once = mbar(states, source, np.full(3, 50.0))
    again = mbar(np.repeat(states, 4, 1), np.repeat(source, 4), np.full(3, 50.0))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_two_states_are_bridge_sampling():
    # With K = 2 the equations are Bennett's: E_1[q_2 / mixture] = E_2[q_1 / mixture], solved by bisection.
    states, source, _ = _log_gamma_states([2.0], 1, 300, np.random.default_rng(4))
    gap = states[1] - states[0]

    def unbalanced(log_z):
        forward = 1 / (1 + np.exp(log_z - gap[source == 0]))
        return forward.sum() - (1 / (1 + np.exp(gap[source == 1] - log_z))).sum()

    low, high = -5.0, 5.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if unbalanced(middle) > 0 else (low, middle)
    assert mbar(states, source, np.full(2, 300.0))[0][1] == pytest.approx(low, abs=1e-9)


def test_states_that_do_not_meet_have_no_small_error():
    # Normals 60 sd apart: nothing links them, and no number must look as if something did.
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.normal(size=50), 60 + generator.normal(size=50)])
    states = np.stack([norm.logpdf(x), norm.logpdf(x, 60.0)])
    value, error = mbar(states, np.repeat([0, 1], 50), np.full(2, 50.0))
    assert not (error[1] < 10.0) and (math.isnan(error[1]) or abs(value[1]) < 4 * error[1])


def test_no_density_at_others_draws():
    # A uniform on the unit square inside a wider one: Z exact by counting.
    generator = np.random.default_rng(1)
    x = np.concatenate([generator.uniform(-1, 1, (200, 2)), generator.uniform(0, 1, (100, 2))])
    inside = ((x >= 0) & (x <= 1)).all(1)
    with np.errstate(divide="ignore"):
        states = np.stack([np.full(300, math.log(0.25)), np.log(inside * 7.0)])
    value, error = mbar(states, np.repeat([0, 1], [200, 100]), np.array([200.0, 100.0]))
    assert abs(value[1] - math.log(7.0)) < 4 * error[1] < 1.0


# -- a sweep of a thousand copies ----------------------------------------------------------------------------


def _many_copies(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.exchangeable(len(y)), sigma, dist.Normal(0.0, 2.0))
    with pyro.plate("copy", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def _many_copies_exact(y, sigma):
    """y ~ N(0, 4 1 1^T + (sigma^2 + 1) I), by the matrix determinant lemma."""
    own, num = sigma**2 + 1.0, len(y)
    gain = 1 + 4 * num / own
    quadratic = (y @ y) / own - 4 * y.sum() ** 2 / own**2 / gain
    return -0.5 * (num * math.log(2 * math.pi * own) + math.log(gain) + quadratic)


@pytest.mark.parametrize("num", [8, 1000])
def test_evidence_of_many_copies_is_the_closed_form(num):
    y = np.random.default_rng(2).normal(size=num) * 1.5
    strengths = [0.0, 0.3, 1.0, 3.0]
    path = bt.sweep(
        _many_copies, torch.as_tensor(y), over={"sigma": strengths}, num_chains=2, num_draws=40, target_ess=40
    )
    found = bt.evidence(path)
    exact = [_many_copies_exact(y, s) for s in strengths]
    np.testing.assert_allclose(found.mbar, exact, rtol=1e-8)
    assert float(found.mbar_error.max()) < 1e-6 and not found.disagreement.any()


@pytest.mark.parametrize("num", [8, 1000])
def test_in_the_copies_own_space_overlap_collapses(num):
    # y_k ~ N(theta_k, 1), theta_k ~ N(0, sigma^2), by its own exact draws at 16 strengths.
    generator = np.random.default_rng(3)
    y = generator.normal(size=num) * 1.5
    strengths = np.geomspace(0.1, 10.0, 16)
    shrunk = strengths**2 / (strengths**2 + 1)
    z = generator.normal(size=(16, 60, num))
    theta = shrunk[:, None, None] * y + np.sqrt(shrunk)[:, None, None] * z
    draws = theta.reshape(-1, num)

    def joint(at, sigma):
        return norm.logpdf(at, 0.0, sigma).sum(-1) + norm.logpdf(y, at, 1.0).sum(-1)

    exact = np.array([norm.logpdf(y, 0.0, math.sqrt(s**2 + 1)).sum() for s in strengths])
    source, size = np.repeat(np.arange(16), 60), np.full(16, 60.0)
    own = np.stack([joint(draws, s) for s in strengths])
    carried = np.stack(
        [
            joint(r * y + math.sqrt(r) * z.reshape(-1, num), s) + 0.5 * num * math.log(r)
            for r, s in zip(shrunk, strengths, strict=True)
        ]
    )
    value, error = mbar(carried, source, size)
    np.testing.assert_allclose(value, exact - exact[0], atol=1e-8)
    assert error.max() < 1e-6
    raw, raw_error = mbar(own, source, size)
    apart = np.abs(raw - (exact - exact[0])).max()
    if num == 8:
        assert apart < 1.0 and raw_error.max() < 1.0
    else:
        assert not raw_error.max() < 10.0


# -- the table of a sweep ------------------------------------------------------------------------------------


def _counts(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.complete(4), sigma, dist.Normal(0.0, 1.0), form="matched")
    with pyro.plate("copy", 4):
        pyro.sample("y", dist.Poisson(theta.exp()), obs=y)


Y = torch.tensor([0.0, 3.0, 1.0, 6.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def path():
    return bt.sweep(_counts, Y, over={"sigma": [0.0, 0.2, 1.0, 5.0, math.inf]}, seed=3)


def _source(table):
    """The strength that each draw is of; NaN of the standard normal's."""
    return np.where(table["standard_normal"].values, np.nan, table["from_sigma"].values)


def test_a_sweep_of_counts_agrees_with_the_other_estimates(path):
    found = bt.evidence(path)
    assert (found.mbar_error > 0).all() and float(found.mbar_error.max()) < 0.05
    score = (found.mbar - found.laplace) / np.hypot(found.mbar_error, found.laplace_error)
    assert float(abs(score).max()) < 4 and not found.disagreement.any()
    # Independent draws are worth what they are.
    table = path["overlap"].to_dataset()
    drawn = [int((_source(table) == s).sum()) for s in table["sigma"].values]
    assert (table["effective_draws"] <= np.array(drawn) + 1e-9).all()
    assert (table["effective_draws"] > 0.5 * np.array(drawn)).all()


def test_log_densities_are_those_of_the_draws_themselves(path):
    # At a strength's own draws its density is lp, and the volume of its Gaussian all the same.
    table, stats = path["overlap"].to_dataset(), path["sample_stats"].to_dataset()
    for sigma in path["sweep"].sigma.values:
        own = table["log_density"].sel(sigma=sigma).values[_source(table) == sigma]
        lp = stats["lp"].sel(sigma=sigma).values
        rows = np.linspace(0, lp.shape[1] - 1, len(own) // len(lp)).round().astype(int)
        volume = own - lp[:, rows].reshape(-1)
        assert np.ptp(volume) < 1e-9 * np.abs(own).max()


@pytest.mark.parametrize(
    ("base", "engines"),
    [(dist.Normal(0.0, 1.0), {"blocks", "laplace"}), (0.5, {"laplace"})],
    ids=["level", "known"],
)
def test_the_sparse_factor_s_table_says_the_same(base, engines, monkeypatch):
    def counts(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.chain(12), sigma, base)
        with pyro.plate("copy", 12):
            pyro.sample("y", dist.Poisson(theta.exp()), obs=y)

    y = torch.as_tensor(np.random.default_rng(0).poisson(1.5, size=12), dtype=torch.float64)
    strengths = [0.0, 0.3, 1.0, 3.0]  # sigma = 0 has fewer variables there, the last is far from Gaussian
    dense = bt.evidence(bt.sweep(counts, y, over={"sigma": strengths}, seed=2))
    monkeypatch.setattr(_sweep, "MIN_SPARSE", 1)
    path = bt.sweep(counts, y, over={"sigma": strengths}, seed=3)
    assert path.attrs["density_route"] == "sparse" and set(path["sweep"].engine.values) == engines
    found, table = bt.evidence(path), path["overlap"].to_dataset()
    assert found.mbar.notnull().all() and float(found.mbar_error.max()) < 0.1
    score = (found.mbar - dense.combined) / np.hypot(found.mbar_error, dense.combined_error)
    assert float(abs(score).max()) < 4
    # At a strength's own draws its density is lp, and the volume of its Gaussian all the same; a known level
    # leaves a direction of z that moves no copy.
    for sigma in strengths[1:] if base != 0.5 else []:
        own = table["log_density"].sel(sigma=sigma).values[_source(table) == sigma]
        lp = path["sample_stats"].lp.sel(sigma=sigma).values
        rows = np.linspace(0, lp.shape[1] - 1, len(own) // len(lp)).round().astype(int)
        assert np.ptp(own - lp[:, rows].reshape(-1)) < 1e-9 * np.abs(own).max()


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_files_and_selection_keep_it(path, suffix, tmp_path):
    bt.save(path, tmp_path / f"path.{suffix}")
    again = bt.load(tmp_path / f"path.{suffix}")
    xr.testing.assert_equal(again["overlap"].to_dataset(), path["overlap"].to_dataset())
    whole = bt.evidence(again)
    np.testing.assert_array_equal(whole.mbar, bt.evidence(path).mbar)
    # One strength alone is left with its own draws and the normal's.
    for sigma in (0.0, 1.0, math.inf):
        one = bt.evidence(bt.select(again, sigma=sigma))
        there = whole.sel(sigma=sigma)
        assert one.mbar.ndim == 0 and float(one.mbar_error) >= 0.9 * float(there.mbar_error)
        assert abs(float(one.mbar - there.mbar)) < 4 * float(one.mbar_error)


def test_part_of_a_sweep_uses_the_draws_it_holds(path):
    some = path.isel(sigma=[1, 3])
    found = mbar_evidence(some)
    assert found is not None
    value, error = found
    whole = bt.evidence(path).isel(sigma=[1, 3])
    assert (np.abs(value - whole.mbar.values) < 4 * error).all() and (error < 0.1).all()


def test_a_fit_has_one_against_the_normal():
    fit = bt.fit(eight_schools, **SCHOOLS, sigma=4.0, **SHORT)
    found = bt.evidence(fit)
    assert found.mbar.ndim == 0 and float(found.mbar) == pytest.approx(float(found.laplace), abs=1e-8)


def test_two_swept_ties_on_a_grid():
    def model(y, *, sigma, tau):
        row = bt.tied("row", bt.Tie.exchangeable(3), sigma, dist.Normal(0.0, 1.0))
        column = bt.tied("column", bt.Tie.chain(4), tau, 0.0)
        with pyro.plate("c", 4), pyro.plate("r", 3):
            pyro.sample("y", dist.Poisson((row[:, None] + column).exp()), obs=y)

    y = torch.as_tensor(np.random.default_rng(5).poisson(2.0, size=(3, 4)), dtype=torch.float64)
    path = bt.sweep(model, y, over={"sigma": [0.0, 0.5, 2.0], "tau": [0.0, 0.7]}, seed=1)
    found = bt.evidence(path)
    assert found.mbar.dims == ("sigma", "tau") and found.mbar.notnull().all()
    score = (found.mbar - found.laplace) / np.hypot(found.mbar_error, found.laplace_error)
    assert float(abs(score).max()) < 4
    part = bt.evidence(bt.select(path, tau=0.7))
    gap = part.mbar - found.mbar.sel(tau=0.7)
    assert (abs(gap) < 4 * part.mbar_error).all() and part.mbar.dims == ("sigma",)


def test_it_is_kept_on_request_and_missing_otherwise():
    for keep, there in ((["posterior"], False), (["overlap"], True)):
        fit = bt.fit(eight_schools, **SCHOOLS, sigma=4.0, keep=keep, **SHORT)
        assert ("overlap" in fit.children) == there
        assert bool(bt.evidence(fit).mbar.notnull()) == there


def test_draws_of_refused_weights_are_left_out():
    # Far from Gaussian: one observation of a wide prior on a positive scale.
    def funnel(y, *, sigma):
        spread = pyro.sample("spread", dist.Normal(0.0, 3.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x * (spread * sigma).exp(), 0.3).to_event(1), obs=y)

    y = torch.linspace(-2, 2, 8, dtype=torch.float64)
    path = bt.sweep(funnel, y, over={"sigma": [0.0, 1.0]}, engine="laplace", **SHORT)
    assert path["sweep"].certified.values.tolist() == [True, False]
    table = path["overlap"].to_dataset()
    assert float(table["effective_draws"][1]) == 0 and not (_source(table) == 1.0).any()
    assert float(bt.evidence(path).mbar_error[1]) > float(bt.evidence(path).mbar_error[0])
