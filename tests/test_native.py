"""Compiled trajectories against the same state machine in torch, tabulated priors against the function."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from zoo import numbers

import bayestie as bt
from bayestie._build_density import build_density
from bayestie._engines import Task
from bayestie._engines._lanes import MOMENTA, Lanes, StepSize
from bayestie._engines._laplace_fit import fit_laplace
from bayestie._engines._native import NativeTrajectories
from bayestie._engines._noise_coordinates import NoiseCoordinates, noise_coordinates
from bayestie._engines._prior_table import PriorTable
from bayestie._engines._trajectories import MAX_DEPTH, STATISTICS, Trajectories
from bayestie._latent_scale import value_and_slope
from bayestie._program import LaneProgram

LANES, DIM = 12, 5


def normal(z: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * z.square().sum(1), -z


def funnel(z: Tensor) -> tuple[Tensor, Tensor]:
    """Its neck makes trajectories diverge, its mouth makes them deep."""
    v, x = 2.0 * z[:, :1], z[:, 1:]
    precision = torch.exp(-v)
    value = -0.5 * (v.square().sum(1) / 4.0 + precision.squeeze(1) * x.square().sum(1) + v.squeeze(1) * 4)
    by_v = -v / 4.0 + 0.5 * precision * x.square().sum(1, keepdim=True) - 2.0
    return value, torch.cat([2.0 * by_v, -precision * x], 1)


def cliff(z: Tensor) -> tuple[Tensor, Tensor]:
    """No density, and no gradient, beyond 1."""
    value, grad = normal(z)
    gone = z[:, 0] > 1.0
    return torch.where(gone, torch.nan, value), torch.where(gone.unsqueeze(1), torch.nan, grad)


@pytest.mark.parametrize(("target", "step"), [(normal, 0.3), (funnel, 1.2), (cliff, 0.5)])
@pytest.mark.parametrize("max_depth", [2, MAX_DEPTH])
def test_compiled_trajectories_are_those_of_torch(target, step, max_depth):
    def leaf(z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = target(z)
        return torch.stack([value + 1.0, value], 1), grad

    z = 0.3 * numbers(LANES, DIM, seed=1)
    both = [kind(z.clone(), *leaf(z), max_depth) for kind in (Trajectories, NativeTrajectories)]
    lane, draws = torch.arange(LANES), 6
    kept = [(torch.zeros(LANES, dtype=torch.long), torch.zeros(LANES, draws + 1, DIM).double()) for _ in both]
    rows = [torch.zeros(LANES, draws + 1, len(STATISTICS)).double() for _ in both]
    steps = torch.full((LANES,), step, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for state in both:
        state.start(lane, numbers(LANES, DIM, seed=2), torch.linspace(0.0, 1.0, LANES).double(), steps)
    for tick in range(400):
        uniforms = torch.rand(LANES, 4, generator=generator, dtype=torch.float64)
        momentum = torch.randn(LANES, DIM, generator=generator, dtype=torch.float64)
        ended = []
        for state, (count, positions), row in zip(both, kept, rows, strict=True):
            position, half = state.propose()
            ended.append(state.advance(position, half, *leaf(position), uniforms))
            state.record(ended[-1], lane, count, positions, row)
            state.start(ended[-1], momentum[ended[-1]], uniforms[:, 0], steps)
        assert torch.equal(*ended), tick
        if tick == 200:
            for state in both:
                state.keep(torch.arange(0, LANES, 2))
                steps = steps[: LANES // 2]
            lane, kept = lane[::2], [(count[::2].clone(), positions) for count, positions in kept]
            break
    (first, at), (second, beside) = kept
    assert torch.equal(first, second) and int(first.min()) >= 2
    stored = rows[0][:, :draws], rows[1][:, :draws]
    torch.testing.assert_close(at[:, :draws], beside[:, :draws], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*stored, rtol=1e-9, atol=1e-9, equal_nan=True)
    for name in ("last", "drawn", "sums", "numbers"):
        one, other = (getattr(state, name) for state in both)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)
    if target is not normal:
        assert bool((stored[0][..., STATISTICS.index("diverging")] > 0).any())


def test_a_lane_that_starts_often_leaves_the_momenta_of_others_alone():
    def generator(*key: int) -> np.random.Generator:
        return np.random.default_rng(key)

    coordinates: Any = SimpleNamespace(task=SimpleNamespace(generator=generator), points=torch.tensor([7]))
    one, other, drawn = torch.tensor([0]), torch.tensor([1]), []
    for often in (True, False):
        lanes = Lanes(coordinates, torch.zeros(1, 2, DIM).double(), torch.tensor([0]), 1, lambda done: None)
        momenta, own = lanes._momenta(), []
        for tick in range(32):
            lanes.ticks += 1
            if often:  # runs out first
                momenta.take(one)
            if tick % 2:
                own.append(momenta.take(other)[0])
        drawn.append(torch.stack(own))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique(dim=0)) == 16


def noisy(y, prior, *, sigma):
    theta = bt.tied("theta", bt.Tie.chain(6), sigma, dist.Normal(0.3, 1.0))
    noise = pyro.sample("noise", prior)
    with pyro.plate("row", 6):
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize("adapt", [False, True])
def test_whole_ticks_are_those_of_torch(tabulated, adapt):
    strengths = torch.tensor([0.3, 1.5], dtype=torch.float64)
    data = (numbers(6, seed=11), dist.HalfNormal(1.0))
    program = LaneProgram(noisy, data, {}, {"sigma": strengths})
    task = Task(program, build_density(program), 2, 4, 50, 100.0, 0, lambda event: None)
    compiled = noise_coordinates(task, fit_laplace(task, task.points))
    assert compiled is not None and compiled.prior is not None and compiled.prior.is_good
    compiled.prior.is_good = tabulated
    found = []
    for at in (compiled, replace(compiled, prior=None)):
        # Long steps: trajectories are short, and momenta run out within a block.
        step = StepSize(torch.tensor([1.6, 0.9], dtype=torch.float64))
        z = 0.5 * numbers(2, 5, program.num_latent, seed=4)
        lanes = Lanes(at, z, torch.arange(2), 3, lambda done: None, torch.linspace(0.5, 1.5, 5).double())
        result = lanes.run(60, step, adapt)
        found.append((result, lanes, step))
    (one, ours, our_step), (other, theirs, their_step) = found
    # Orders of summation differ with the processor, and trajectories amplify; another decision anywhere, and
    # the chains have nothing in common.
    torch.testing.assert_close(one.z, other.z, rtol=1e-5, atol=1e-5)
    for name in STATISTICS:
        torch.testing.assert_close(one.stats[name], other.stats[name], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(our_step.log_step, their_step.log_step, rtol=1e-6, atol=1e-7)
    assert bool((one.stats["n_steps"] == 1).any()) and len(one.stats["n_steps"].unique()) > 3
    # A lane that has its draws stands still: nothing is taken in vain.
    assert ours.useful == ours.leapfrogs == int(one.stats["n_steps"].sum())
    assert theirs.leapfrogs > ours.leapfrogs


def test_momenta_that_run_out_within_whole_ticks_are_found():
    strengths = torch.tensor([1.0], dtype=torch.float64)
    program = LaneProgram(noisy, (numbers(6, seed=11), dist.HalfNormal(1.0)), {}, {"sigma": strengths})
    task = Task(program, build_density(program), 1, 4, 50, 100.0, 0, lambda event: None)
    at = noise_coordinates(task, fit_laplace(task, task.points))
    assert isinstance(at, NoiseCoordinates)
    lanes = Lanes(at, torch.zeros(1, 3, program.num_latent).double(), torch.tensor([0]), 1, lambda done: None)
    # A step of 100 diverges at once: a trajectory for every tick.
    result = lanes.run(40, StepSize(torch.tensor([100.0], dtype=torch.float64)), False)
    assert bool((result.stats["n_steps"] == 1).all()) and MOMENTA < 40


def test_a_tabulated_prior_is_the_function():
    def smooth(h: Tensor) -> Tensor:
        return -0.5 * (2.0 * h).exp() + h - torch.log1p((0.3 * h).square())

    table = PriorTable(smooth, -12.0, 6.0)
    assert table.is_good
    h = torch.linspace(-11.99, 5.99, 7000, dtype=torch.float64).reshape(7, -1)
    for found, expected in zip(table(h), value_and_slope(smooth, h), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    beyond = torch.tensor([[-13.0, 0.0], [7.0, 1.0]], dtype=torch.float64)
    for found, expected in zip(table(beyond), value_and_slope(smooth, beyond), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bound", [0.1, math.pi / 3])
def test_a_prior_with_an_edge_is_not_tabulated(bound):
    def edged(h: Tensor) -> Tensor:
        return torch.where(h < bound, -h.square(), -torch.inf)

    table = PriorTable(edged, -4.0, 4.0)
    assert not table.is_good
    h = torch.tensor([[bound - 1e-6, bound + 1e-6]], dtype=torch.float64)
    assert torch.equal(table(h)[0], edged(h))


def test_a_prior_with_a_kink_is_not_tabulated():
    table = PriorTable(lambda h: -(h - 0.1).abs(), -4.0, 4.0)
    assert not table.is_good
