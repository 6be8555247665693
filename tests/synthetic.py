"""Exact sweep trees without any engine: normal means tied to a known-base level, drawn in closed form.

y_k ~ N(theta_k, stderr_k^2), theta_k = level + sqrt(v) z_k, z_k ~ N(0, 1), with v and the variance of
the level as DESIGN's forms `level` and `matched` have them for an exchangeable tie. Given y the level is
normal, and given the level the z_k are independent and normal, so draws are i.i.d. and exact.
"""

import functools
import json
import math
import warnings
from typing import Any

import numpy as np
import xarray as xr
from arviz_stats import loo
from arviz_stats.base import array_stats

from bayestie._results import build_tree, select

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STDERR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS = ["Choate", "Deerfield", "Phillips Andover", "Phillips Exeter"]
SCHOOLS += ["Hotchkiss", "Lawrenceville", "St. Paul's", "Mt. Hermon"]
STRENGTHS = (0.0, *(float(x) for x in np.geomspace(0.1, 30.0, 16)))


def variances(sigma, base_sd, form):
    """Variance of a deviation and of the level (the hub of the exchangeable tie)."""
    if form == "level":
        return sigma**2, base_sd**2
    deviation = 0.0 if sigma == 0 else 1 / (1 / sigma**2 + 1 / base_sd**2)
    return deviation, base_sd**2 - deviation


def log_evidence(sigma, y, stderr, base_sd=5.0, form="level"):
    """log p(y | sigma), y ~ N(0, v_level 1 1^T + diag(v + stderr^2)), by Sherman-Morrison."""
    deviation, level = variances(sigma, base_sd, form)
    total = deviation + stderr**2
    gain = 1 + level * np.sum(1 / total)
    quadratic = np.sum(y**2 / total) - level * np.sum(y / total) ** 2 / gain
    return float(-0.5 * (len(y) * math.log(2 * math.pi) + np.sum(np.log(total)) + math.log(gain) + quadratic))


def exact_moments(sigma, y, stderr, base_sd=5.0, form="level"):
    """Posterior mean and sd of each theta_k."""
    deviation, level = variances(sigma, base_sd, form)
    prior = level * np.ones((len(y), len(y))) + deviation * np.eye(len(y))
    gain = prior @ np.linalg.inv(prior + np.diag(stderr**2))
    return gain @ y, np.sqrt(np.diag(prior - gain @ prior))


def _log_normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)


def _draws(sigma, y, stderr, base_sd, form, shape, generator):
    """One strength: every per-draw array of the tree, leading axes `shape` = (chain, draw)."""
    deviation, level_variance = variances(sigma, base_sd, form)
    total = deviation + stderr**2
    if level_variance > 0:
        precision = 1 / level_variance + np.sum(1 / total)
        mean, sd = np.sum(y / total) / precision, precision**-0.5
        level = mean + sd * generator.normal(size=shape)
        level_prior = _log_normal(level, 0.0, math.sqrt(level_variance))
        level_density = _log_normal(level, mean, sd)
    else:
        level = np.zeros(shape)
        level_prior = level_density = np.zeros(shape)
    z_precision = 1 + deviation / stderr**2
    z_mean = math.sqrt(deviation) / stderr**2 * (y - level[..., None]) / z_precision
    z = z_mean + z_precision**-0.5 * generator.normal(size=(*shape, len(y)))
    theta = level[..., None] + math.sqrt(deviation) * z
    log_likelihood = _log_normal(y, theta, stderr)
    scale = math.sqrt(deviation) if deviation > 0 else 1.0
    deviations = _log_normal(theta, level[..., None], scale).sum(-1) if deviation > 0 else np.zeros(shape)
    return {
        "posterior/theta": theta,
        "posterior/theta_level": level,
        "posterior/theta_z": z,
        "sample_stats/lp": level_prior + _log_normal(z, 0.0, 1.0).sum(-1) + log_likelihood.sum(-1),
        "sample_stats/laplace_log_density": level_density + _log_normal(z, z_mean, z_precision**-0.5).sum(-1),
        "log_likelihood/y": log_likelihood,
        "log_prior/theta_level": level_prior,
        "log_prior/theta": deviations,
        "tie_energy/theta": ((theta - level[..., None]) ** 2).sum(-1),
        "posterior_predictive/y": generator.normal(theta[:, ::2], stderr),
    }


def normal_means_tree(
    y,
    stderr,
    *,
    strengths=STRENGTHS,
    base_sd=5.0,
    form="level",
    labels=None,
    dim="school",
    num_chains=4,
    num_draws=250,
    seed=0,
    attrs=None,
):
    """The tree that a sweep of the model above by an exact engine returns."""
    y, stderr = np.asarray(y, dtype=float), np.asarray(stderr, dtype=float)
    num_copies = len(y)
    labels = list(labels) if labels is not None else list(range(num_copies))
    generator = np.random.default_rng(seed)
    shape = (num_chains, num_draws)
    per_strength = [_draws(s, y, stderr, base_sd, form, shape, generator) for s in strengths]
    groups: dict[str, dict] = {}
    for key in per_strength[0]:
        group, name = key.split("/")
        groups.setdefault(group, {})[name] = np.stack([arrays[key] for arrays in per_strength])
    lp = groups["sample_stats"]["lp"]
    groups["sample_stats"].update(
        diverging=np.zeros(lp.shape, dtype=bool),
        tree_depth=np.zeros(lp.shape, dtype=np.int64),
        n_steps=np.zeros(lp.shape, dtype=np.int64),
        energy=-lp,
        acceptance_rate=np.ones(lp.shape),
        step_size=np.zeros(lp.shape),
    )
    groups["observed_data"] = {"y": y}
    groups["constant_data"] = {"effect": y, "stderr": stderr}
    count = len(strengths)
    evidence = [log_evidence(s, y, stderr, base_sd, form) for s in strengths]
    # Filled in below from the draws, once they are labelled.
    measured = ("max_rhat", "min_ess_bulk", "min_ess_tail", "elpd", "elpd_se", "p_loo", "max_pareto_k")
    groups["sweep"] = {
        "engine": np.array(["laplace"] * count),
        "certified": np.ones(count, dtype=bool),
        "reason": np.array(["exact: the log weights are constant to rounding"] * count),
        "exact": np.ones(count, dtype=bool),
        "log_evidence": np.array(evidence),
        "log_evidence_error": np.zeros(count),
        "khat": np.full(count, -np.inf),
        "ess_weights": np.full(count, float(num_chains * num_draws)),
        **{name: np.zeros(count) for name in measured},
        "divergences": np.zeros(count, dtype=np.int64),
        "seconds": np.full(count, 0.01),
    }
    tie = {
        "kind": "exchangeable",
        "num_copies": num_copies,
        "num_components": 1,
        "rank": num_copies,
        "scaled": False,
        "scale_factor": 1.0,
        "edges": [[k, num_copies] for k in range(num_copies)],
        "form": form,
        "base": f"Normal(0, {base_sd:g})",
        "event_shape": [],
        "sigma_from": "sigma",
        "copy_dims": [dim],
    }
    tree = build_tree(
        swept={"sigma": strengths},
        groups=groups,
        event_dims={"theta": [dim], "theta_z": [dim], "y": [dim], "effect": [dim], "stderr": [dim]},
        coords={dim: labels},
        group_coords={"posterior_predictive": {"draw": np.arange(0, num_draws, 2)}},
        attrs={
            "bayestie_version": "0",
            "torch_version": "0",
            "pyro_version": "0",
            "arviz_version": "0",
            "created_at": "2025-01-01T00:00:00+00:00",
            "seed": seed,
            "device": "cpu",
            "engine": "auto",
            "model": "schools",
            "call": "sweep(schools, effect, stderr, over={'sigma': strengths(0.1, 30, 16, hard=True)})",
            "swept": ["sigma"],
            "ties": {"theta": tie},
            "num_latent": num_copies + 1,
            "seconds_total": 0.01 * count,
            **(attrs or {}),
        },
    )
    _measure(tree, strengths)
    return tree


def _measure(tree, strengths):
    """R-hat, ESS and PSIS-LOO of every strength by ArviZ, written into the sweep group."""
    sweep = tree["sweep"].to_dataset()
    # The first copies stand for all: a thousand of them would take minutes.
    latent = tree["posterior"].to_dataset()[["theta_level", "theta_z"]]
    latent = latent.isel({latent["theta_z"].dims[-1]: slice(20)})
    stacked = latent.to_stacked_array("latent", sample_dims=["sigma", "chain", "draw"]).values
    for i, sigma in enumerate(strengths):
        draws = np.moveaxis(stacked[i], -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            diagnostics = {
                "max_rhat": array_stats.rhat(draws, chain_axis=-2, draw_axis=-1),
                "min_ess_bulk": array_stats.ess(draws, chain_axis=-2, draw_axis=-1),
                "min_ess_tail": array_stats.ess(
                    draws, chain_axis=-2, draw_axis=-1, method="tail", prob=(0.05, 0.95)
                ),
            }
        # A level that is known (matched, sigma = inf) is constant and has no diagnostics.
        moving = draws.std(axis=(-2, -1)) > 0
        for name, values in diagnostics.items():
            sweep[name][i] = (np.max if name == "max_rhat" else np.min)(values[moving])
        with warnings.catch_warnings():
            # A bad Pareto k is a number of the tree here, not news.
            warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
            score: Any = loo(select(tree, sigma=sigma), pointwise=True)
        sweep["elpd"][i], sweep["elpd_se"][i], sweep["p_loo"][i] = score.elpd, score.se, score.p
        sweep["max_pareto_k"][i] = float(score.pareto_k.max())
    tree["sweep"] = xr.DataTree(sweep)


@functools.cache
def _eight_schools(strengths, form, num_draws, seed):
    return normal_means_tree(
        EFFECT, STDERR, strengths=strengths, form=form, labels=SCHOOLS, num_draws=num_draws, seed=seed
    )


def eight_schools_tree(*, form="level", free=False, num_draws=250, seed=0):
    """Eight schools with base N(0, 5) at strengths 0, 0.1 .. 30 (and inf, if `free`, form matched only)."""
    strengths = (*STRENGTHS, math.inf) if free else STRENGTHS
    return _eight_schools(strengths, form, num_draws, seed).copy(deep=True)


def spoil(tree, sigma, **sweep_values):
    """Overwrite what the sweep group says of one strength, to see whether distrust is shown."""
    sweep = tree["sweep"].to_dataset().copy(deep=True)
    where = int(np.flatnonzero(sweep["sigma"].values == sigma)[0])
    for name, value in sweep_values.items():
        values = sweep[name].values.astype(object)
        values[where] = value
        sweep[name] = (("sigma",), np.array(values.tolist()))
    tree = tree.copy(deep=True)
    tree["sweep"] = xr.DataTree(sweep)
    return tree


def fit_tree(sigma=5.0, *, form="level", num_draws=250, seed=0):
    """The tree of a fit at one strength: no swept dimension."""
    tree = select(_eight_schools((sigma,), form, num_draws, seed), sigma=sigma)
    del tree.attrs["selected"]
    tree.attrs["ties"] = json.dumps(
        {name: {**record, "sigma_from": None} for name, record in json.loads(tree.attrs["ties"]).items()}
    )
    tree.attrs["call"] = f"fit(schools, effect, stderr, sigma={sigma:g}, seed=0)"
    return tree
