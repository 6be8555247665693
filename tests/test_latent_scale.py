"""Normal likelihoods with an unknown noise sd: sums of squares for observations, exact draws."""

from typing import Any

import moments
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate
from zoo import numbers

import bayestie as bt
from bayestie._affine import AffineDensity
from bayestie._build_density import build_density
from bayestie._density import ProgramDensity
from bayestie._engines._conditional import conditional_proposal
from bayestie._engines._laplace_fit import fit_laplace
from bayestie._engines._noise_coordinates import noise_coordinates
from bayestie._engines._protocol import Task
from bayestie._program import LaneProgram

ROWS, GROUPS = 40, 5
GROUP = torch.arange(ROWS) % GROUPS
Y = 3.0 + numbers(GROUPS, seed=1)[GROUP] + 0.7 * numbers(ROWS, seed=2)
KNOWN = 0.5 + numbers(ROWS, seed=3).abs()
STRENGTHS = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)


def plain(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.exchangeable(GROUPS), sigma, dist.Normal(0.0, 5.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    with pyro.plate("row", ROWS):
        pyro.sample("y", dist.Normal(theta[GROUP], noise), obs=y)


def known_ratios(y, *, sigma):
    """Sds known but for a factor, given as a variance; a mask and a weight."""
    theta = bt.tied("theta", bt.Tie.chain(GROUPS), sigma, dist.Normal(0.0, 5.0))
    variance = pyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    kept: Any = torch.arange(ROWS) != 3
    with pyro.plate("row", ROWS), pyro.poutine.mask(mask=kept), pyro.poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(theta[GROUP] + 1.0, variance.sqrt() * KNOWN), obs=y)


def two_sites(y, *, sigma):
    """One noise for two sites, a third of known noise, one count."""
    theta = bt.tied("theta", bt.Tie.exchangeable(GROUPS), sigma, dist.Normal(0.0, 5.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    pyro.sample("first", dist.Normal(theta[GROUP[:9]], noise).to_event(1), obs=y[:9])
    pyro.sample("second", dist.Normal(2.0 * theta[GROUP[9:]], 3.0 * noise).to_event(1), obs=y[9:])
    pyro.sample("third", dist.Normal(theta[0], 0.4), obs=y[0])
    pyro.sample("count", dist.Poisson(theta[1].exp()), obs=torch.tensor(2.0, dtype=torch.float64))


def program_of(model):
    return LaneProgram(model, (Y,), {}, {"sigma": STRENGTHS})


def close(found, expected, tolerance=1e-12):
    scale = 1.0 + float(expected.abs().max())
    assert float((found - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("model", [plain, known_ratios, two_sites])
def test_sums_of_squares_give_the_density_of_the_observations(model):
    program = program_of(model)
    density, general = build_density(program), ProgramDensity(program)
    assert isinstance(density, AffineDensity) and density.latent_scale is not None
    assert [f.site for f in density.families] == (["count"] if model is two_sites else [])
    points = torch.arange(3)
    at = 0.6 * numbers(3, 7, program.num_latent, seed=4)
    for found, expected in zip(
        density.value_and_grad(points, at), general.value_and_grad(points, at), strict=True
    ):
        close(found, expected)
    close(density.value(points, at), general.value(points, at))
    close(density.hessian(points, at[:, 0]), general.hessian(points, at[:, 0]))
    factor = torch.eye(program.num_latent, dtype=torch.float64).expand(3, -1, -1)
    nodes = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    close(density.profile(points, at[:, 0], factor, nodes), general.profile(points, at[:, 0], factor, nodes))


def test_noises_of_their_own_are_no_common_scale():
    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(GROUPS), sigma, dist.Normal(0.0, 5.0))
        noise = pyro.sample("noise", dist.HalfNormal(2.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(theta[GROUP], noise[GROUP % 2]).to_event(1), obs=y)

    program = program_of(model)
    density, general = build_density(program), ProgramDensity(program)
    assert isinstance(density, AffineDensity) and density.latent_scale is None
    points, at = torch.arange(3), 0.6 * numbers(3, 7, program.num_latent, seed=4)
    close(density.value(points, at), general.value(points, at))


def test_draws_are_exact_given_the_noise():
    program = program_of(known_ratios)
    density = build_density(program)
    task = Task(program, density, 3, 4, 250, 400.0, 0, lambda event: None)
    proposal = conditional_proposal(task, task.points)
    assert proposal is not None
    position, log_density, value = proposal.propose(numbers(3, 2000, program.num_latent, seed=5))
    close(proposal.log_density(position), log_density, 1e-10)
    close(density.value(task.points, position), value, 1e-11)
    ratio = value - log_density
    # What is left is the grid of the noise's marginal: straight lines between points 1/30 sd apart.
    assert float((ratio.amax(1) - ratio.amin(1)).max()) < 2e-3
    kept = proposal.take(torch.tensor([2]))
    close(kept.log_density(position[2:]), log_density[2:], 1e-10)


@pytest.mark.parametrize("model", [plain, known_ratios])
def test_the_axes_give_the_density_its_gradient_and_its_centre(model):
    program = program_of(model)
    density = build_density(program)
    assert isinstance(density, AffineDensity) and density.noise_axes is not None
    task = Task(program, density, 3, 4, 250, 400.0, 0, lambda event: None)
    fit = fit_laplace(task, task.points)
    assert bool(fit.converged.all()) and fit.num_modes.tolist() == [1, 1, 1]
    # At the marginal's mode of the noise the others are at their conditional mode, and the noise is not.
    _, grad = density.value_and_grad(task.points, fit.mode.unsqueeze(1))
    others = density.noise_axes.others
    close(grad[..., others], torch.zeros_like(grad[..., others]), 1e-8)
    coordinates = noise_coordinates(task, fit)
    assert coordinates is not None
    some = coordinates.take(torch.tensor([2, 0]))
    for at, points in ((coordinates, [0, 1, 2]), (some, [2, 0])):
        z = 2.0 * numbers(len(points), 6, program.num_latent, seed=8)
        position = at.to_position(z)
        value, _, grad = at.evaluate(z)
        expected, by_position = density.value_and_grad(torch.tensor(points), position)
        close(value, expected, 1e-10)
        # A linear map: its Jacobian by differences of positions is exact.
        steps = torch.eye(program.num_latent, dtype=torch.float64)
        origin = at.to_position(torch.zeros_like(z[:, :1]))
        jacobian = at.to_position(steps.expand(len(points), -1, -1)) - origin
        close(grad, by_position @ jacobian.mT, 1e-10)


SIX = numbers(6, seed=11)


def saturated(y, *, sigma):
    """One observation per copy: the joint density is unbounded, the posterior is not."""
    theta = bt.tied("theta", bt.Tie.chain(6), sigma, dist.Normal(0.3, 1.0), form="copies")
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("row", 6):
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def saturated_marginal(h, sigma):
    """Log joint of h (n,) and the data: y is Gaussian given the noise, in float64 by hand."""
    edges = torch.diff(torch.eye(6, dtype=torch.float64), dim=0)
    precision = torch.eye(6, dtype=torch.float64) + edges.mT @ edges / sigma**2
    mean = torch.linalg.solve(precision, torch.full((6,), 0.3, dtype=torch.float64))
    covariance = torch.linalg.inv(precision) + (2.0 * h).exp().view(-1, 1, 1) * torch.eye(6)
    joint = dist.MultivariateNormal(mean, covariance).log_prob(SIX)
    return joint + dist.HalfNormal(1.0).log_prob(h.exp()) + h


def test_the_marginal_of_a_noise_that_can_vanish_keeps_its_digits():
    """Far out on the proposal's grid the precision is 1e20: rounding of squares would outweigh the data."""
    program = LaneProgram(saturated, (SIX,), {}, {"sigma": torch.tensor([0.5, 1.5], dtype=torch.float64)})
    density = build_density(program)
    assert isinstance(density, AffineDensity) and density.noise_axes is not None
    h = torch.linspace(-30.0, 2.5, 261, dtype=torch.float64)
    found = density.noise_axes.marginal(h.expand(2, -1))
    for row, sigma in zip(found, (0.5, 1.5), strict=True):
        expected = saturated_marginal(h, sigma)
        # The squares' own rounding, times the precision, may lower it; nothing raises it.
        rounding = 4.0 * torch.finfo(h.dtype).eps * float(SIX.square().sum()) * (-2.0 * h).exp()
        gap = row - row[-1] - expected + expected[-1]
        assert bool((gap < 1e-6).all())
        assert bool((-gap <= rounding + 1e-8 * (1.0 + float(expected.abs().max())))[h > -14].all())


def test_residuals_that_can_all_vanish_do_no_harm():
    tree = bt.sweep(saturated, SIX, over={"sigma": [0.5, 1.5]}, seed=1, num_draws=2500, engine="laplace")
    assert bool(tree.sweep.certified.all()), tree.sweep.reason.values
    h = torch.linspace(-12.0, 2.5, 4001, dtype=torch.float64)
    for sigma in (0.5, 1.5):
        weight = saturated_marginal(h, sigma).softmax(0)
        expected = float((weight * h.exp()).sum())
        draws = tree.posterior["noise"].sel(sigma=sigma).values
        ess = min(float(tree.sweep.ess_weights.sel(sigma=sigma)), draws.size)
        assert abs(draws.mean() - expected) < 4 * draws.std() * np.sqrt(1 / ess + 1 / draws.size)


def test_two_modes_of_the_noise_are_seen():
    """The prior says a little noise or much: the data sit between."""

    class Either(dist.Normal):
        """Half N(-loc, scale), half N(loc, scale)."""

        def log_prob(self, value):
            both = [dist.Normal(sign * self.loc, self.scale).log_prob(value) for sign in (-1.0, 1.0)]
            return torch.logaddexp(*both) - np.log(2.0)

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        log_noise = pyro.sample("log_noise", Either(1.5, 0.15))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, log_noise.exp()), obs=y)

    tree = bt.fit(model, torch.tensor([-1.2, 0.1, 1.1]), engine="laplace", seed=0)
    assert not tree.sweep.certified.item()
    assert "more than one mode" in tree.sweep.reason.item()


def test_nuts_in_the_axes_has_the_moments_of_independent_draws():
    over = {"sigma": [0.3, 2.0]}
    chains = bt.sweep(plain, Y, over=over, engine="nuts", seed=1)
    drawn = bt.sweep(plain, Y, over=over, engine="laplace", seed=2, num_draws=4000)
    assert bool(chains.sweep.certified.all()) and bool(drawn.sweep.certified.all())
    for sigma in over["sigma"]:
        mine, theirs = (moments.Sample.of(tree, ["theta", "noise"], sigma=sigma) for tree in (chains, drawn))
        for (a, a_error), (b, b_error) in ((mine.mean, theirs.mean), (mine.sd, theirs.sd)):
            z = np.abs(a - b) / np.hypot(a_error, b_error)
            assert z.max() < moments.limit(4 * len(z))


def test_evidence_and_moments_are_those_of_quadrature():
    y = Y[:6]

    def model(y):
        mean = pyro.sample("mean", dist.Normal(2.0, 3.0))
        noise = pyro.sample("noise", dist.HalfNormal(2.0))
        with pyro.plate("row", 6):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    noise, mean = (torch.linspace(*ends, 1501, dtype=torch.float64) for ends in ((0.02, 10.0), (-8.0, 14.0)))
    joint = dist.HalfNormal(2.0).log_prob(noise).unsqueeze(1) + dist.Normal(2.0, 3.0).log_prob(mean)
    joint = joint + dist.Normal(mean, noise.unsqueeze(1)).log_prob(y.view(-1, 1, 1)).sum(0)

    def integral(weight):
        inner = integrate.simpson((joint.exp() * weight).numpy(), x=mean.numpy())
        return integrate.simpson(inner, x=noise.numpy())

    tree = bt.fit(model, y, seed=1, num_draws=2500)
    evidence = integral(1.0)
    assert tree.sweep.certified.item() and tree.sweep.engine.item() == "laplace"
    assert tree.sweep.log_evidence.item() == pytest.approx(np.log(evidence), abs=1e-3)
    for name, weight in (("noise", noise.unsqueeze(1)), ("mean", mean)):
        draws = tree.posterior[name].values
        expected = integral(weight) / evidence
        assert abs(draws.mean() - expected) < 4 * draws.std() / np.sqrt(draws.size)
