"""fit, sweep, strengths: what comes back, its names and labels, seeds, interrupts, files."""

import json
import math
import threading
import time
from typing import Any

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from zoo import COUNTS, GROUP, X, Y, poisson_groups, tied_level

import bayestie as bt
from bayestie._sweep_options import Options

SIGMAS = [0.0, 0.5, 2.0]
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
STDERR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
SCHOOLS = list("ABCDEFGH")


def schools(effect, stderr, *, sigma, scale=1.0):
    theta = bt.tied("theta", bt.Tie.exchangeable(8), sigma, dist.Normal(0.0, 5.0))
    with pyro.plate("school", 8):
        pyro.sample("y", dist.Normal(theta, scale * stderr), obs=effect)


def crossing(y, *, sigma, noise=0.1):
    """Gaussian at sigma = 0 (nothing but z is left); elsewhere a cross, of which a Gaussian sees little."""
    theta = bt.tied("theta", bt.Tie.exchangeable(2), sigma, 0.0)
    pyro.sample("y", dist.Normal(theta[0] * theta[1], noise), obs=y)


@pytest.fixture(scope="module")
def path():
    return bt.sweep(schools, EFFECT, STDERR, over={"sigma": SIGMAS}, num_draws=50, coords={"school": SCHOOLS})


# -- strengths -----------------------------------------------------------------------------------------


def test_strengths_are_log_spaced_with_both_ends():
    grid = bt.strengths(0.1, 30.0, 16)
    assert (grid[0], grid[-1], len(grid)) == (0.1, 30.0, 16)
    assert np.allclose(np.diff(np.log(grid)), math.log(300.0) / 15)
    assert bt.strengths(0.1, 10.0, 3, hard=True, free=True) == [0.0, 0.1, 1.0, 10.0, math.inf]
    assert bt.strengths(2.0, 2.0, 1) == [2.0]


# -- groups, dims, labels ------------------------------------------------------------------------------


def test_dims_of_every_group(path):
    draws, swept = ("sigma", "chain", "draw"), ("sigma",)
    expected = {
        "posterior": {
            "theta": (*draws, "school"),
            "theta_z": (*draws, "school"),
            "theta_level": draws,
        },
        "log_likelihood": {"y": (*draws, "school")},
        "posterior_predictive": {"y": (*draws, "school")},
        "log_prior": {"theta": draws, "theta_level": draws},
        "tie_energy": {"theta": draws},
        "observed_data": {"y": ("school",)},
        "constant_data": {"effect": ("school",), "stderr": ("school",)},
    }
    for group, variables in expected.items():
        assert {name: x.dims for name, x in path[group].data_vars.items()} == variables
        for x in path[group].data_vars.values():
            if "school" in x.dims:
                assert x.coords["school"].values.tolist() == SCHOOLS
    stats = {
        "lp", "laplace_log_density", "diverging", "tree_depth", "n_steps", "energy", "acceptance_rate",
        "step_size",
    }  # fmt: skip
    assert stats <= set(path.sample_stats.data_vars)
    assert all(x.dims == draws for x in path.sample_stats.data_vars.values())
    facts = {
        "engine", "certified", "reason", "exact", "log_evidence", "log_evidence_error", "khat", "ess_weights",
        "max_rhat", "nested_rhat", "min_ess_bulk", "min_ess_tail", "divergences", "elpd", "elpd_se", "p_loo",
        "max_pareto_k", "seconds", "sigma_scaled_theta",
    }  # fmt: skip
    assert set(path.sweep.data_vars) == facts
    assert all(x.dims == swept for x in path.sweep.data_vars.values())
    assert path.posterior.coords["sigma"].values.tolist() == SIGMAS
    assert path.posterior.theta.shape == (3, 4, 50, 8)
    for node in path.subtree:
        for name, x in node.data_vars.items():
            if x.dtype.kind == "f" and name != "nested_rhat":
                assert not bool(np.isnan(x).any()), name
    assert bool(np.isnan(path.sweep.nested_rhat).all())  # independent draws


def test_a_fit_has_no_swept_dim():
    tree = bt.fit(schools, EFFECT, STDERR, sigma=2.0, num_draws=20)
    assert tree.posterior.theta.dims == ("chain", "draw", "school")
    assert all(x.dims == () for x in tree.sweep.data_vars.values())
    assert json.loads(tree.attrs["swept"]) == []


def test_two_swept_names_make_a_grid():
    over = {"scale": [1.0, 2.0], "sigma": SIGMAS}
    tree = bt.sweep(schools, EFFECT, STDERR, over=over, num_draws=20)
    assert tree.posterior.theta.dims == ("scale", "sigma", "chain", "draw", "school")
    assert tree.sweep.log_evidence.dims == ("scale", "sigma")
    one = bt.fit(schools, EFFECT, STDERR, sigma=2.0, scale=2.0, num_draws=20)
    at = bt.select(tree, scale=2.0, sigma=2.0)
    assert float(at.sweep.log_evidence) == pytest.approx(float(one.sweep.log_evidence), abs=1e-9)
    assert at.posterior.theta.dims == one.posterior.theta.dims
    assert tree.attrs["swept"] == '["scale", "sigma"]'
    assert json.loads(tree.attrs["ties"])["theta"]["sigma_from"] == "sigma"


def test_values_are_taken_as_they_are_ordered():
    tree = bt.sweep(schools, EFFECT, STDERR, over={"sigma": [2.0, 0.0]}, num_draws=20)
    assert tree.posterior.coords["sigma"].values.tolist() == [2.0, 0.0]
    assert float(tree.posterior.theta.sel(sigma=0.0).std("school").max()) == 0.0
    assert float(tree.posterior.theta.sel(sigma=2.0).std("school").min()) > 0.0


def test_dims_and_coords_of_the_users_own():
    def model(y):
        with pyro.plate("group", 4):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu[GROUP] + weights.sum(), 1.0), obs=y)

    tree = bt.fit(
        model,
        Y,
        num_draws=20,
        dims={"weights": ["term"], "mu": ["district"]},
        coords={"term": ["slope", "step"], "row": list(range(1900, 1912))},
    )
    assert tree.posterior.weights.coords["term"].values.tolist() == ["slope", "step"]
    assert tree.posterior.mu.dims == ("chain", "draw", "district")
    assert tree.log_likelihood.y.coords["row"].values[0] == 1900


def test_a_plate_named_like_an_argument_steps_aside():
    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=data)

    tree = bt.fit(model, Y, num_draws=20)
    assert tree.observed_data.obs.dims == tree.constant_data["data"].dims == ("data_dim",)


def test_keep_limits_what_is_stored():
    options = {"sigma": 1.0, "num_draws": 20}
    tree = bt.fit(schools, EFFECT, STDERR, keep=["posterior"], **options)
    assert "posterior" in tree.children
    assert not {"log_likelihood", "log_prior", "posterior_predictive"} & set(tree.children)
    tree = bt.fit(schools, EFFECT, STDERR, keep=["log_likelihood"], **options)
    assert "posterior" not in tree.children
    assert np.isfinite(float(tree.sweep.elpd))


def test_posterior_predictive_lists_its_draws():
    tree = bt.fit(schools, EFFECT, STDERR, sigma=1.0, num_draws=250)
    used = tree.posterior_predictive.coords["draw"].values
    assert used.tolist() == list(range(0, 250, 10))


# -- what the numbers are ------------------------------------------------------------------------------


def test_stored_densities_belong_to_the_stored_draws(path):
    theta, sigma = path.posterior.theta, path.posterior.sigma
    expected = torch.distributions.Normal(torch.tensor(theta.values), STDERR).log_prob(EFFECT)
    assert np.allclose(path.log_likelihood.y, expected, rtol=1e-12)
    deviations = theta - path.posterior.theta_level
    assert np.allclose(path.tie_energy.theta, (deviations**2).sum("school"), atol=1e-10)
    at = {"sigma": 2.0}
    own = path.log_prior.theta.sel(at)
    dense = torch.distributions.Normal(0.0, torch.tensor(2.0, dtype=torch.float64))
    assert np.allclose(own, dense.log_prob(torch.tensor(deviations.sel(at).values)).sum(-1), rtol=1e-12)
    assert float(abs(path.log_prior.theta.sel(sigma=0.0)).max()) == 0.0
    assert sigma.values.tolist() == SIGMAS


def test_evidence_is_the_closed_form(path):
    for sigma in SIGMAS:
        covariance = torch.diag(STDERR**2 + sigma**2) + 25.0
        exact = torch.distributions.MultivariateNormal(torch.zeros(8).double(), covariance).log_prob(EFFECT)
        assert float(path.sweep.log_evidence.sel(sigma=sigma)) == pytest.approx(float(exact), abs=1e-9)
    assert bool(path.sweep.exact.all())
    assert bool(path.sweep.certified.all())


@pytest.mark.parametrize("engine", ["auto", "laplace", "nuts"])
def test_engines_by_name(engine):
    tree = bt.sweep(
        tied_level, Y, GROUP, over={"sigma": [0.0, 1.0]}, engine=engine, num_draws=60, target_ess=60
    )
    used = "nuts" if engine == "nuts" else "laplace"
    assert tree.sweep.engine.values.tolist() == [used, used]
    assert tree.attrs["engine"] == engine
    exact = bt.sweep(tied_level, Y, GROUP, over={"sigma": [0.0, 1.0]}, engine="laplace", num_draws=2000)
    for sigma in (0.0, 1.0):
        found, wanted = (t.posterior.theta.sel(sigma=sigma) for t in (tree, exact))
        ess = min(float(tree.sweep.min_ess_bulk.sel(sigma=sigma)), 240.0)
        error = wanted.std(("chain", "draw")) * math.sqrt(1 / ess + 1 / 8000)
        gap = abs(found.mean(("chain", "draw")) - wanted.mean(("chain", "draw")))
        assert bool((gap < 5 * error).all())


# -- seeds ---------------------------------------------------------------------------------------------


def arrays(tree):
    return {
        f"{node.path}/{name}": x.values
        for node in tree.subtree
        for name, x in node.data_vars.items()
        if name != "seconds"
    }


@pytest.mark.parametrize("engine", ["laplace", "nuts"])
def test_one_seed_one_result(engine):
    def run(seed):
        torch.rand(3)  # whatever the caller drew before
        return arrays(
            bt.sweep(
                tied_level, Y, GROUP, over={"sigma": [0.5]}, engine=engine, seed=seed, num_draws=10,
                num_chains=2, target_ess=1,
            )
        )  # fmt: skip

    first, again, other = run(3), run(3), run(4)
    assert first.keys() == again.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], again[key], err_msg=key)  # NaN equals NaN
    assert not np.isclose(first["/posterior/theta"], other["/posterior/theta"]).any()


def test_strengths_further_down_the_grid_change_nothing():
    few = bt.sweep(schools, EFFECT, STDERR, over={"sigma": SIGMAS[:2]}, num_draws=20, seed=5)
    many = bt.sweep(schools, EFFECT, STDERR, over={"sigma": [*SIGMAS, 7.0]}, num_draws=20, seed=5)
    assert np.allclose(few.posterior.theta, many.posterior.theta.isel(sigma=slice(2)), rtol=1e-9, atol=1e-9)


# -- interrupts and files ------------------------------------------------------------------------------


def interrupt_at(stage):
    def progress(event):
        if event.get("stage") == stage:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("stage", ["nuts warmup", "nuts"])
def test_an_interrupt_leaves_the_finished_strengths_on_disk(stage, tmp_path):
    out = tmp_path / "path.nc"
    with pytest.raises(KeyboardInterrupt):
        bt.sweep(
            crossing, 0.0 * Y[0], over={"sigma": [2.0, 0.0, 1.5]}, num_draws=10, num_chains=2, target_ess=1e6,
            out=out, progress=interrupt_at(stage),
        )  # fmt: skip
    tree = bt.load(out)
    assert tree.posterior.coords["sigma"].values.tolist() == [0.0]
    assert tree.posterior.theta.dims == ("sigma", "chain", "draw", "theta_dim_0")
    assert bool(tree.sweep.certified.all())
    assert tree.attrs["interrupted"] == 1


def test_an_interrupted_grid_keeps_whole_rows(tmp_path):
    out = tmp_path / "path.zarr"
    over = {"noise": [0.1, 0.2], "sigma": [2.0, 0.0]}
    with pytest.raises(KeyboardInterrupt):
        bt.sweep(
            crossing, 0.0 * Y[0], over=over, num_draws=10, num_chains=2, target_ess=1e6, out=out,
            progress=interrupt_at("nuts warmup"),
        )  # fmt: skip
    tree = bt.load(out)
    assert tree.posterior.coords["sigma"].values.tolist() == [0.0]
    assert tree.posterior.coords["noise"].values.tolist() == [0.1, 0.2]


def test_an_interrupt_with_nothing_finished_writes_nothing(tmp_path):
    out = tmp_path / "fit.nc"
    with pytest.raises(KeyboardInterrupt):
        bt.fit(schools, EFFECT, STDERR, sigma=1.0, engine="nuts", num_draws=10, out=out,
               progress=interrupt_at("nuts warmup"))  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_real_sweep_survives_the_disk(path, suffix, tmp_path):
    out = tmp_path / f"path{suffix}"
    bt.save(path, out)
    xr.testing.assert_identical(bt.load(out), path)


def test_out_is_what_is_returned(tmp_path):
    out = tmp_path / "fit.nc"
    tree = bt.fit(schools, EFFECT, STDERR, sigma=1.0, num_draws=20, out=str(out))
    xr.testing.assert_identical(bt.load(out), tree)


# -- ArviZ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
def test_arviz_reads_one_strength(path, sigma):
    one = bt.select(path, sigma=sigma)
    table = arviz_stats.summary(one, var_names=["theta"])
    assert [f"theta[{school}]" for school in SCHOOLS] == list(table.index)
    assert bool((arviz_stats.rhat(one, var_names=["theta"])["theta"] < 1.1).all())
    assert bool((arviz_stats.ess(one, var_names=["theta"])["theta"] > 50).all())
    loo: Any = arviz_stats.loo(one)
    assert float(loo.elpd) == pytest.approx(float(path.sweep.elpd.sel(sigma=sigma)), abs=0.1)
    assert float(loo.se) == pytest.approx(float(path.sweep.elpd_se.sel(sigma=sigma)), rel=0.1)


def test_progress_tells_what_happens():
    events = []
    bt.fit(poisson_groups, X, COUNTS, GROUP, engine="laplace", num_draws=20, progress=events.append)
    assert all(isinstance(event, dict) and "stage" in event for event in events)
    assert events[0]["stage"] == "laplace"
    assert events[-1]["stage"] == "collecting"


def test_progress_is_told_of_one_thing_at_a_time():
    """Lanes run on several threads, and a callback that writes a file would lose it."""
    inside, overlapped = [], []

    def progress(event):
        inside.append(event)
        time.sleep(0.01)
        overlapped.append(len(inside) > 1)
        inside.pop()

    given = dict.fromkeys(("device", "guide", "schedule", "monitor", "keep", "dims", "coords", "out"))
    numbers: Any = {"engine": "auto", "seed": 0, "num_chains": 4, "num_draws": 10, "target_ess": 5.0}
    report = Options(**numbers, **given, progress=progress).reporter()
    threads = [threading.Thread(target=report, args=({"stage": str(i)},)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlapped == [False] * 8
