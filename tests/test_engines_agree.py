"""Engines against one another on every model: nuts with Pyro's own, full-rank svi with laplace where exact.

Tolerances as in `test_truth.py`.
"""

import numpy as np
import pytest
import torch
from moments import Exact, Sample, assert_same, assert_within, scores

from bayestie._sweep import run_engine
from models import contraception, dyestuff, eight_schools, nile

DYESTUFF_KNOWN_NOISE = {"noise_sd": 49.51}


def fitted(model, module, sigma, **given):
    kwargs = {k: v for k, v in module.data().items() if k not in ("coords", "dims")}
    return Exact.of(model, kwargs=kwargs | given, over={"sigma": [sigma]})


def nile_near_zero():
    """25 years in noise sds from 1000: Pyro starts its chains within 2 of zero, so they begin near."""
    unit = nile.OBSERVATION_SD
    flow = (nile.data()["flow"][:25] - 1000.0) / unit
    given = {"noise_sd": 1.0, "level_mean": 0.0, "level_sd": 1000.0 / unit}
    return fitted(nile.nile, nile, nile.SIGMA_ML / unit, flow=flow, **given)


def dyestuff_near_zero():
    """In units of 50 g from 1500 g, for the same reason."""
    grams = (dyestuff.data()["grams"] - 1500.0) / 50.0
    given = {"level_mean": 0.0, "level_sd": 2.0, "noise_scale": 2.0}
    return fitted(dyestuff.dyestuff, dyestuff, 0.8, grams=grams, **given)


def contraception_in_some_districts(count=10):
    """The women of the first districts: Pyro's chains take minutes with all."""
    data = contraception.data()
    rows = data["district"] < count
    given = {name: data[name][rows] for name in ("use", "age", "urban", "district")}
    return fitted(contraception.contraception, contraception, sigma=0.5, **given, num_districts=count)


MODELS = {
    "eight schools": lambda: fitted(eight_schools.eight_schools, eight_schools, sigma=5.0),
    "nile": nile_near_zero,
    "dyestuff": dyestuff_near_zero,
    "contraception": contraception_in_some_districts,
}
GAUSSIAN = {
    "eight schools": MODELS["eight schools"],
    "nile": lambda: fitted(nile.nile, nile, sigma=nile.SIGMA_ML),
    "dyestuff": lambda: fitted(dyestuff.dyestuff, dyestuff, sigma=40.0, **DYESTUFF_KNOWN_NOISE),
}


def columns(exact, draws):
    """Latents and all posterior variables of one point's draws."""
    position = draws.position
    values = torch.cat([position, exact.task.quantities(exact.task.points, position)], -1)[0].numpy()
    moving = values.std((0, 1)) > 0
    return values[..., moving]


def assert_is_the_gaussian(exact, draws):
    """Draws of a Gaussian posterior: the Laplace fit knows mean and sd of the latents without noise."""
    latents = Sample(draws.position[0].numpy(), float(draws.ess_weights))
    mean = exact.fit.mode[0].numpy()
    sd = exact.fit.factor[0].square().sum(-1).sqrt().numpy()
    assert_within(np.stack([scores(latents.mean, mean), scores(latents.sd, sd)]))


# Pyro's takes milliseconds per leapfrog, one chain after another: few iterations.
@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_nuts_agrees_with_that_of_pyro(name):
    exact = MODELS[name]()
    ours = run_engine("nuts", exact.sized(num_chains=8, num_draws=50, target_ess=150))[0]
    theirs = run_engine("pyro_nuts", exact.sized(num_chains=2, target_ess=100, num_draws=80, warmup=100))[0]
    assert ours.engine == ["nuts"] and theirs.engine == ["pyro_nuts"]
    assert int(ours.divergences) == 0
    if name in ("eight schools", "nile"):
        assert_is_the_gaussian(exact, ours)
    assert_same(Sample(columns(exact, ours)), Sample(columns(exact, theirs)))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GAUSSIAN))
def test_full_rank_svi_agrees_with_laplace_where_the_posterior_is_gaussian(name):
    exact = GAUSSIAN[name]()
    laplace = run_engine("laplace", exact.sized(num_chains=4, num_draws=250, target_ess=400))[0]
    assert laplace.exact == [True]
    svi = run_engine("svi", exact.sized(num_chains=4, num_draws=250, target_ess=400, guide="full_rank"))[0]
    assert svi.certified == [True], svi.reason
    found = Sample(columns(exact, svi), float(svi.ess_weights))
    assert_same(found, Sample(columns(exact, laplace)))
    assert_is_the_gaussian(exact, svi)
    difference = float(svi.log_evidence - laplace.log_evidence)
    assert abs(difference) < 4 * float(svi.log_evidence_error) + 1e-8
