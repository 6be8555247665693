"""The map along axes: its derivatives, where it is used, and what it spares a chain."""

import pyro
import pyro.distributions as dist
import torch
from moments import Exact

from bayestie._engines._axis_map import axis_map
from bayestie._sweep import run_engine


def counts():
    """Few events: log rates are skew, the Gaussian at the mode is poor."""
    with pyro.plate("place", 4):
        log_rate = pyro.sample("log_rate", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=torch.tensor([0.0, 0.0, 1.0, 2.0]))


def level():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(0.3))


def test_derivatives_are_those_of_the_map():
    exact = Exact.of(counts)
    found = axis_map(exact.task, exact.fit)
    assert found is not None
    # Inside, in the middle of cells (the third derivative jumps at knots), and on the straight lines beyond.
    z = torch.tensor([-7.1, -3.03, -0.1, 0.4, 2.2, 5.9, 8.0], dtype=torch.float64)
    z = z.view(1, -1, 1).expand(1, -1, 4)
    step = 1e-5
    value, slope, bend = found(z)
    above, below = found(z + step), found(z - step)
    assert torch.allclose(slope, (above[0] - below[0]) / (2 * step), rtol=1e-7)
    assert torch.allclose(bend, (above[1] - below[1]) / (2 * step), rtol=1e-6, atol=1e-9)
    assert bool((slope > 0).all())
    assert bool((value.diff(dim=1) > 0).all())


def test_the_posterior_is_nearly_normal_in_its_coordinates():
    """Independent latents: along every axis the map is the quantile function itself."""
    exact = Exact.of(counts)
    found = axis_map(exact.task, exact.fit)
    assert found is not None
    task, fit = exact.task, exact.fit
    factor = task.density.axes(fit.points, fit.factor)
    z = task.normals((1, 200, 4), 7)
    t, slope, _ = found(z)
    position = fit.mode.unsqueeze(1) + torch.bmm(t, factor.mT)
    ratio = task.density.value(fit.points, position) + slope.log().sum(-1) + 0.5 * z.square().sum(-1)
    plain = task.density.value(fit.points, fit.to_position(z)) + 0.5 * z.square().sum(-1)
    assert float(ratio.std()) < 0.05
    assert float(plain.std()) > 10 * float(ratio.std())


def test_a_gaussian_posterior_needs_none():
    exact = Exact.of(level)
    assert axis_map(exact.task, exact.fit) is None


def test_nuts_in_its_coordinates_takes_shallow_trees_and_meets_no_divergence():
    exact = Exact.of(counts)
    draws = run_engine("nuts", exact.sized(num_chains=4, num_draws=250, target_ess=400))[0]
    assert draws.certified == [True], draws.reason
    assert float(draws.stats["n_steps"].double().mean()) < 4.0
    # Against quadrature of the one-dimensional posteriors.
    grid = torch.linspace(-25.0, 8.0, 20001, dtype=torch.float64)
    for place, y in enumerate([0.0, 0.0, 1.0, 2.0]):
        weight = torch.softmax(-0.5 * (grid / 3.0).square() + y * grid - grid.exp(), 0)
        mean = float((weight * grid).sum())
        sd = float((weight * (grid - mean).square()).sum().sqrt())
        drawn = draws.position[0, ..., place].reshape(-1)
        assert abs(float(drawn.mean()) - mean) < 4 * sd / 400**0.5
