"""Lip cancer in Scotland, 1975-1980: do neighbouring districts share their risk?

Observed and expected cases among men in 56 districts, and the part of the work force in agriculture, fishing
and forestry (outdoor work). Source: Kemp et al. (1985), Atlas of Cancer in Scotland; Clayton and Kaldor
(1987), Empirical Bayes estimates of age-standardized relative risks, Biometrics 43, 671-681. Neighbours are
those of the connected graph in Stan's example `car-iar-poisson` (132 edges; islands are joined to
districts across the water).
"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt

# fmt: off
DISTRICTS = [
    "Skye-Lochalsh", "Banff-Buchan", "Caithness", "Berwickshire", "Ross-Cromarty", "Orkney", "Moray",
    "Shetland", "Lochaber", "Gordon", "Western Isles", "Sutherland", "Nairn", "Wigtown", "NE Fife",
    "Kincardine", "Badenoch", "Ettrick", "Inverness", "Roxburgh", "Angus", "Aberdeen", "Argyll-Bute",
    "Clydesdale", "Kirkcaldy", "Dunfermline", "Nithsdale", "East Lothian", "Perth-Kinross",
    "West Lothian", "Cumnock-Doon", "Stewartry", "Midlothian", "Stirling", "Kyle-Carrick", "Inverclyde",
    "Cunninghame", "Monklands", "Dumbarton", "Clydebank", "Renfrew", "Falkirk", "Clackmannan",
    "Motherwell", "Edinburgh", "Kilmarnock", "East Kilbride", "Hamilton", "Glasgow", "Dundee",
    "Cumbernauld", "Bearsden", "Eastwood", "Strathkelvin", "Annandale", "Tweeddale",
]
CASES = [
    9, 39, 11, 9, 15, 8, 26, 7, 6, 20, 13, 5, 3, 8, 17, 9, 2, 7, 9, 7, 16, 31, 11, 7, 19, 15, 7, 10, 16,
    11, 5, 3, 7, 8, 11, 9, 11, 8, 6, 4, 10, 8, 2, 6, 19, 3, 2, 3, 28, 6, 1, 1, 1, 1, 0, 0,
]
EXPECTED = [
    1.4, 8.7, 3.0, 2.5, 4.3, 2.4, 8.1, 2.3, 2.0, 6.6, 4.4, 1.8, 1.1, 3.3, 7.8, 4.6, 1.1, 4.2, 5.5, 4.4,
    10.5, 22.7, 8.8, 5.6, 15.5, 12.5, 6.0, 9.0, 14.4, 10.2, 4.8, 2.9, 7.0, 8.5, 12.3, 10.1, 12.7, 9.4,
    7.2, 5.3, 18.8, 15.8, 4.3, 14.6, 50.7, 8.2, 5.6, 9.3, 88.7, 19.6, 3.4, 3.6, 5.7, 7.0, 4.2, 1.8,
]
# Per cent of the work force outdoors, in tens.
OUTDOOR = [
    1.6, 1.6, 1.0, 2.4, 1.0, 2.4, 1.0, 0.7, 0.7, 1.6, 0.7, 1.6, 1.0, 2.4, 0.7, 1.6, 1.0, 0.7, 0.7, 1.0,
    0.7, 1.6, 1.0, 0.7, 0.1, 0.1, 0.7, 0.7, 1.0, 1.0, 0.7, 2.4, 1.0, 0.7, 0.7, 0.0, 1.0, 0.1, 1.6, 0.0,
    0.1, 1.6, 1.6, 0.0, 0.1, 0.7, 0.1, 0.1, 0.0, 0.1, 0.1, 0.0, 0.1, 0.1, 1.6, 1.0,
]
# Neighbours of each district, 1-based as published, each pair once.
NEIGHBOURS = {
    1: [5, 9, 11, 19], 2: [7, 10], 3: [6, 12], 4: [18, 20, 28], 5: [11, 12, 13, 19], 6: [8],
    7: [10, 13, 16, 17], 9: [11, 17, 19, 23, 29], 10: [16, 22], 11: [12], 13: [17, 19], 14: [31, 32, 35],
    15: [25, 29, 50], 16: [17, 21, 22, 29], 17: [19, 29], 18: [20, 28, 33, 55, 56], 20: [55],
    21: [29, 50], 23: [29, 34, 36, 37, 39], 24: [27, 30, 31, 44, 47, 48, 55, 56], 25: [26, 29],
    26: [29, 42, 43], 27: [31, 32, 55], 28: [33, 45], 29: [34, 43, 50], 30: [38, 42, 44, 45, 56],
    31: [32, 35, 46, 47], 32: [35], 33: [45, 56], 34: [39, 40, 42, 43, 51, 52, 54], 35: [37, 46],
    36: [37, 39, 41], 37: [41, 46], 38: [42, 44, 49, 51, 54], 39: [40, 41], 40: [41, 49, 52],
    41: [46, 49, 53], 42: [43, 51], 44: [48, 49], 45: [56], 46: [47, 53], 47: [48, 49, 53], 48: [49],
    49: [52, 53, 54], 51: [54], 52: [54], 55: [56],
}
# fmt: on

# Built once: its spectrum costs a factorisation.
MAP = bt.Tie.edges(len(DISTRICTS), [(i - 1, j - 1) for i in NEIGHBOURS for j in NEIGHBOURS[i]])


def lip_cancer(cases, expected, outdoor, *, sigma, copy_sd=5.0, neighbours=MAP):
    """Poisson counts: cases_k ~ Poisson(expected_k exp(theta_k + b outdoor_k)), theta tied along the map.

    Args:
        cases: observed cases per district, shape (K,), K = 56.
        expected: cases expected from the district's population by age, shape (K,), > 0.
        outdoor: per cent of the work force in outdoor work, in tens, shape (K,).
        sigma: scale of the edge factors exp(-(theta_i - theta_j)^2 / (2 sigma^2)), on the log scale, >= 0.
        copy_sd: prior sd of each district's log relative risk before the edge factors (form `copies`).
        neighbours: the tie of the districts, by default of all 56.
    """
    slope = pyro.sample("outdoor_slope", dist.Normal(0.0, 10.0))
    theta = bt.tied("theta", neighbours, sigma, dist.Normal(0.0, copy_sd), form="copies")
    with pyro.plate("district", neighbours.num_copies):
        pyro.sample("y", dist.Poisson(expected * torch.exp(theta + slope * outdoor)), obs=cases)


def data():
    """The model's arguments with their labels: pass as `bt.sweep(lip_cancer, **data(), over=...)`."""
    return {
        "cases": torch.tensor(CASES, dtype=torch.float64),
        "expected": torch.tensor(EXPECTED, dtype=torch.float64),
        "outdoor": torch.tensor(OUTDOOR, dtype=torch.float64),
        "coords": {"district": DISTRICTS},
        "dims": {name: ["district"] for name in ("theta", "cases", "expected", "outdoor")},
    }
