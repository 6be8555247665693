"""Pyro's own NUTS and SVI as references: agreement, densities of guides, and nothing left behind."""

import random
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints

from bayestie._build_density import build_density
from bayestie._diagnostics import convergence
from bayestie._engines import Interrupted, Task, run_nuts
from bayestie._engines._pyro import _guide_draws, _unconstrained, run_pyro_nuts, run_pyro_svi
from bayestie._errors import OptionError
from bayestie._program import LaneProgram


def make_task(
    model: Any,
    *args: Any,
    sigma: Any = None,
    draws: int = 100,
    progress: Any = None,
    seed: int = 3,
    **options,
) -> Task:
    swept = {} if sigma is None else {"sigma": torch.as_tensor(sigma, dtype=torch.float64)}
    program = LaneProgram(model, args, {}, swept)
    return Task(
        program=program,
        density=build_density(program),
        num_points=1 if sigma is None else len(sigma),
        num_chains=2,
        num_draws=draws,
        target_ess=60,
        seed=seed,
        progress=progress or (lambda event: None),
        options=options,
    )


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate * share * torch.exp(0.3 * shift)), obs=y)


COUNTS = torch.tensor([1.0, 3.0, 0.0, 2.0])


def normal(*, sigma=1.0):
    pyro.sample("x", dist.Normal(2.0, sigma))


def simplex():
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    with pyro.plate("two", 2):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        # A support that depends on other sites.
        pyro.sample("inside", dist.Uniform(torch.zeros(2), scale + weights[0]))


def with_parameter():
    loc = pyro.param("loc", torch.tensor(0.5))
    pyro.sample("x", dist.Normal(loc, 1.0))


def world() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002 - the caller's legacy state is what must not move


def test_pyro_nuts_agrees_with_nuts():
    task = make_task(counts, COUNTS, draws=100, warmup=60)
    reference = run_pyro_nuts(task)
    ours = run_nuts(task)
    assert reference.engine == ["pyro_nuts"] and reference.position.shape == (1, 2, 100, 3)
    torch.testing.assert_close(
        reference.log_density,
        task.density.value(task.points, reference.position.flatten(1, 2)).reshape(1, 2, 100),
    )
    means, errors = [], []
    for draws in (reference, ours):
        position = draws.position[0]
        both = torch.cat([position, position.square()], -1)
        # The bulk ESS of ranks stands in for that of the values; half of it is on the safe side.
        ess = convergence(both)[1] / 2.0
        means.append(both.mean((0, 1)))
        errors.append(both.flatten(0, 1).std(0) / ess.sqrt())
    assert ((means[0] - means[1]).abs() < 4.0 * (errors[0] ** 2 + errors[1] ** 2).sqrt()).all()
    step, accept = reference.stats["step_size"], reference.stats["acceptance_rate"]
    assert (step > 0.05).all() and ((accept > 0.5) & (accept <= 1.0)).all()
    assert reference.stats["diverging"].sum() == reference.divergences[0]
    assert "R-hat" in reference.reason[0] and reference.khat.isinf().all()


def test_supports_that_depend_on_other_sites_are_taken_to_the_real_line():
    task = make_task(simplex)
    program, names = task.program, list(task.program.latent)
    position = task.normals((5, program.num_latent), 1)
    rows, inputs = [], program.point_inputs(torch.tensor(0))
    with program.quiet():
        for x in position:
            lane = program.run_lane(x, inputs)
            rows.append([lane.messages[name]["value"] for name in names])
            rows[-1].append(lane.log_jacobian)
    values = [torch.stack(column) for column in zip(*rows, strict=True)]
    found, log_jacobian = _unconstrained(program, 0, names, values[:-1])
    torch.testing.assert_close(found, position)
    torch.testing.assert_close(log_jacobian, values[-1])


@pytest.mark.parametrize("factory", [AutoNormal, AutoMultivariateNormal])
def test_guide_density_is_that_of_the_unconstrained_draws(factory):
    def model():
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))

    task = make_task(model, draws=10)
    with task.program.quiet():
        guide = factory(model, init_scale=0.7)
        guide()
        position, log_q, doubt = _guide_draws(task, 0, guide, {})
        if factory is AutoNormal:
            loc = torch.cat([guide.locs.rate.reshape(1), guide.locs.share])
            scale = torch.cat([guide.scales.rate.reshape(1), guide.scales.share])
            reference = dist.Normal(loc, scale).to_event(1).log_prob(position)
        else:
            reference = guide.get_posterior().log_prob(position)
    assert doubt is None and position.shape == (20, 3)
    torch.testing.assert_close(log_q, reference.detach())


def test_pyro_svi_certifies_a_guide_that_fits():
    task = make_task(normal, sigma=[0.5, 2.0], draws=200, guide="full_rank", num_steps=600)
    draws = run_pyro_svi(task)
    assert draws.certified == [True, True] and draws.engine == ["pyro_svi"] * 2
    flat = draws.position.flatten(1, 3)
    sd = torch.tensor([0.5, 2.0])
    root = (1.0 / 400 + 1.0 / draws.ess_weights.clamp(max=400)).rsqrt()
    assert ((flat.mean(1) - 2.0).abs() < 4.0 * sd / root).all()
    assert ((flat.std(1) / sd - 1.0).abs() < 4.0 / (root * 2**0.5)).all()
    assert (draws.log_evidence.abs() < 4.0 * draws.log_evidence_error + 0.01).all()


def own_site(model):
    def guide():
        extra = pyro.sample("extra", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(extra, 1.0))

    return guide


@pytest.mark.parametrize(
    ("guide", "why"), [(AutoDelta, "point mass"), (own_site, "random sites of its own (extra)")]
)
def test_guides_without_a_density_are_never_certified(guide, why):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found non-auxiliary vars in guide")  # Pyro sees the extra site too
        draws = run_pyro_svi(make_task(normal, draws=10, guide=guide, num_steps=3))
    assert draws.certified == [False] and draws.khat[0] == torch.inf
    assert draws.log_evidence.isnan().all() and why in draws.reason[0]


def test_guides_that_cannot_be_are_named():
    with pytest.raises(OptionError, match="guide: found 'planar', expected one of mean_field"):
        run_pyro_svi(make_task(normal, guide="planar", num_steps=2))
    with pytest.raises(OptionError, match=r"guide: found <function .* a factory guide\(model\)"):
        run_pyro_svi(make_task(normal, guide=lambda model: None, num_steps=2))
    with pytest.raises(OptionError, match="warmup"):
        run_pyro_nuts(make_task(normal, warmup=0))


def test_nothing_is_left_behind(capfd):
    events: list[dict[str, Any]] = []
    given = torch.tensor(0.5, dtype=torch.float64)
    pyro.get_param_store().setdefault("loc", given, constraints.real)
    raw = pyro.get_param_store().get_state()["params"]["loc"]
    task = make_task(with_parameter, draws=5, warmup=5, num_steps=5, progress=events.append)
    before = world()
    first = run_pyro_nuts(task)
    again = run_pyro_nuts(task)
    run_pyro_svi(task)
    assert world() == before
    store = pyro.get_param_store()
    assert list(store.keys()) == ["loc"] and float(store["loc"].detach()) == 0.5
    assert store.get_state()["params"]["loc"] is raw
    assert torch.equal(first.position, again.position)
    assert {e["stage"] for e in events} == {"pyro_nuts warmup", "pyro_nuts", "pyro_svi"}
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_an_interrupt_keeps_the_points_that_are_done():
    def progress(event: dict[str, Any]) -> None:
        if "point 2" in event["message"]:
            raise KeyboardInterrupt

    task = make_task(normal, sigma=[1.0, 2.0], draws=5, warmup=5, num_steps=3, progress=progress)
    for run in (run_pyro_nuts, run_pyro_svi):
        with pytest.raises(Interrupted) as caught:
            run(task)
        assert caught.value.draws.points.tolist() == [0]
