"""The sparse route against the dense one, closed forms and dense nuts, where both can be run."""

import functools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy.integrate import quad

import bayestie as bt
from bayestie import _sweep
from bayestie._engines import _sparse
from bayestie._engines._sparse_hyper import NODES
from bayestie._errors import InferenceError
from bayestie._program import LaneProgram
from bayestie._sparse_density import SparseDensity, build_sparse_density
from bayestie._sparse_factor import choose_pattern, lower_pattern
from bayestie._sparse_gaussian import Gaussian
from bayestie._sparse_joint import ScaledJoint, SparseJoint
from bayestie._sparse_map import NotSparseMap, find_map
from bayestie._sparse_mode import find_mode, log_likelihood, log_prior
from models import nile, poisson_chain

BASE = dist.Normal(torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64))
TRIL = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
T = bt.Tie
TIES = {
    "exchangeable": T.exchangeable(7),
    "complete": T.complete(6),
    "large complete": T.complete(90),
    "chain": T.chain(40),
    "anchored": T.chain(8, anchored=True),
    "scaled ring": T.ring(7, scaled=True),
    "grid": T.grid(3, 4),
    "forest": T.tree([-1, 0, 0, 1, 1, 2, -1, 6]),
    "groups": T.groups([0, 1, 0, 2, 2, 2, 0]),
    "chains": T.groups([0] * 20 + [1] * 25, T.chain),
}


@pytest.fixture
def sparse_everywhere(monkeypatch):
    monkeypatch.setattr(_sweep, "MIN_SPARSE", 1)


def arguments(module: Any, *args: Any) -> dict[str, Any]:
    return {k: v for k, v in module.data(*args).items() if k not in ("coords", "dims")}


def regression(tie, form, base, event_shape=(), tril=None):
    """Rows that see one copy each, a covariate beside it."""
    num, generator = tie.num_copies, torch.Generator().manual_seed(1)
    index = torch.randint(0, num, (3 * num,), generator=generator)
    x, y = torch.randn(2, 3 * num, generator=generator, dtype=torch.float64)

    def model(*, sigma):
        theta = bt.tied("theta", tie, sigma, base, form=form, event_shape=event_shape, event_scale_tril=tril)
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        own = theta[index][:, 0] + x * theta[index][:, 1] if event_shape else theta[index]
        with pyro.plate("row", 3 * num):
            pyro.sample("y", dist.Normal(own + slope * x, 0.7), obs=y)

    return model


def fits_of(model, over, *args, **kwargs):
    points = {name: torch.tensor(values, dtype=torch.float64) for name, values in over.items()}
    density = SparseDensity(LaneProgram(model, args, kwargs, points))
    found = [density.at(p, density.copies.hyper_probe(0)) for p in range(density.program.num_points)]
    return [find_mode(*pair) for pair in found]


diagonals: Any = sp.diags


# -- the map ----------------------------------------------------------------------------------------------


def random_map(kind: str, num: int, rng: np.random.Generator) -> Any:
    row = np.arange(num)
    if kind == "one":
        return sp.csr_array((rng.normal(size=num), (row, rng.integers(0, num, num))), shape=(num, num))
    if kind == "differences":
        return sp.csr_array(diagonals([np.ones(num - 1), -np.ones(num - 1)], [1, 0], shape=(num - 1, num)))
    corner = rng.integers(0, num - 40, num)[:, None] + np.array([0, 1, 31, 32])
    return sp.csr_array((rng.random(4 * num), (np.repeat(row, 4), corner.ravel())), shape=(num, num))


@pytest.mark.parametrize("kind", ["one", "differences", "corners"])
def test_map_is_found_without_a_pass_per_column(kind):
    rng = np.random.default_rng(1)
    expected, offset = random_map(kind, 3000, rng), rng.normal(size=3000)
    offset, passes = offset[: expected.shape[0]], []

    def evaluate(x):
        passes.append(1)
        return np.log(np.exp(expected @ x + offset))  # as a link and its inverse

    found, constant = find_map(evaluate, [np.arange(3000)], 3000)
    assert abs(found - expected).max() < 1e-9
    np.testing.assert_allclose(constant, offset, atol=1e-12)
    assert len(passes) < {"one": 8, "differences": 20, "corners": 800}[kind]


@pytest.mark.parametrize("function", [lambda x: x**2, lambda x: np.full(100, x.sum())])
def test_map_that_is_not_sparse_or_affine_is_refused(function):
    with pytest.raises(NotSparseMap):
        find_map(function, [np.arange(100)], 100)


# -- factors ----------------------------------------------------------------------------------------------


def crossed(rng):
    rows = np.arange(600)
    sides = [
        sp.csr_array((np.ones(600), (rows, rng.integers(0, size, 600))), (600, size)) for size in (150, 40)
    ]
    design = sp.hstack([*sides, np.ones((600, 1))])
    return design.T @ design + sp.eye_array(191), [slice(0, 150), slice(150, 190), slice(190, 191)]


def lattice(rng):
    side = 20
    path = diagonals([-np.ones(side - 1), np.full(side, 2.0), -np.ones(side - 1)], [-1, 0, 1])
    grid = sp.kron(path, sp.eye_array(side)) + sp.kron(sp.eye_array(side), path)
    return grid + 0.5 * sp.eye_array(side**2), [slice(0, side**2)]


def chain(rng):
    return diagonals([np.full(399, -1.0), np.full(400, 2.3), np.full(399, -1.0)], [-1, 0, 1]), [slice(0, 400)]


@pytest.mark.parametrize("make", [crossed, lattice, chain])
@pytest.mark.parametrize("max_band", [48, 0])
def test_factor_solves_whitens_and_has_the_determinant(make, max_band, monkeypatch):
    monkeypatch.setattr("bayestie._sparse_factor.MAX_BAND", max_band)
    rng = np.random.default_rng(2)
    matrix, blocks = make(rng)
    dense = matrix.toarray()
    lower = sp.coo_array(sp.tril(sp.coo_array(matrix)))
    size = len(dense)
    row, col, _ = lower_pattern(size, lower.row, lower.col)
    factor = choose_pattern(size, row, col, blocks).factor(dense[row, col])
    right = rng.normal(size=(size, 3))
    np.testing.assert_allclose(factor.solve(right), np.linalg.solve(dense, right), atol=1e-9)
    np.testing.assert_allclose(factor.solve(right[:, 0]), np.linalg.solve(dense, right[:, 0]), atol=1e-9)
    half = factor.whiten_back(np.eye(size))
    np.testing.assert_allclose(half @ half.T, np.linalg.inv(dense), atol=1e-9)
    np.testing.assert_allclose(factor.whiten(half), np.eye(size), atol=1e-9)
    assert factor.log_det == pytest.approx(np.linalg.slogdet(dense)[1], abs=1e-8)


# -- evidence, modes, draws of Gaussian models ------------------------------------------------------------


def cases():
    for name, tie in TIES.items():
        for form in ("level", "copies", "matched"):
            if form != "level" and (tie.anchored or (tie.has_hub and form == "copies")):
                continue
            yield name, form, BASE, (), None
            if form == "level":
                yield name, form, 0.4, (), None
        if name in ("exchangeable", "chain", "groups"):
            yield name, "level", BASE, (2,), TRIL
            yield name, "matched", BASE, (2,), None


@pytest.mark.parametrize(("name", "form", "base", "event_shape", "tril"), list(cases()))
def test_evidence_is_that_of_the_dense_route(name, form, base, event_shape, tril):
    model = regression(TIES[name], form, base, event_shape, tril)
    over = {"sigma": [0.0, 0.3, 2.0] + [math.inf] * (form != "level")}
    dense = bt.sweep(model, over=over, engine="laplace", keep=("posterior",), num_draws=4)
    found = [fit.log_evidence for fit in fits_of(model, over)]
    np.testing.assert_allclose(found, dense.sweep.log_evidence, atol=1e-8)


def test_gaussian_moments_are_the_closed_form():
    data = arguments(nile)
    num = len(data["flow"])
    (fit,) = fits_of(nile.nile, {"sigma": [38.0]}, **data)
    laplacian = np.diag(np.r_[1, np.full(num - 2, 2), 1]) - np.eye(num, k=1) - np.eye(num, k=-1)
    prior = 38.0**2 * (np.linalg.inv(laplacian + 1 / num) - 1 / num) + 1000.0**2
    gain = prior @ np.linalg.inv(prior + nile.OBSERVATION_SD**2 * np.eye(num))
    mean = 1000.0 + gain @ (data["flow"].numpy() - 1000.0)
    np.testing.assert_allclose(fit.gaussian.mean, mean, rtol=1e-8)
    covariance = prior - gain @ prior
    np.testing.assert_allclose(fit.gaussian.solve(np.eye(num)), covariance, rtol=1e-8, atol=1e-6)
    half = fit.gaussian.deviations(np.eye(num))
    np.testing.assert_allclose(half @ half.T, covariance, rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(fit.gaussian.whitened(half, np.random.default_rng(0)), np.eye(num), atol=1e-9)
    step, square = fit.gaussian.draw(np.random.default_rng(0).normal(size=(num, 5)))
    expected = (step * (fit.structure.matrix(fit.gaussian.data) @ step)).sum(0)
    if fit.gaussian.response is not None:  # directions of known value have no part in it
        soft = fit.gaussian.variances != 0
        along = (fit.structure.directions.T @ step)[soft]
        expected += (along**2 / fit.gaussian.variances[soft, None]).sum(0)
    np.testing.assert_allclose(square, expected, rtol=1e-8)
    assert isinstance(fit.gaussian, Gaussian)


def test_whitened_draws_are_standard_normal_where_a_direction_is_known():
    (fit,) = fits_of(regression(T.chain(40), "level", 0.4), {"sigma": [0.3]})
    assert (fit.gaussian.variances == 0).any()
    rng = np.random.default_rng(4)
    step = fit.gaussian.deviations(rng.normal(size=(41, 4000)))
    noise = fit.gaussian.whitened(step, rng)
    np.testing.assert_allclose(fit.gaussian.deviations(noise), step, atol=1e-9)
    spread = np.linalg.eigvalsh(np.cov(noise))  # Marchenko and Pastur: within (1 -+ sqrt(41 / 4000))^2
    assert spread[0] > 0.78 and spread[-1] < 1.24


def test_tree_is_that_of_the_dense_route(sparse_everywhere, monkeypatch):
    data, over = arguments(nile), {"sigma": [0.0, 10.0, 38.0]}
    found = bt.sweep(nile.nile, **data, over=over, seed=3)
    monkeypatch.setattr(_sweep, "MIN_SPARSE", 2000)
    dense = bt.sweep(nile.nile, **data, over=over, seed=3)
    assert (found.attrs["density_route"], dense.attrs["density_route"]) == ("sparse", "affine")
    np.testing.assert_allclose(found.sweep.log_evidence, dense.sweep.log_evidence, atol=1e-8)
    assert bool(found.sweep.exact.all()) and bool(found.sweep.certified.all())
    for group in ("posterior", "log_likelihood", "log_prior", "tie_energy"):
        for name in map(str, found[group].data_vars):
            ours: Any = found[group][name]
            theirs: Any = dense[group][name]
            assert ours.dims == theirs.dims
            # Independent draws of the same posterior: means within 5 standard errors of their difference.
            ours, theirs = (
                x.stack(sample=("chain", "draw")).transpose(..., "sample") for x in (ours, theirs)
            )
            error = np.hypot(ours.std("sample"), theirs.std("sample")).values / math.sqrt(
                ours.sizes["sample"]
            )
            gap = np.abs(ours.mean("sample") - theirs.mean("sample")).values
            assert (gap <= 5 * error + 1e-9).all(), (group, name)


def test_prior_terms_do_not_depend_on_how_they_are_found(sparse_everywhere):
    model = regression(TIES["chains"], "matched", BASE)
    over = {"sigma": [0.0, 0.5, math.inf]}
    every, few = (
        bt.sweep(model, over=over, keep=keep, num_draws=8)
        for keep in (("posterior", "log_prior", "log_likelihood"), ("posterior", "log_prior"))
    )
    for name in map(str, every["log_prior"].data_vars):
        value = every["log_prior"][name]
        np.testing.assert_allclose(value, few["log_prior"][name], rtol=1e-9, atol=1e-9)
    theta = torch.from_numpy(every.posterior.theta.values[1])
    mean = torch.from_numpy(every.posterior.theta_level.values[1])
    energy = TIES["chains"].energy(theta, mean)
    np.testing.assert_allclose(every.tie_energy.theta[1], energy, rtol=1e-9)


# -- likelihoods that are not Gaussian --------------------------------------------------------------------


def moments(tree, name, sigma):
    draws = tree.posterior[name].sel(sigma=sigma).values
    return draws.reshape(-1, *draws.shape[2:])


def test_poisson_chain_has_the_dense_routes_mode_and_evidence():
    data, over = arguments(poisson_chain, 200), {"sigma": [0.0, 0.05, 0.3]}
    dense = bt.sweep(poisson_chain.poisson_chain, **data, over=over, engine="laplace", keep=("posterior",))
    fits = fits_of(poisson_chain.poisson_chain, over, **data)
    for fit, at, error in zip(
        fits, dense.sweep.log_evidence.values, dense.sweep.log_evidence_error.values, strict=True
    ):
        assert fit.converged
        assert abs(fit.log_evidence - at) < 0.3 + 4 * error  # Laplace's own error beside the Monte Carlo one


def small_counts() -> dict[str, Any]:
    return {"count": (arguments(poisson_chain, 40)["count"] / 4).floor()}  # skew


@functools.cache
def small_counts_by_nuts():
    return bt.sweep(
        poisson_chain.poisson_chain, **small_counts(), over={"sigma": [0.3]}, engine="nuts", num_draws=1000,
        target_ess=1000,
    )  # fmt: skip


@pytest.mark.parametrize("target", [6, 40])
def test_blocks_have_the_posterior_that_dense_nuts_has(sparse_everywhere, monkeypatch, target):
    """Means, sds and quantiles of skew copies: |z| < 4 with Bonferroni's number over all."""
    monkeypatch.setattr("bayestie._engines._sparse_chains._Probe.weights_will_do", lambda self, needed: False)
    monkeypatch.setattr(
        "bayestie._engines._sparse_chains.suitable_kernel",
        lambda target_, groups, largest, rng: (_kernel(target_, groups, target, rng), target),
    )
    data, over = small_counts(), {"sigma": [0.3]}
    found = bt.sweep(poisson_chain.poisson_chain, **data, over=over, num_draws=1500, seed=5)
    assert str(found.sweep.engine.values[0]) == "blocks" and bool(found.sweep.certified.all())
    monkeypatch.setattr(_sweep, "MIN_SPARSE", 2000)
    dense = small_counts_by_nuts()
    ours, theirs = (moments(tree, "log_rate", 0.3) for tree in (found, dense))
    size = [float(tree.sweep.min_ess_bulk[0]) for tree in (found, dense)]
    tails = [float(tree.sweep.min_ess_tail[0]) for tree in (found, dense)]
    sd = theirs.std(0)
    unit = math.sqrt(1 / size[0] + 1 / size[1])
    limit = 4.5  # 4 for one, 160 compared
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / (sd * unit)).max() < limit
    assert (np.abs(ours.std(0) - theirs.std(0)) / (sd * unit)).max() < limit
    for q in (0.05, 0.95):
        error = 2.11 * sd * math.sqrt(1 / tails[0] + 1 / tails[1])  # sqrt(q (1 - q)) / density of a normal
        assert (np.abs(np.quantile(ours, q, 0) - np.quantile(theirs, q, 0)) / error).max() < limit
    gap = float(found.sweep.log_evidence[0] - dense.sweep.log_evidence[0])
    error = math.hypot(float(found.sweep.log_evidence_error[0]), float(dense.sweep.log_evidence_error[0]))
    assert abs(gap) < 4 * error + 0.02


def _kernel(target, groups, size, rng):
    from bayestie._engines._blocks import partitions
    from bayestie._engines._sparse_kernel import Kernel

    return Kernel(target, partitions(target.structure, target.gaussian, groups, size, rng), groups)


def chain_of(outcome):
    """Copies of a chain, each seen once."""

    def model(y, trials, *, sigma):
        theta = bt.tied("theta", T.chain(len(y)), sigma, BASE)
        laws = {
            "counts": lambda: dist.Poisson(theta.exp()),
            "binary": lambda: dist.Bernoulli(logits=theta),
            "binomial": lambda: dist.Binomial(trials, logits=theta),
        }
        with pyro.plate("step", len(y)):
            pyro.sample("y", laws[outcome](), obs=y)

    generator = torch.Generator().manual_seed(3)
    trials = torch.randint(1, 9, (1500,), generator=generator).double()
    y = (torch.rand(1500, generator=generator, dtype=torch.float64) * (trials + 1)).floor()
    return model, {"y": y.clamp(max=1.0) if outcome == "binary" else y, "trials": trials}


@pytest.mark.parametrize("outcome", ["counts", "binary", "binomial"])
def test_compiled_moves_are_those_of_arrays(outcome, monkeypatch):
    """1,500 variables: more than one chunk, and blocks that a chunk cuts."""
    from bayestie._engines import _sparse_kernel
    from bayestie._engines._blocks import Groups
    from bayestie._engines._sparse_target import Target

    model, data = chain_of(outcome)
    (fit,) = fits_of(model, {"sigma": [0.4]}, **data)
    target = Target(fit).refined()
    groups, found = Groups.of(target.structure), []
    for least in (1, 10_000):
        monkeypatch.setattr(_sparse_kernel, "_LONG", least)
        kernel = _kernel(target, groups, 60, np.random.default_rng(4))
        assert (kernel.native is not None) == (least == 1)
        rng = np.random.default_rng(5)
        state = kernel.start(rng, 3, 1.2)
        for number in range(24):  # independence proposals, short steps, and shifts of all copies
            kernel.sweep(state, number, rng)
        found.append((kernel, state))
    (ours, one), (theirs, other) = found
    np.testing.assert_allclose(one.step, other.step, rtol=0, atol=1e-9)
    np.testing.assert_allclose(one.rest, other.rest, rtol=0, atol=1e-9)
    np.testing.assert_allclose(one.rest, target.rest(one.step), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(ours.acceptance(), theirs.acceptance())
    assert 0.3 < ours.acceptance().mean() < 1.0


def test_chains_of_one_point_do_not_depend_on_how_many_threads_draw_them():
    data = arguments(poisson_chain, 6000)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            path = bt.sweep(
                poisson_chain.poisson_chain, **data, over={"sigma": [0.4]}, num_draws=100, target_ess=20,
                keep=("posterior",),
            )  # fmt: skip
            found.append(path)
    finally:
        torch.set_num_threads(threads)
    one, two = found
    assert str(one.sweep.engine.values[0]) == "blocks"
    np.testing.assert_array_equal(one.posterior.log_rate, two.posterior.log_rate)
    for name in ("max_rhat", "min_ess_bulk", "log_evidence"):
        np.testing.assert_array_equal(one.sweep[name], two.sweep[name])


def test_long_poisson_chain_is_certified():
    data = arguments(poisson_chain, 5000)
    path = bt.sweep(poisson_chain.poisson_chain, **data, over={"sigma": [0.05]}, keep=("posterior",))
    at = path.sweep.to_dataset().isel(sigma=0)
    assert bool(at.certified), str(at.reason.values)
    assert float(at.max_rhat) < 1.01 and float(at.min_ess_bulk) >= 400 and float(at.min_ess_tail) >= 400
    assert path.posterior.log_rate.shape == (1, 4, 250, 5000)


# -- a few latents beside a Gaussian part -----------------------------------------------------------------


def crossed_effects(rating, student, lecturer, *, sigma):
    lecturers = bt.tied("lecturers", T.exchangeable(12), sigma, dist.Normal(3.0, 1.0))
    students = bt.tied("students", T.exchangeable(30), sigma, 0.0)
    noise_sd = pyro.sample("noise_sd", dist.HalfNormal(2.0))
    with pyro.plate("rating", len(rating)):
        pyro.sample("y", dist.Normal(lecturers[lecturer] + students[student], noise_sd), obs=rating)


def ratings() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    student, lecturer = (torch.randint(0, n, (150,), generator=generator) for n in (30, 12))
    effects = [0.5 * torch.randn(n, generator=generator, dtype=torch.float64) for n in (30, 12)]
    noise = torch.randn(150, generator=generator, dtype=torch.float64)
    return {
        "rating": 3 + effects[0][student] + effects[1][lecturer] + 0.8 * noise,
        "student": student,
        "lecturer": lecturer,
    }


def crossed_in_closed_form(rating, student, lecturer, sigma):
    """Log evidence, and mean and sd of noise_sd, the level and lecturers, by quadrature over the noise."""
    y = rating.numpy() - 3.0
    to_student, to_lecturer = np.eye(30)[student.numpy()], np.eye(12)[lecturer.numpy()]
    shared = np.ones((len(y), len(y))) + sigma**2 * (to_student @ to_student.T + to_lecturer @ to_lecturer.T)
    covary = np.vstack([np.ones((1, len(y))), 1.0 + sigma**2 * to_lecturer.T])
    prior = np.block([[np.ones((1, 13))], [np.ones((12, 1)), 1.0 + sigma**2 * np.eye(12)]])
    log_noise = np.linspace(math.log(0.5), math.log(1.6), 400)
    logs, means, squares = [], [], []
    for noise in np.exp(log_noise):
        whole = shared + noise**2 * np.eye(len(y))
        gain = np.linalg.solve(whole, covary.T).T
        mean = gain @ y
        fit = y @ np.linalg.solve(whole, y) + np.linalg.slogdet(whole)[1] + len(y) * math.log(2 * math.pi)
        half_normal = 0.5 * math.log(2 / math.pi) - math.log(2.0) - noise**2 / 8
        logs.append(half_normal + math.log(noise) - 0.5 * fit)
        means.append(np.r_[noise, mean + 3.0])
        squares.append(np.r_[noise**2, (mean + 3.0) ** 2 + (prior - gain @ covary.T).diagonal()])
    weight = np.exp(np.array(logs) - max(logs))
    log_evidence = max(logs) + math.log(weight.sum() * (log_noise[1] - log_noise[0]))
    weight /= weight.sum()
    mean = weight @ np.array(means)
    return log_evidence, mean, np.sqrt(weight @ np.array(squares) - mean**2)


def test_crossed_effects_with_unknown_noise_agree_with_quadrature(sparse_everywhere):
    data, over = ratings(), {"sigma": [0.0, 0.5]}
    path = bt.sweep(crossed_effects, **data, over=over, seed=1, num_draws=100, target_ess=150)
    assert path.attrs["density_route"] == "sparse"
    assert bool(path.sweep.certified.all()), path.sweep.reason.values
    for i, sigma in enumerate(over["sigma"]):
        log_evidence, mean, sd = crossed_in_closed_form(**data, sigma=sigma)
        at = path.sweep.to_dataset().isel(sigma=i)
        assert abs(float(at.log_evidence) - log_evidence) < 4 * float(at.log_evidence_error) + 1e-6
        draws = [moments(path, name, sigma).reshape(400, -1) for name in ("noise_sd", "lecturers_level")]
        draws = np.concatenate([*draws, moments(path, "lecturers", sigma)], 1)
        error = sd / math.sqrt(float(at.min_ess_bulk))
        assert (np.abs(draws.mean(0) - mean) < 4 * error).all()
        assert (np.abs(draws.std(0) - sd) < 4 * error).all()


def learned_spread(*, sigma):
    spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
    theta = bt.tied("theta", T.exchangeable(5), sigma * spread, BASE)
    with pyro.plate("row", 5):
        pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.arange(5.0))


def learned_log_spread(*, sigma):
    spread = pyro.sample("spread", dist.Normal(0.0, 0.5))
    theta = bt.tied("theta", T.exchangeable(5), sigma * spread.exp(), BASE)
    with pyro.plate("row", 5):
        pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.arange(5.0))


@pytest.mark.parametrize("model", [learned_spread, learned_log_spread])
def test_a_latent_that_only_ties_depend_on_is_integrated_over(model, sparse_everywhere):
    path = bt.sweep(model, over={"sigma": [0.5]}, num_draws=500)
    assert path.attrs["density_route"] == "sparse" and bool(path.sweep.certified.all())
    y, own = torch.arange(5.0, dtype=torch.float64), torch.eye(5, dtype=torch.float64)

    def both(s):
        covariance = BASE.scale**2 + own * ((0.5 * s) ** 2 + 0.5**2)
        log_likelihood = dist.MultivariateNormal(BASE.loc.expand(5), covariance).log_prob(y)
        density = (dist.LogNormal(0.0, 0.5).log_prob(torch.tensor(s)) + log_likelihood).exp()
        return float(density) * np.array([1.0, s if model is learned_spread else math.log(s)])

    mass, first = (quad(lambda s, i=i: both(s)[i], 1e-9, 50.0, limit=500)[0] for i in (0, 1))
    at = path.sweep.isel(sigma=0)
    assert abs(float(at.log_evidence) - math.log(mass)) < 4 * float(at.log_evidence_error)
    spread = path.posterior["spread"].values
    assert abs(spread.mean() - first / mass) < 4 * spread.std() / math.sqrt(float(at.min_ess_bulk))


def tie_of_a_tie(*, sigma):
    first = bt.tied("first", T.chain(4), 0.5, BASE)
    second = bt.tied("second", T.chain(4), sigma, first.mean())
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(first + second, 0.5), obs=torch.arange(4.0))


def factor_of_copies(*, sigma):
    theta = bt.tied("theta", T.chain(4), sigma, BASE)
    pyro.factor("shape", -theta.square().square().sum())
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.arange(4.0))


@pytest.mark.parametrize(
    ("model", "said"),
    [(tie_of_a_tie, "depends on the copies of another"), (factor_of_copies, "factor depends on copies")],
)
def test_priors_that_depend_on_copies_are_not_served(model, said):
    points = {"sigma": torch.tensor([0.5], dtype=torch.float64)}
    density, why = build_sparse_density(LaneProgram(model, (), {}, points))
    assert density is None and said in why


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_log_joint_of_many_draws_is_the_one_read_for_each(sigma):
    points = {"sigma": torch.tensor([sigma], dtype=torch.float64)}
    density = SparseDensity(LaneProgram(crossed_effects, (), ratings(), points))
    rng = np.random.default_rng(1)
    h = 0.3 * rng.normal(size=(6, density.copies.num_hyper))
    structure, numbers = density.at(0, torch.from_numpy(h[0]))
    x = numbers.mean + 0.4 * rng.normal(size=(6, structure.size))
    joint = SparseJoint.of(density, 0, structure)
    assert joint is not None
    found = joint(x, density.full(structure, numbers, x), h)
    for i in range(6):
        _, numbers = density.at(0, torch.from_numpy(h[i]))
        expected = log_prior(structure, numbers, x[i])
        expected += log_likelihood(numbers, structure.map @ x[i] + numbers.offset)
        assert found[i] == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_sums_of_squares_give_the_log_joint_of_many_draws(sigma):
    points = {"sigma": torch.tensor([sigma], dtype=torch.float64)}
    density = SparseDensity(LaneProgram(crossed_effects, (), ratings(), points))
    rng = np.random.default_rng(2)
    h = np.array([0.2]) + 0.3 * rng.normal(size=(6, density.copies.num_hyper))
    fit = find_mode(*density.at(0, torch.from_numpy(h[0])))
    joint = ScaledJoint.of(density, 0, fit, h[0])
    assert joint is not None
    x = fit.gaussian.mean + fit.gaussian.deviations(rng.normal(size=(fit.structure.size, 6))).T
    found = joint(x, density.full(fit.structure, fit.numbers, x), h)
    for i in range(6):
        structure, numbers = density.at(0, torch.from_numpy(h[i]))
        expected = log_prior(structure, numbers, x[i])
        expected += log_likelihood(numbers, structure.map @ x[i] + numbers.offset)
        assert found[i] == pytest.approx(expected, rel=1e-11)


def two_noises(*, sigma):
    theta = bt.tied("theta", T.chain(12), sigma, BASE)
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("row", 12):
        pyro.sample("y", dist.Normal(theta, noise[torch.arange(12) % 2]), obs=torch.arange(12.0))


def test_precisions_without_one_scale_are_left_to_the_model():
    points = {"sigma": torch.tensor([0.5], dtype=torch.float64)}
    density = SparseDensity(LaneProgram(two_noises, (), {}, points))
    h = density.copies.hyper_probe(0)
    fit = find_mode(*density.at(0, h))
    assert ScaledJoint.of(density, 0, fit, h.numpy()) is None
    assert SparseJoint.of(density, 0, fit.structure) is not None


@pytest.mark.parametrize("enough", [0.7, 2.0])
def test_nodes_are_added_until_the_weights_are_good(sparse_everywhere, monkeypatch, enough):
    tried, draw = [], _sparse._Pool._draw

    def counted(self, num):
        tried.append(self.most)
        return draw(self, num)

    monkeypatch.setattr(_sparse._Pool, "_draw", counted)
    monkeypatch.setattr(_sparse, "ENOUGH", enough)  # 2: never
    tree = bt.sweep(crossed_effects, **ratings(), over={"sigma": [0.5]}, seed=1)
    assert bool(tree.sweep["certified"].all())
    assert tried[0] == NODES[0] and set(tried) == set(NODES if enough > 1 else NODES[:1])


def test_a_tie_that_depends_on_other_latents_is_read_for_every_draw():
    points = {"sigma": torch.tensor([0.5], dtype=torch.float64)}
    density = SparseDensity(LaneProgram(learned_spread, (), {}, points))
    structure, _ = density.at(0, density.copies.hyper_probe(0))
    assert SparseJoint.of(density, 0, structure) is None


# -- what is stored, what is refused ----------------------------------------------------------------------


def test_draws_that_do_not_fit_leave_moments(sparse_everywhere, monkeypatch):
    data, over = arguments(nile), {"sigma": [38.0]}
    (fit,) = fits_of(nile.nile, over, **data)
    monkeypatch.setattr(_sparse, "STORED_BYTES", 8 * 101 * 4 * 50)
    path = bt.sweep(nile.nile, **data, over=over)
    assert path.posterior.mean_flow.shape == (1, 4, 50, 100)
    np.testing.assert_allclose(path["summary"].mean_flow_mean[0], fit.gaussian.mean, rtol=1e-10)
    sd = np.sqrt(fit.gaussian.solve(np.eye(100)).diagonal())
    np.testing.assert_allclose(path["summary"].mean_flow_sd[0], sd, rtol=1e-8)
    assert float(path.sweep.min_ess_bulk[0]) == 200


def test_model_that_the_sparse_factor_does_not_serve_is_left_to_the_dense_one(sparse_everywhere, monkeypatch):
    def model(y, *, sigma):
        theta = bt.tied("theta", T.chain(6), sigma, BASE)
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
        with pyro.plate("row", 6):
            pyro.sample("y", dist.Poisson((theta + spread).exp()), obs=y)

    counts, over = torch.tensor([1.0, 2.0, 2.0, 4.0, 3.0, 6.0]), {"sigma": [0.1, 0.5]}
    found = bt.sweep(model, counts, over=over, engine="laplace", num_draws=50, target_ess=50)
    assert found.attrs["density_route"] != "sparse" and "overlap" in found.children
    monkeypatch.setattr(_sweep, "MIN_SPARSE", 2000)
    dense = bt.sweep(model, counts, over=over, engine="laplace", num_draws=50, target_ess=50)
    np.testing.assert_array_equal(found.sweep.log_evidence, dense.sweep.log_evidence)


def test_model_that_is_too_large_says_why_it_does_not_qualify(monkeypatch):
    monkeypatch.setattr(_sweep, "MIN_SPARSE", 5)
    monkeypatch.setattr(_sweep, "MAX_DENSE", 5)

    def model(y, *, sigma):
        theta = bt.tied("theta", T.chain(20), sigma, BASE)
        with pyro.plate("row", 20):
            pyro.sample("y", dist.Normal(theta.square(), 1.0), obs=y)

    with pytest.raises(InferenceError, match="not affine in the copies"):
        bt.sweep(model, torch.zeros(20), over={"sigma": [1.0]})
