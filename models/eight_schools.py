"""Eight schools: how far does coaching for the SAT differ from school to school?

Eight randomised experiments, each reduced to an estimated effect (points of the SAT verbal test) and its
standard error, taken as known. Source: Rubin (1981), Estimation in parallel randomized experiments,
Journal of Educational Statistics 6(4), 377-401, table 1; used in Gelman et al., Bayesian Data Analysis,
3rd edition, table 5.2.
"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def eight_schools(effect, stderr, *, sigma, level_sd=5.0):
    """Normal estimates of effects that share a level: effect_k ~ N(theta_k, stderr_k^2).

    Args:
        effect: estimated effect of each school, in points, shape (K,).
        stderr: its known standard error, in points, shape (K,).
        sigma: sd of a school's effect around the shared level, in points, >= 0.
        level_sd: prior sd of the shared level, in points; 5 as in posteriordb.
    """
    num_schools = effect.shape[-1]
    theta = bt.tied("theta", bt.Tie.exchangeable(num_schools), sigma, dist.Normal(0.0, level_sd))
    with pyro.plate("school", num_schools):
        pyro.sample("y", dist.Normal(theta, stderr), obs=effect)


def data():
    """The model's arguments with their labels: pass as `bt.sweep(eight_schools, **data(), over=...)`."""
    return {
        "effect": torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64),
        "stderr": torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64),
        "coords": {"school": list("ABCDEFGH")},
        "dims": {"theta": ["school"], "effect": ["school"], "stderr": ["school"]},
    }
