"""Coordinates of copies whose strength is learned, by autograd; what they are for, by quadrature."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from zoo import numbers

import bayestie as bt
from bayestie._engines._centring import Centring, LearnedStrengths, centring, learned_strengths
from bayestie._program import LaneProgram

DIM = 5


@pytest.fixture
def some() -> Centring:
    """Latent 0 is the strength of latents 1 and 2, latent 4 that of 3; two points."""
    by = torch.tensor([0, 0, 0, 4, 0])
    power = torch.tensor([[0.0, 1.0, 0.3, -2.0, 0.0], [0.0, 0.0, 0.9, 1.0, 0.0]]).double()
    return Centring(by, power, numbers(2, DIM, seed=1)[:, by])


def test_latents_come_back(some):
    c = numbers(2, 3, DIM, seed=2)
    u = some.to_latent(c)
    torch.testing.assert_close(some.from_latent(u), c, rtol=1e-13, atol=1e-13)
    assert torch.equal(u[..., [0, 4]], c[..., [0, 4]])
    expected = c[0, 1, 3] * math.exp(2.0 * float(c[0, 1, 4] - some.about[0, 3]))
    assert float(u[0, 1, 3]) == pytest.approx(expected)
    taken = some.take(torch.tensor([1]))
    assert torch.equal(taken.to_latent(c[1:]), u[1:])


def test_the_density_and_its_gradient_carry_the_volume(some):
    def log_density(u):
        return -0.5 * (u - 0.3).square().sum(-1) + torch.sin(u).prod(-1)

    c = numbers(2, 4, DIM, seed=3)
    leaf = some.to_latent(c).requires_grad_(True)
    (grad,) = torch.autograd.grad(log_density(leaf).sum(), leaf)
    found, found_grad = some.pull_back(c, log_density(leaf).detach(), grad)
    for i in range(2):
        for j in range(4):

            def whole(at, i=i):
                u = some.take(torch.tensor([i])).to_latent(at.view(1, 1, DIM))
                return log_density(u)[0, 0]

            def latent(at, i=i):
                return some.take(torch.tensor([i])).to_latent(at.view(1, 1, DIM))[0, 0]

            jacobian = torch.autograd.functional.jacobian(latent, c[i, j])
            expected = whole(c[i, j]) + torch.linalg.slogdet(jacobian).logabsdet
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-12)

            def with_volume(at, i=i):
                powers = some.power[i] * (at[some.by] - some.about[i])
                return whole(at, i) - powers.sum()

            expected_grad = torch.autograd.functional.jacobian(with_volume, c[i, j])
            torch.testing.assert_close(found_grad[i, j], expected_grad, rtol=1e-10, atol=1e-11)


def test_a_gaussian_is_turned_with_the_coordinates(some):
    mode, factor = numbers(2, DIM, seed=4), numbers(2, DIM, DIM, seed=5)
    centre, turned = some.straightened(mode, factor)
    for i in range(2):

        def straight(u, i=i):
            return some.take(torch.tensor([i])).from_latent(u.view(1, 1, DIM))[0, 0]

        torch.testing.assert_close(centre[i], straight(mode[i]))
        jacobian = torch.autograd.functional.jacobian(straight, mode[i])
        torch.testing.assert_close(turned[i], jacobian @ factor[i])


def strengths_of(model) -> tuple[LaneProgram, LearnedStrengths | None]:
    program = LaneProgram(model, (), {}, {"sigma": torch.tensor([0.5, 2.0]).double()})
    return program, learned_strengths(program)


def test_learned_strengths_are_found():
    def model(*, sigma):
        own = pyro.sample("own", dist.LogNormal(0.0, 0.5))
        one = bt.tied("one", bt.Tie.chain(4), sigma * own.square(), dist.Normal(0.0, 1.0))
        two = bt.tied("two", bt.Tie.exchangeable(3), sigma, dist.Normal(0.0, 1.0))
        wide = pyro.sample("wide", dist.HalfCauchy(1.0))
        three = bt.tied("three", bt.Tie.exchangeable(2), wide, dist.Normal(0.0, 1.0), event_shape=(2,))
        pyro.sample("y", dist.Normal(one.sum() + two.sum() + three.sum(), 1.0), obs=torch.tensor(0.3))

    program, found = strengths_of(model)
    assert found is not None
    expected = torch.zeros(program.num_latent).double()
    expected[program.latent["one_z"].slice] = 2.0
    expected[program.latent["three_z"].slice] = 1.0
    torch.testing.assert_close(found.rate, expected, rtol=1e-9, atol=0.0)
    for name, strength in (("one_z", "own"), ("three_z", "wide")):
        assert set(found.by[program.latent[name].slice].tolist()) == {program.latent[strength].start}


@pytest.mark.parametrize("kind", ["fixed", "product", "sum", "form"])
def test_other_strengths_are_left_alone(kind):
    def model(*, sigma):
        a, b = (pyro.sample(name, dist.LogNormal(0.0, 0.5)) for name in "ab")
        strength = {"fixed": sigma, "product": a * b, "sum": a + sigma, "form": a}[kind]
        form = "matched" if kind == "form" else "level"
        theta = bt.tied("theta", bt.Tie.chain(4), strength, dist.Normal(0.0, 1.0), form=form)
        pyro.sample("y", dist.Normal(theta.sum() + a + b, 1.0), obs=torch.tensor(0.3))

    assert strengths_of(model)[1] is None


def test_the_power_is_what_the_data_know():
    strengths = LearnedStrengths(
        torch.tensor([0, 0, 0, 0, 0]), torch.tensor([0.0, 1.0, 1.0, 2.0, 0.0]).double()
    )
    precision = torch.tensor([[9.0, 1.0, 4.0, 2.0, 50.0]]).double()
    found = centring(strengths, torch.full((1, DIM), 0.7).double(), precision)
    assert found is not None
    torch.testing.assert_close(found.power, torch.tensor([[0.0, 0.0, 0.75, 1.0, 0.0]]).double())
    # Where data know next to nothing nothing is gained, whatever they know of what is no copy.
    assert centring(strengths, torch.zeros(1, DIM).double(), precision.clamp(max=1.1)) is None


COPIES, EACH, NOISE = 10, 6, 0.017


def held(y):
    """Copies that data hold to 0.007, with an unknown strength."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    theta = bt.tied("theta", bt.Tie.exchangeable(COPIES), sigma, dist.Normal(0.3, 1.0))
    with pyro.plate("copy", COPIES, dim=-1), pyro.plate("each", EACH, dim=-2):
        pyro.sample("y", dist.Normal(theta, NOISE), obs=y)


def log_sigma_moments(y: torch.Tensor) -> tuple[float, float]:
    """Mean and sd of log sigma, by quadrature: means are N(level, sigma^2 + noise^2 / n), level N(0.3, 1)."""
    mean = y.mean(0).numpy()
    h = np.linspace(-6.0, 4.0, 8001)
    own = np.exp(2 * h) + NOISE**2 / EACH
    middle, spread = mean.mean(), ((mean - mean.mean()) ** 2).sum()
    of_level = 1.0 + own / COPIES
    log = -0.5 * (COPIES - 1) * np.log(own) - 0.5 * spread / own - 0.5 * np.log(of_level)
    log += -0.5 * (middle - 0.3) ** 2 / of_level - 0.5 * np.exp(2 * h) + h
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    first = (weight * h).sum()
    return float(first), float(np.sqrt((weight * (h - first) ** 2).sum()))


def test_copies_that_data_hold_are_walked_with_their_strength_unknown():
    y = 0.3 + 0.4 * numbers(COPIES, seed=7) + NOISE * numbers(EACH, COPIES, seed=8)
    tree: Any = bt.fit(held, y, engine="nuts", num_draws=500)
    assert bool(tree.sweep.certified), str(tree.sweep.reason.values)
    # 40 and more where z is walked itself.
    assert float(tree.sample_stats.n_steps.mean()) < 16
    h = np.log(tree.posterior.sigma.values)
    mean, sd = log_sigma_moments(y)
    effective = float(tree.sweep.min_ess_bulk)
    assert abs(h.mean() - mean) < 4.0 * sd / math.sqrt(effective)
    assert abs(h.std() / sd - 1.0) < 4.0 * math.sqrt(1.0 / effective)
