"""Profiles along axes: where a wall stands beside a plain, the cells find it."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayestie as bt


def separated(none, *, sigma):
    """Groups in which nothing ever happened: a wall of width 1 beside a plain of width sigma."""
    effect = pyro.sample("effect", dist.Normal(torch.zeros(3), sigma).to_event(1))
    with pyro.plate("row", len(none)):
        pyro.sample("y", dist.Bernoulli(logits=effect[torch.arange(len(none)) % 3]), obs=none)


@pytest.mark.parametrize("sigma", [3.0, 30.0, 1000.0])
def test_separated_data_have_weights_that_are_nearly_constant(sigma):
    none = torch.zeros(600, dtype=torch.float64)
    said: Any = bt.fit(separated, none, sigma=sigma, engine="laplace", seed=0)["sweep"]
    # One effect's evidence, by the trapezoid rule.
    at = torch.linspace(-12.0 * sigma, 3.0, 2_000_001, dtype=torch.float64)
    log_joint = dist.Normal(0.0, sigma).log_prob(at) - 200.0 * torch.nn.functional.softplus(at)
    exact = 3.0 * float(torch.logsumexp(log_joint, 0) + math.log(at[1] - at[0]))
    assert bool(said["certified"])
    assert float(said["ess_weights"]) > 0.97 * 1000
    assert abs(float(said["log_evidence"]) - exact) < 5.0 * float(said["log_evidence_error"]) + 1e-3
