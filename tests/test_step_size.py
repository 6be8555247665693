"""The step size of nuts settles in the warmup, however the chains end."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayestie as bt
from bayestie._engines import _nuts
from bayestie._engines._nuts import fisher_divergence


def test_chains_that_end_together_reach_the_acceptance_asked_for():
    # Independent normals: all chains have trees of one depth, and end in the same tick.
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(100), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(100))

    tree = bt.fit(model, engine="nuts", seed=1, num_chains=4, num_draws=250, target_ess=100)
    assert 0.74 < float(tree.sample_stats["acceptance_rate"].mean()) < 0.86


def test_fisher_divergence_of_a_normal_is_its_closed_form():
    # The mean of 2 sqrt(Sigma_jj Q_jj) - 2: E |x / s - s Q x|^2 / D at s^2 = sqrt(Sigma_jj / Q_jj).
    covariance = torch.tensor([[4.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    noise = torch.randn(1, 200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = 3.0 + noise @ factor.mT
    found, scale = fisher_divergence(x, -torch.linalg.solve(covariance, (x - 3.0).mT).mT)
    precision = torch.linalg.inv(covariance)
    both = (covariance.diagonal() * precision.diagonal()).sqrt()
    assert float(found) == pytest.approx(float((2 * both - 2).mean()), rel=0.02)
    torch.testing.assert_close(
        scale[0], (covariance.diagonal() / precision.diagonal()) ** 0.25, rtol=0.01, atol=0
    )
    alone, _ = fisher_divergence(noise, -noise)
    assert float(alone) < 1e-4


@pytest.mark.parametrize(("strength", "seed"), [("learned", 1), ("learned", 2), ("known", 1)])
def test_short_trees_whatever_the_strength(strength, seed):
    # The joint mode of (sigma, z) is at a sigma far above the posterior's: its curvature misleads, and so
    # does what data know of copies there: sigma may be near zero, where centred copies are a funnel.
    generator = torch.Generator().manual_seed(2)
    group = torch.arange(30).repeat_interleave(20)
    truth = 0.4 * torch.randn(30, generator=generator)
    y = torch.bernoulli(torch.sigmoid(0.5 + truth)[group], generator=generator)

    def model(y, *, sigma=0.4):
        if strength == "learned":
            sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        theta = bt.tied("theta", bt.Tie.exchangeable(30), sigma, dist.Normal(0.0, 1.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=theta[group]), obs=y)

    tree = bt.fit(model, y, engine="nuts", seed=seed)
    assert bool(tree["sweep"].certified)
    assert float(tree.sample_stats["n_steps"].mean()) < 12


def test_a_ring_of_modes_is_walked():
    # Curvature along the ring is rounding, or a prior's: the Gaussian at a mode says the ridge is straight.
    def ring():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(w.square().sum(), 0.4), obs=torch.tensor(1.0))

    tree = bt.fit(ring, engine="nuts", seed=1, num_chains=2, num_draws=100, target_ess=20)
    w = tree.posterior["w"].values.reshape(-1, 2)
    angle = torch.atan2(*torch.as_tensor(w).T)
    assert (abs(w.mean(0)) < 0.4).all() and (w.std(0) > 0.5).all()
    counts = torch.histc(angle, 4, -torch.pi, torch.pi)
    assert counts.min() > 20


def test_chains_that_begin_at_two_modes_and_stay_apart_are_not_certified():
    # Weights of a net with one hidden unit: (w, v) and (-w, -v) are the same function, and neither leaves.
    def product():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w[0] * w[1], 0.05), obs=torch.tensor(1.0))

    tree = bt.fit(product, seed=1, num_draws=250)
    assert not bool(tree["sweep"].certified) and "R-hat" in str(tree["sweep"].reason.values)
    sides = tree.posterior["w"].values[..., 0].mean(1)
    assert (sides > 0.5).sum() == (sides < -0.5).sum() == 2


def test_two_modes_that_chains_go_between_are_certified():
    def two():
        w = pyro.sample("w", dist.Normal(0.0, 1.5))
        pyro.sample("y", dist.Normal(w.square(), 1.0), obs=torch.tensor(1.5))

    tree = bt.fit(two, seed=1)
    assert bool(tree["sweep"].certified), tree["sweep"].reason.values
    assert str(tree["sweep"].engine.values) == "nuts"
    assert abs(float(tree.posterior["w"].mean())) < 0.1


def test_a_density_without_a_mode_is_not_walked_in_steps_of_its_spike(monkeypatch):
    # As many unknowns as observations: density without bound where the noise vanishes, next to no mass there.
    y = torch.tensor([0.3, -0.4, 0.8, 0.1])
    x = torch.tensor([0.5, -1.0, 0.2, 1.5])

    def line(y):
        strength = pyro.sample("strength", dist.LogNormal(0.0, 0.5))
        theta = bt.tied("theta", bt.Tie.grid(2, 2), strength, dist.Normal(0.0, 1.0), form="copies")
        slope, noise = pyro.sample("slope", dist.Normal(0.0, 1.0)), pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(theta + slope * x, noise), obs=y)

    begun = []

    def believable(task, fit):
        begun.append(fit)
        raise KeyboardInterrupt  # where the sampler begins is all that is looked at

    monkeypatch.setattr(_nuts, "believable", believable)
    with pytest.raises(KeyboardInterrupt):
        bt.fit(line, y, engine="nuts", seed=1)
    assert not bool(begun[0].converged)
    assert float(begun[0].mode.abs().max()) == 0.0 and float(begun[0].log_det) == 0.0
