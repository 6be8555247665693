"""The step size of nuts settles in the warmup, however the chains end."""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def test_chains_that_end_together_reach_the_acceptance_asked_for():
    # Independent normals: all chains have trees of one depth, and end in the same tick.
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(100), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(100))

    tree = bt.fit(model, engine="nuts", seed=1, num_chains=4, num_draws=250, target_ess=100)
    assert 0.74 < float(tree.sample_stats["acceptance_rate"].mean()) < 0.86
