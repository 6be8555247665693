"""Engines against one another on every model: nuts with Pyro's own, full-rank svi with laplace where exact.

Tolerances as in `test_truth.py`.
"""

import numpy as np
import pytest
import torch
from moments import Exact, Sample, assert_same, assert_within, scores

from bayestie._sweep import run_engine
from models import contraception, dyestuff, eight_schools, lip_cancer, nile

DYESTUFF_KNOWN_NOISE = {"noise_sd": 49.51}


def fitted(model, module, **swept):
    kwargs = {k: v for k, v in module.data().items() if k not in ("coords", "dims")}
    if "years" in swept:
        kwargs["flow"] = kwargs["flow"][: swept.pop("years")]
    given = {k: v for k, v in swept.items() if k != "sigma"}
    return Exact.of(model, kwargs=kwargs | given, over={"sigma": [swept["sigma"]]})


MODELS = {
    "eight schools": lambda: fitted(eight_schools.eight_schools, eight_schools, sigma=5.0),
    "nile": lambda: fitted(nile.nile, nile, sigma=nile.SIGMA_ML, years=25),
    "dyestuff": lambda: fitted(dyestuff.dyestuff, dyestuff, sigma=40.0),
    "lip cancer": lambda: fitted(lip_cancer.lip_cancer, lip_cancer, sigma=0.7),
    "contraception": lambda: fitted(contraception.contraception, contraception, sigma=0.5),
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


# Pyro's takes milliseconds per leapfrog, one chain after another: few iterations, in double-digit numbers.
@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_nuts_agrees_with_that_of_pyro(name):
    exact = MODELS[name]()
    ours = run_engine("nuts", exact.sized(num_chains=8, num_draws=50, target_ess=150))[0]
    theirs = run_engine("pyro_nuts", exact.sized(num_chains=2, num_draws=80, target_ess=100, warmup=80))[0]
    assert ours.engine == ["nuts"] and theirs.engine == ["pyro_nuts"]
    assert int(ours.divergences) == 0
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
    # The Laplace fit knows mean and sd of the latents without noise.
    latents = Sample(svi.position[0].numpy(), float(svi.ess_weights))
    mean = exact.fit.mode[0].numpy()
    sd = exact.fit.factor[0].square().sum(-1).sqrt().numpy()
    assert_within(np.stack([scores(latents.mean, mean), scores(latents.sd, sd)]))
    difference = float(svi.log_evidence - laplace.log_evidence)
    assert abs(difference) < 4 * float(svi.log_evidence_error) + 1e-8
