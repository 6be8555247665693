"""Whole fits and sweeps against numbers that were not computed by bayestie (`reference.py`) and closed forms.

Statistical tolerances are Monte Carlo standard errors computed from the draws, and from the reference's where
it is Monte Carlo too: 4 of them, or Bonferroni's number where more than 16 are compared (`moments.limit`).
"""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from moments import Exact, Sample, assert_within, scores
from pyro import poutine

import bayestie as bt
from bayestie._sweep import run_engine
from models import dyestuff, eight_schools, lip_cancer, nile

STRENGTHS = [0.0, 0.1, 1.0, 5.0, 30.0]
LEVEL_SDS = [5.0, 1000.0]


def arguments(module, *args) -> dict[str, Any]:
    return {k: v for k, v in module.data(*args).items() if k not in ("coords", "dims")}


SCHOOLS = arguments(eight_schools)


# -- eight schools, strength given ------------------------------------------------------------------------


def schools_in_closed_form(tau, level_sd):
    """Mean and covariance of theta, log evidence: theta ~ N(0, level_sd^2 11^T + tau^2 I)."""
    y, stderr = SCHOOLS["effect"].numpy(), SCHOOLS["stderr"].numpy()
    prior = level_sd**2 * np.ones((8, 8)) + tau**2 * np.eye(8)
    marginal = prior + np.diag(stderr**2)
    gain = np.linalg.solve(marginal, prior).T
    log_evidence = -0.5 * (
        y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(marginal)[1] + 8 * math.log(2 * math.pi)
    )
    return gain @ y, prior - gain @ prior, log_evidence


@pytest.mark.parametrize("tau", list(reference.SCHOOLS_GIVEN_TAU))
def test_closed_form_is_that_of_the_reference(tau):
    # The reference's level has a flat prior: N(0, 1000) pulls it by var(level) / 1000^2 < 2e-4 of itself.
    mean, covariance, _ = schools_in_closed_form(tau, 1000.0)
    expected = reference.SCHOOLS_GIVEN_TAU[tau]
    np.testing.assert_allclose(mean, expected["mean"], atol=2e-4 * 25)
    np.testing.assert_allclose(np.sqrt(covariance.diagonal()), expected["sd"], rtol=2e-4)


@pytest.mark.parametrize("level_sd", LEVEL_SDS)
def test_gaussian_posterior_is_found_without_noise(level_sd):
    exact = Exact.of(
        eight_schools.eight_schools, kwargs=SCHOOLS | {"level_sd": level_sd}, over={"sigma": STRENGTHS}
    )
    mean, covariance = exact.moments("theta")
    for i, tau in enumerate(STRENGTHS):
        expected = schools_in_closed_form(tau, level_sd)
        np.testing.assert_allclose(mean[i], expected[0], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(covariance[i], expected[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("engine", ["laplace", "auto", "svi", pytest.param("nuts", marks=pytest.mark.slow)])
def test_eight_schools_at_given_strengths(engine):
    guide: dict[str, Any] = {"guide": "full_rank"} if engine == "svi" else {}
    path = bt.sweep(
        eight_schools.eight_schools, **SCHOOLS, over={"sigma": STRENGTHS, "level_sd": LEVEL_SDS},
        engine=engine, seed=11, num_chains=8, num_draws=125, **guide,
    )  # fmt: skip
    all_scores = []
    for tau in STRENGTHS:
        for level_sd in LEVEL_SDS:
            mean, covariance, log_evidence = schools_in_closed_form(tau, level_sd)
            found = Sample.of(path, ["theta"], sigma=tau, level_sd=level_sd)
            if tau == 0:
                found = Sample(found.draws[..., :1], found.weights_ess)
                mean, covariance = mean[:1], covariance[:1, :1]
            all_scores += [scores(found.mean, mean), scores(found.sd, np.sqrt(covariance.diagonal()))]
            at = path["sweep"].to_dataset().sel(sigma=tau, level_sd=level_sd)
            assert bool(at.certified), str(at.reason.values)
            if engine in ("laplace", "auto"):
                assert bool(at.exact) and float(at.log_evidence_error) == 0
            if engine != "svi":
                assert float(at.log_evidence) == pytest.approx(log_evidence, abs=1e-8)
            else:
                assert abs(float(at.log_evidence) - log_evidence) < 4 * float(at.log_evidence_error) + 1e-8
    assert_within(np.concatenate(all_scores))


# -- strength zero is one parameter -----------------------------------------------------------------------

EXPOSURE = torch.tensor([0.7, 1.3, 2.1, 0.4, 1.6], dtype=torch.float64)
# Tensors, as float32 is the default outside `fit`: 0.8 there and 0.8 here differ by 1e-8.
LEVEL = dist.Normal(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64))
COUNTS = torch.tensor([3.0, 5.0, 9.0, 0.0, 4.0], dtype=torch.float64)
GRAPHS = {
    "level, exchangeable": (bt.Tie.exchangeable(5), "level"),
    "level, chain": (bt.Tie.chain(5), "level"),
    "matched, exchangeable": (bt.Tie.exchangeable(5), "matched"),
    "matched, complete": (bt.Tie.complete(5), "matched"),
    "matched, chain": (bt.Tie.chain(5), "matched"),
}
LIKELIHOODS = {
    "Normal": lambda theta: dist.Normal(theta, EXPOSURE),
    "Poisson": lambda theta: dist.Poisson(EXPOSURE * theta.exp()),
}


def tied_model(tie, form, likelihood):
    def model(*, sigma):
        theta = bt.tied("theta", tie, sigma, LEVEL, form=form)
        with pyro.plate("observation", 5):
            pyro.sample("y", LIKELIHOODS[likelihood](theta), obs=COUNTS)

    return model


def hand_written(likelihood, name):
    def model():
        level = pyro.sample(name, LEVEL)
        with pyro.plate("observation", 5):
            pyro.sample("y", LIKELIHOODS[likelihood](level.expand(5)), obs=COUNTS)

    return model


@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
@pytest.mark.parametrize("graph", list(GRAPHS))
def test_strength_zero_is_the_model_with_one_parameter(graph, likelihood):
    tied = tied_model(*GRAPHS[graph], likelihood)
    # Both through Pyro and through the lane program; `matched` writes its level as 1 + 0.8 level_z.
    lanes = Exact.of(tied, over={"sigma": [0.0]})
    unit = "theta_level_z" in lanes.program.latent
    other = Exact.of(hand_written(likelihood, "level"))
    z_site = lanes.program.latent["theta_z"]
    level_site = lanes.program.latent["theta_level_z" if unit else "theta_level"]
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        level, *z = torch.randn(1 + z_site.size, dtype=torch.float64, generator=generator)
        z = torch.stack(z)
        idle = dist.Normal(0.0, 1.0).log_prob(z).sum()
        own = (level - 1.0) / 0.8 if unit else level
        # The density of level_z is that of the level times 0.8.
        jacobian = -math.log(0.8) if unit else 0.0
        values = {level_site.name: own, "theta_z": z}
        trace = poutine.trace(poutine.condition(tied, values)).get_trace(
            sigma=torch.zeros((), dtype=torch.float64)
        )
        plain = poutine.trace(
            poutine.condition(hand_written(likelihood, "level"), {"level": level})
        ).get_trace()
        expected = float(plain.log_prob_sum())
        assert float(trace.log_prob_sum() - idle) + jacobian == pytest.approx(expected, abs=1e-10)
        position = torch.empty(1, 1, lanes.program.num_latent, dtype=torch.float64)
        position[0, 0, z_site.slice], position[0, 0, level_site.slice] = z, own
        density = float(lanes.task.density.value(lanes.task.points, position)) - float(idle)
        assert density + jacobian == pytest.approx(expected, abs=1e-10)
        assert float(other.task.density.value(other.task.points, level.reshape(1, 1, 1))) == pytest.approx(
            expected, abs=1e-10
        )
    # The same posterior: mode and curvature, and nothing of it in z.
    mean, covariance = lanes.moments("theta")
    expected_mean, expected_covariance = other.moments("level")
    np.testing.assert_allclose(mean[0], np.full(5, expected_mean[0, 0]), rtol=1e-9)
    np.testing.assert_allclose(covariance[0], np.full((5, 5), expected_covariance[0, 0, 0]), rtol=1e-9)
    z_mean, z_covariance = lanes.moments("theta_z")
    np.testing.assert_allclose(z_mean, 0.0, atol=1e-9)
    np.testing.assert_allclose(z_covariance[0], np.eye(z_site.size), atol=1e-9)


@pytest.mark.parametrize("graph", list(GRAPHS))
def test_small_strengths_approach_one_parameter_like_sigma_squared(graph):
    strengths = np.geomspace(0.005, 0.05, 6)
    exact = Exact.of(tied_model(*GRAPHS[graph], "Normal"), over={"sigma": [0.0, *strengths]})
    mean, covariance = exact.moments("theta")
    variance = covariance.diagonal(axis1=1, axis2=2)
    for moment in (mean, variance):
        distance = np.abs(moment[1:] - moment[0])  # (strength, copy)
        slopes = np.polyfit(np.log(strengths), np.log(distance), 1)[0]
        np.testing.assert_allclose(slopes, 2.0, atol=0.1)


# -- eight schools, strength learned or averaged over -----------------------------------------------------


def schools_with_learned_strength(effect, stderr):
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    theta = bt.tied("theta", bt.Tie.exchangeable(8), tau, dist.Normal(0.0, 5.0))
    with pyro.plate("school", 8):
        pyro.sample("y", dist.Normal(theta, stderr), obs=effect)


def assert_is_posteriordb(found):
    """Means, sds and quantiles of theta, level and strength, in this order, against both references."""
    table = np.array([*(reference.POSTERIORDB[f"theta[{k}]"] for k in range(1, 9)),
                      reference.POSTERIORDB["mu"], reference.POSTERIORDB["tau"]])  # fmt: skip
    mean, sd, quantiles, size = table[:, 0], table[:, 1], table[:, 2:7], table[:, 7]
    # The reference's draws are all but independent; its sd's error is ours but for the number of draws.
    ours = 1 / (1 / found.draws[..., 0].size + 1 / found.weights_ess)
    result = [
        scores(found.mean, mean, sd / np.sqrt(size)),
        scores(found.sd, sd, found.sd[1] * np.sqrt(ours / size)),
    ]
    for p, value in zip(reference.POSTERIORDB_PROBABILITIES, quantiles.T, strict=True):
        result.append(scores(found.share_below(value), p, np.sqrt(p * (1 - p) / size)))
    exact = reference.SCHOOLS_QUADRATURE
    exact_mean = [*exact["theta_mean"], exact["level_mean"], exact["tau_mean"]]
    result.append(scores(found.mean, exact_mean))
    theta = Sample(found.draws[..., :8], found.weights_ess)
    result.append(scores(theta.sd, exact["theta_sd"]))
    for name, p in (("q025", 0.025), ("q25", 0.25), ("q50", 0.5), ("q75", 0.75), ("q975", 0.975)):
        result.append(scores(theta.share_below(np.array(exact[f"theta_{name}"])), p))
    assert_within(np.concatenate(result))


# Our chains run side by side, Pyro's one after another: many short ones here, two longer ones there.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "size"),
    [
        ("nuts", {"num_chains": 16, "num_draws": 60}),
        ("pyro_nuts", {"num_chains": 2, "num_draws": 500, "warmup": 300}),
    ],
)
def test_learned_strength_gives_the_published_posterior(engine, size):
    exact = Exact.of(schools_with_learned_strength, kwargs=SCHOOLS)
    draws = run_engine(engine, exact.sized(**size, target_ess=300))[0]
    assert draws.engine == [engine]
    assert_is_posteriordb(Sample(exact.sites(draws.position, ["theta", "theta_level", "tau"])))


def test_averaged_sweep_gives_the_published_posterior():
    path = bt.sweep(
        eight_schools.eight_schools, **SCHOOLS, over={"sigma": bt.strengths(0.1, 60.0, 16, hard=True)}, seed=5
    )
    averaged = bt.average(path, dist.HalfCauchy(5.0), seed=6)
    found = Sample.of(averaged, ["theta", "theta_level", "sigma"])
    assert averaged["average"]["khat"].item() < 0.7
    assert_is_posteriordb(Sample(found.draws, averaged["average"]["ess"].item()))
    assert float(bt.strength_posterior(path, dist.HalfCauchy(5.0))["mean"]) == pytest.approx(
        reference.SCHOOLS_QUADRATURE["tau_mean"], abs=2e-3
    )


# -- chains -----------------------------------------------------------------------------------------------


def test_nile_is_the_kalman_smoother():
    flow = arguments(nile)
    wide = 1e5  # stands for the flat level of the reference: it pulls means by var / wide^2 < 1e-6 of 1000
    over = {"sigma": [nile.SIGMA_ML]}
    exact = Exact.of(nile.nile, kwargs=flow | {"level_sd": wide}, over=over)
    mean, covariance = exact.moments("mean_flow")
    np.testing.assert_allclose(mean[0], reference.NILE_MEAN, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(covariance[0].diagonal()), reference.NILE_SD, rtol=1e-6)
    for engine in ("laplace", "auto"):
        path = bt.sweep(nile.nile, **flow, level_sd=wide, over=over, engine=engine, seed=3)
        found = Sample.of(path, ["mean_flow"], sigma=nile.SIGMA_ML)
        assert_within(
            np.stack([scores(found.mean, reference.NILE_MEAN), scores(found.sd, reference.NILE_SD)])
        )
        # The diffuse likelihood is the limit of the evidence times the level's prior sd.
        assert path["sweep"]["exact"].item()
        diffuse = path["sweep"]["log_evidence"].item() + math.log(wide)
        assert diffuse == pytest.approx(reference.NILE_DIFFUSE_LOG_LIKELIHOOD, abs=1e-4)


def brownian_motion(values, observed, *, sigma):
    place = bt.tied(
        "place", bt.Tie.chain(30, anchored=True), sigma, dist.Normal(0.0, reference.BROWNIAN_STEP_SD)
    )
    with pyro.plate("observation", len(observed)):
        pyro.sample("y", dist.Normal(place[observed], reference.BROWNIAN_NOISE_SD), obs=values)


def test_brownian_chain_with_its_middle_unobserved():
    observed = torch.tensor([i for i, x in enumerate(reference.BROWNIAN_OBSERVED) if x is not None])
    values = torch.tensor([x for x in reference.BROWNIAN_OBSERVED if x is not None], dtype=torch.float64)
    over = {"sigma": [reference.BROWNIAN_STEP_SD]}
    mean_error = np.array(reference.BROWNIAN_MEAN_ERROR)
    # Of Gaussian draws the sd's error is that of the mean over sqrt 2; the reference's squares may mix worse.
    sd_error = mean_error
    mean, covariance = Exact.of(brownian_motion, (values, observed), over=over).moments("place")
    sd = np.sqrt(covariance[0].diagonal())
    assert_within(
        np.stack(
            [
                (mean[0] - reference.BROWNIAN_MEAN) / mean_error,
                (sd - reference.BROWNIAN_SD) / sd_error,
            ]
        )
    )
    path = bt.sweep(brownian_motion, values, observed, over=over, seed=4)
    found = Sample.of(path, ["place"], sigma=reference.BROWNIAN_STEP_SD)
    assert_within(
        np.stack(
            [
                scores(found.mean, reference.BROWNIAN_MEAN, mean_error),
                scores(found.sd, reference.BROWNIAN_SD, sd_error),
            ]
        )
    )


# -- a map ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "nuts"])
def test_scotland_is_that_of_stan(engine):
    # Chains are dear: for them every other strength, from firm to loose.
    points = reference.SCOTLAND["strengths"][:: 2 if engine == "nuts" else 1]
    strengths = [point["sigma"] for point in points]
    path = bt.sweep(
        lip_cancer.lip_cancer, **arguments(lip_cancer), over={"sigma": strengths}, engine=engine, seed=8,
        num_chains=8, num_draws=75, target_ess=200, keep=["posterior"],
    )  # fmt: skip
    assert bool(path["sweep"]["certified"].all()), path["sweep"]["reason"].values
    # The reference gives no effective sizes. Against 80,000 importance draws of this package its 16,000 draws
    # behave like 14,000 or more independent ones in the means and 3,000 to 6,000 in the sds.
    size, size_for_sd = 14_000, 3_000
    every = []
    for point in points:
        found = Sample.of(path, ["theta", "outdoor_slope"], sigma=point["sigma"])
        mean = np.array([*point["theta_mean"], point["slope_mean"]])
        sd = np.array([*point["theta_sd"], point["slope_sd"]])
        every.append(scores(found.mean, mean, sd / math.sqrt(size)))
        every.append(scores(found.sd, sd, sd / math.sqrt(2 * size_for_sd)))
    assert_within(np.stack(every))


# -- dyestuff: published deviances --------------------------------------------------------------------------


def one_way(grams):
    """Sums of squares within and between batches, of a balanced layout."""
    batches, samples = grams.shape
    means = grams.mean(1)
    within = float(((grams - means[:, None]) ** 2).sum())
    between = float(samples * ((means - means.mean()) ** 2).sum())
    return batches, samples, within, between


def dyestuff_log_evidence(name, *, sigma, noise_sd, level_sd=0.0):
    kwargs = arguments(dyestuff, name)
    kwargs |= {"level_mean": float(kwargs["grams"].mean()), "level_sd": level_sd, "noise_sd": noise_sd}
    fit = bt.fit(dyestuff.dyestuff, **kwargs, sigma=sigma, engine="laplace", num_draws=10, target_ess=10)
    assert fit["sweep"]["exact"].item()
    return fit["sweep"]["log_evidence"].item()


def test_deviances_of_dyestuff():
    ml = reference.DYESTUFF_ML
    assert -2 * dyestuff_log_evidence("Dyestuff", **ml) == pytest.approx(
        reference.DYESTUFF_ML_DEVIANCE, abs=1e-6
    )
    batches, samples, within, between = one_way(arguments(dyestuff)["grams"])
    for relative, deviance in reference.DYESTUFF_DEVIANCE_AT_RELATIVE_SD.items():
        # Given sigma / noise_sd the likelihood is largest at this noise.
        noise = math.sqrt((within + between / (1 + samples * relative**2)) / (batches * samples))
        found = -2 * dyestuff_log_evidence("Dyestuff", sigma=relative * noise, noise_sd=noise)
        assert found == pytest.approx(deviance, abs=1e-7)


def test_reml_of_dyestuff_is_the_evidence_under_a_flat_level():
    batches, samples, within, between = one_way(arguments(dyestuff)["grams"])
    noise_variance = within / (batches * (samples - 1))
    sigma = math.sqrt((between / (batches - 1) - noise_variance) / samples)
    wide = 1e6
    log_evidence = dyestuff_log_evidence(
        "Dyestuff", sigma=sigma, noise_sd=math.sqrt(noise_variance), level_sd=wide
    )
    flat = log_evidence + math.log(wide) + 0.5 * math.log(2 * math.pi)
    assert -2 * flat == pytest.approx(reference.DYESTUFF_REML_CRITERION, abs=1e-6)


def test_dyestuff2_has_its_maximum_at_hard_sharing():
    batches, samples, within, between = one_way(arguments(dyestuff, "Dyestuff2")["grams"])
    noise = math.sqrt((within + between) / (batches * samples))
    hard = -2 * dyestuff_log_evidence("Dyestuff2", sigma=0.0, noise_sd=noise)
    assert hard == pytest.approx(reference.DYESTUFF2_ML_DEVIANCE, abs=1e-7)
    for relative in (0.05, 0.2, 1.0):
        noise = math.sqrt((within + between / (1 + samples * relative**2)) / (batches * samples))
        assert -2 * dyestuff_log_evidence("Dyestuff2", sigma=relative * noise, noise_sd=noise) > hard


@pytest.mark.parametrize("noise", ["known", pytest.param("learned", marks=pytest.mark.slow)])
def test_dyestuff2_is_never_told_to_share_softly(noise):
    given: dict[str, Any] = {"noise_sd": 3.65} if noise == "known" else {}
    path = bt.sweep(
        dyestuff.dyestuff, **dyestuff.data("Dyestuff2"), **given,
        over={"sigma": bt.strengths(0.1, 20.0, 12, hard=True)},
        seed=9, num_draws=100, target_ess=100,
    )  # fmt: skip
    for prior in (None, dist.HalfCauchy(1.0), dist.HalfNormal(5.0), dist.Exponential(0.1)):
        verdict = bt.verdict(path, prior)
        assert verdict.record["recommendation"] in ("hard", "hard or soft", "cannot tell")
        against = verdict.record["hard_vs_soft"]
        assert against["log_bayes_factor"] > 0 and against["sensitivity"][0] > 0
        # In words: the factor itself, and its range over priors on sigma.
        assert f"log Bayes factor {against['log_bayes_factor']:+.2f}" in verdict.text
        low, high = against["sensitivity"]
        assert "depends on the prior" in verdict.text
        assert f"runs from {low:+.2f} to {high:+.2f}" in verdict.text
        # The evidence falls from sigma = 0 on, so no prior at all turns it round.
        assert "No prior on sigma turns it round" in verdict.text
        assert noise == "learned" or verdict.record["best"] == 0
    found = bt.hard_vs_soft(path, dist.HalfCauchy(1.0))
    assert float(found["max_log_soft"]) < 4 * float(found["max_log_soft_error"]) + 1e-9
