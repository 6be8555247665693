"""What pools of importance draws take on trust, and how their draws are made."""

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from zoo import numbers

import bayestie as bt
from bayestie._build_density import build_density
from bayestie._engines import Task, _by_points
from bayestie._engines._conditional import ConditionalProposal, conditional_proposal
from bayestie._engines._importance import ImportancePool
from bayestie._engines._laplace_fit import MANY_LATENTS, _approached
from bayestie._program import LaneProgram


def noisy(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.chain(6), sigma, dist.Normal(0.3, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("row", 6):
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def task_of(model, *args: Any, strengths=(0.3, 1.5)) -> Task:
    program = LaneProgram(model, args, {}, {"sigma": torch.tensor(strengths, dtype=torch.float64)})
    return Task(program, build_density(program), len(strengths), 4, 50, 100.0, 0, lambda event: None)


@pytest.fixture
def task() -> Task:
    return task_of(noisy, numbers(6, seed=11))


def proposal_of(task: Task) -> ConditionalProposal:
    found = conditional_proposal(task, task.points)
    assert found is not None
    return found


@pytest.mark.parametrize("wrong", [0.0, 1e-6])
def test_a_proposal_s_own_reckoning_is_taken_only_where_it_is_the_model_s(task, wrong):
    proposal = proposal_of(task)
    proposal = replace(proposal, top=proposal.top + torch.tensor([0.0, wrong]))
    pool = ImportancePool(task, task.points, [None, None], stream=103)
    calls: list[int] = []
    value = task.density.value

    def counted(points: Tensor, position: Tensor) -> Tensor:
        calls.append(position.shape[1])
        return value(points, position)

    task.density.value = counted  # type: ignore[method-assign]
    pool.grow(proposal, task.points, 200)
    assert calls == ([8] if wrong == 0.0 else [8, 200])
    for point in range(2):
        expected = value(task.points[point : point + 1], pool.position[point].unsqueeze(0)).squeeze(0)
        torch.testing.assert_close(pool.value[point], expected, rtol=1e-10, atol=1e-10)


def test_draws_do_not_depend_on_how_many_are_made_at_once(task, monkeypatch):
    proposal, noise = proposal_of(task), numbers(2, 50, task.density.num_latent, seed=5)
    expected = proposal.propose(noise)
    monkeypatch.setattr(_by_points, "_TOGETHER", 7 * 6)  # six draws of one point
    found = proposal.propose(noise)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(proposal.log_density(found[0]), found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_few_draws_will_do_for_the_evidence_where_they_weigh_the_same(task, spread):
    class Tilted:
        """The exact proposal, its density of the second point wrong by a function of a coordinate."""

        def __init__(self, inner: ConditionalProposal, tilt: Tensor):
            self.inner, self.tilt, self.num_noise = inner, tilt, inner.num_noise

        def take(self, index: Tensor) -> "Tilted":
            return Tilted(self.inner.take(index), self.tilt[index])

        def propose(self, noise: Tensor) -> tuple[Tensor, ...]:
            position, log_density, value = self.inner.propose(noise)
            return position, log_density + self.tilt.unsqueeze(1) * torch.tanh(noise[..., 1]), value

    proposal = Tilted(proposal_of(task), torch.tensor([0.0, spread], dtype=torch.float64))
    whole, few = (ImportancePool(task, task.points, [None, None], stream=103) for _ in range(2))
    whole.fill(proposal, 1.0, 1)
    few.fill(proposal, 1.0, 1, 32)
    assert whole.size.tolist() == [200, 200]
    assert few.size.tolist() == [32, 32 if spread == 0.0 else 200]
    drawn = [pool.draws("laplace", 0.0, 1.0) for pool in (whole, few)]
    assert drawn[0].position.shape == drawn[1].position.shape
    apart = (drawn[0].log_evidence - drawn[1].log_evidence).abs()
    assert float(apart[0]) < 1e-4
    first = few.first()
    assert {x.shape for x in first.values()} == {(2, 200)}


def test_streams_drawn_together_are_the_streams(task):
    keys = [(3, 1), (3, 2), (9, 1)]
    together = task.normals_of((4, 5), keys)
    assert torch.equal(together, torch.stack([task.normals((4, 5), *key) for key in keys]))


def skew(y, *, sigma):
    with pyro.plate("unit", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(x + 0.1 * sigma * x.tanh(), 0.1), obs=y)


@pytest.mark.parametrize("dim", [MANY_LATENTS + 1, 5])
def test_modes_of_many_latents_are_approached(dim):
    task = task_of(skew, 3.0 * numbers(dim, seed=3))
    start = torch.zeros(2, dim).double()
    found = _approached(task, task.points, start)
    if dim == 5:
        assert found is start
        return
    _, before = task.density.value_and_grad(task.points, start.unsqueeze(1))
    _, after = task.density.value_and_grad(task.points, found.unsqueeze(1))
    assert float(after.abs().amax()) < 1e-4 * float(before.abs().amax())
