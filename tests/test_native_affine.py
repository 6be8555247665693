"""Compiled ticks of generalised linear models against torch's, and the arithmetic they are made of."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from zoo import numbers

import bayestie as bt
from bayestie._build_density import build_density
from bayestie._engines import Task, _affine_kernels
from bayestie._engines._axis_map import REACH, AxisMap
from bayestie._engines._lanes import Coordinates, Lanes, StepSize
from bayestie._engines._laplace_fit import fit_laplace
from bayestie._engines._native_affine import sparse_rows
from bayestie._engines._nuts import _coordinates
from bayestie._engines._trajectories import STATISTICS
from bayestie._program import LaneProgram

GROUP = torch.arange(30) % 5


def line(sigma, scaled=1.0):
    theta = bt.tied("theta", bt.Tie.exchangeable(5), sigma, dist.Normal(0.3, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
    return scaled * theta[GROUP] + slope * torch.linspace(-1.0, 1.0, 30).double() + 0.1


def logistic(y, *, sigma):
    eta = line(sigma)
    with pyro.plate("row", 30):
        pyro.sample("y", dist.Bernoulli(logits=eta), obs=(y > 0).double())


def binomial(y, *, sigma):
    eta, count = line(sigma), torch.arange(30.0).double() % 4 + 1
    with pyro.plate("row", 30):
        pyro.sample("y", dist.Binomial(count, logits=eta), obs=(y > 0).double())


def scaled_poisson(y, *, sigma):
    eta = line(sigma, 0.5)
    with pyro.plate("row", 30), pyro.poutine.scale(scale=1.7):
        pyro.sample("y", dist.Poisson(eta.exp()), obs=y.abs().round())


def three_kinds(y, *, sigma):
    eta = line(sigma)
    with pyro.plate("row", 30):
        pyro.sample("y", dist.Normal(eta, 0.7), obs=y)
        pyro.sample("above", dist.Bernoulli(logits=2.0 * eta), obs=(y > 0).double())
        pyro.sample("many", dist.Poisson((0.5 * eta).exp()), obs=y.abs().round())


def gaussian(y, *, sigma):
    eta = line(sigma)
    with pyro.plate("row", 30):
        pyro.sample("y", dist.Normal(eta, 0.7), obs=y)


MODELS = (logistic, binomial, scaled_poisson, three_kinds, gaussian)


def coordinates(model, strengths=(0.0, 0.4, 1.5)) -> Coordinates:
    swept = {"sigma": torch.tensor(strengths, dtype=torch.float64)}
    program = LaneProgram(model, (1.5 * numbers(30, seed=11),), {}, swept)
    task = Task(program, build_density(program), len(strengths), 4, 50, 100.0, 0, lambda event: None)
    at = _coordinates(task, fit_laplace(task, task.points))
    assert isinstance(at, Coordinates) and at.native is not None
    return at


def bent(at: Coordinates) -> AxisMap:
    """A map that is no straight line, T x = x + sin(x) / 4 about every knot's neighbourhood."""
    knots = torch.linspace(-REACH, REACH, 49, dtype=torch.float64)
    left, width = knots[:-1], float(knots[1] - knots[0])
    value, slope = left + 0.25 * left.sin(), 1.0 + 0.25 * left.cos()
    cells = torch.stack([-slope * 0.01 / width**2, 0.02 * slope / width, slope, value], 1)
    return AxisMap(cells.expand(*at.scale.shape, -1, -1).contiguous())


@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_the_compiled_density_is_that_of_torch(model, with_map):
    at = coordinates(model)
    scale = 0.5 + numbers(*at.scale.shape, seed=5).abs()
    at = replace(at, scale=scale, map=bent(at) if with_map else None)
    # As far out as trajectories go astray, and no multiple of what is done side by side.
    z = torch.cat(
        [1.5 * numbers(3, 6, at.scale.shape[1], seed=2), 9.0 * numbers(3, 5, at.scale.shape[1], seed=3)], 1
    )
    value, own, grad = at.evaluate(z)
    assert at.native is not None
    found = _affine_kernels.affine_density(z.numpy(), at.native.density(at.scale, at.map))
    for ours, theirs in zip(found, (value, own, grad), strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("model", [logistic, three_kinds])
def test_some_of_the_points_are_the_same_points(model):
    at, index = coordinates(model), torch.tensor([2, 0])
    some = at.take(index)
    z = numbers(2, 3, at.scale.shape[1], seed=2)
    whole = torch.zeros(3, 3, z.shape[2]).double()
    whole[index] = z
    assert at.native is not None and some.native is not None
    expected = _affine_kernels.affine_density(whole.numpy(), at.native.density(at.scale, None))
    found = _affine_kernels.affine_density(z.numpy(), some.native.density(some.scale, None))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs[index.numpy()])


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("model", [binomial, three_kinds])
def test_whole_ticks_are_those_of_torch(model, adapt):
    at = coordinates(model, (0.3, 1.5))
    found = []
    for here in (at, replace(at, rows=None, native=None)):
        # Long steps: trajectories are short, and momenta run out within a block.
        step = StepSize(torch.tensor([1.6, 0.9], dtype=torch.float64))
        z = 0.5 * numbers(2, 11, at.scale.shape[1], seed=4)  # more chains than go side by side
        longer = torch.linspace(0.5, 1.5, 11).double()
        lanes = Lanes(here, z, torch.arange(2), 3, lambda done: None, longer)
        found.append((lanes.run(60, step, adapt), lanes, step))
    (one, ours, our_step), (other, theirs, their_step) = found
    # Orders of summation differ with the processor, and trajectories amplify.
    torch.testing.assert_close(one.z, other.z, rtol=1e-5, atol=1e-5)
    for name in STATISTICS:
        torch.testing.assert_close(one.stats[name], other.stats[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_step.log_step, their_step.log_step, rtol=1e-6, atol=1e-7)
    assert bool((one.stats["n_steps"] == 1).any()) and len(one.stats["n_steps"].unique()) > 2
    assert ours.useful == ours.leapfrogs == int(one.stats["n_steps"].sum())
    assert theirs.leapfrogs > ours.leapfrogs


def test_a_step_that_overflows_ends_its_own_trajectory_alone():
    at = coordinates(scaled_poisson, (1.5,))
    z = 0.5 * numbers(1, 6, at.scale.shape[1], seed=4)
    draws = []
    for far in (1.0, 1e4):  # times the step of the last chain
        longer = torch.tensor([1.0] * 5 + [far], dtype=torch.float64)
        lanes = Lanes(at, z, torch.tensor([0]), 3, lambda done: None, longer)
        draws.append(lanes.run(30, StepSize(torch.tensor([0.5], dtype=torch.float64)), False))
    one, other = draws
    assert torch.equal(one.z[:, :5], other.z[:, :5])
    assert bool((other.stats["diverging"][:, 5] == 1).all()) and bool(other.z.isfinite().all())
    assert torch.equal(other.z[0, 5], z[0, 5].expand(30, -1))


def student(y, *, sigma):
    eta = line(sigma)
    with pyro.plate("row", 30):
        pyro.sample("y", dist.StudentT(4.0, eta, 1.0), obs=y)


def test_other_likelihoods_are_left_to_torch():
    program = LaneProgram(student, (numbers(30, seed=1),), {}, {"sigma": torch.tensor([0.5]).double()})
    assert sparse_rows(build_density(program)) is None


def test_the_vectorised_exponential_is_the_exponential():
    x = np.concatenate([np.linspace(-707.9, 708.9, 20_001), np.linspace(-1.0, 1.0, 20_001), [0.0, -1e-300]])
    out = np.empty_like(x)
    _affine_kernels.exponential(x, out)
    assert np.abs(out / np.exp(x) - 1.0).max() <= 2.0**-51
    beyond = np.array([-np.inf, -1e5, 1e5, np.inf])
    _affine_kernels.exponential(beyond, out[:4])
    assert out[0] == out[1] == pytest.approx(math.exp(-708.0), rel=1e-15)
    assert out[2] == out[3] == pytest.approx(math.exp(709.0), rel=1e-15)


def mean_of(tree, name: str) -> Tensor:
    return torch.as_tensor(tree["posterior"][name].mean(("chain", "draw")).values)


def test_nuts_agrees_with_laplace():
    y = 1.5 * numbers(30, seed=11)
    over = {"sigma": [0.4, 1.5]}
    nuts = bt.sweep(logistic, y, over=over, engine="nuts", num_draws=1000)
    laplace = bt.sweep(logistic, y, over=over, engine="laplace", num_draws=1000)
    assert bool(nuts["sweep"]["certified"].all()) and bool(laplace["sweep"]["certified"].all())
    sd = torch.as_tensor(laplace["posterior"]["theta"].std(("chain", "draw")).values)
    # 2,000 effective draws on either side at least, 5 errors
    assert float(((mean_of(nuts, "theta") - mean_of(laplace, "theta")) / sd).abs().max()) < 5.0 * math.sqrt(
        2 / 2000
    )
