"""Minibatches of `svi`: gradients on given rows against Pyro's, fits against fits on all rows, refusals."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to

import bayestie as bt
from bayestie import _tiers
from bayestie._build_density import build_density
from bayestie._engines import Task, _svi, fit_laplace, run_pyro_nuts, run_pyro_svi, run_svi
from bayestie._engines._minibatch import MinibatchScore, draw_rows
from bayestie._lane import LaneInputs
from bayestie._program import LaneProgram
from bayestie._run_context import model_defaults
from bayestie._simulate import Simulator

NO_INPUTS = LaneInputs()
RNG = np.random.default_rng(12)
X: Any = torch.as_tensor(RNG.standard_normal((12, 3)))
Y: Any = torch.as_tensor(RNG.standard_normal(12))
TABLE: Any = torch.as_tensor(RNG.standard_normal((6, 12)))
GROUP = torch.as_tensor(RNG.integers(0, 4, 12))
MASK: Any = torch.as_tensor(RNG.random(12) < 0.7)


def grouped(*, batch):
    theta = bt.tied("theta", bt.Tie.complete(4), 0.7, dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", 12, subsample_size=batch.get("row")) as i:
        mean = pyro.deterministic("mean", theta[GROUP[i]] + X[i] @ beta)
        pyro.sample("y", dist.Normal(mean, noise), obs=Y[i])


def by_subsample(*, batch):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", 12, subsample_size=batch.get("row")):
        x: Any = pyro.subsample(X, event_dim=1)
        y: Any = pyro.subsample(Y, event_dim=0)
        pyro.sample("y", dist.StudentT(3.0, x @ beta, 1.0), obs=y)


def two_plates(*, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    row = pyro.plate("row", 12, subsample_size=batch.get("row"))
    with row as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[i])
    with pyro.plate("other", 6, subsample_size=batch.get("other")) as j:
        pyro.sample("z", dist.Cauchy(mu, 2.0), obs=TABLE[j, 0])
    with row as i:
        pyro.sample("w", dist.Normal(0.5 * mu, 1.0), obs=X[i, 0])


def crossed(*, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    side = pyro.sample("side", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    with (
        pyro.plate("outer", 6, subsample_size=batch.get("outer"), dim=-2) as i,
        pyro.plate("row", 12, subsample_size=batch.get("row"), dim=-1) as j,
    ):
        pyro.sample("y", dist.StudentT(4.0, mu + side[j], 1.0), obs=TABLE[i][:, j])


def nested(*, batch):
    with pyro.plate("outer", 6, dim=-2):
        level = pyro.sample("level", dist.Normal(torch.zeros(6, 1), 1.0))
        with pyro.plate("row", 12, subsample_size=batch.get("row"), dim=-1) as j:
            pyro.sample("y", dist.StudentT(4.0, level, 1.0), obs=TABLE[:, j])


def scaled_and_masked(*, batch):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", 12, subsample_size=batch.get("row")) as i:
        with poutine.scale(scale=0.3), poutine.mask(mask=MASK[i]):
            pyro.sample("y", dist.Normal(X[i] @ beta, 1.0), obs=Y[i])
        pyro.factor("extra", -0.1 * (X[i] @ beta) ** 4)


def sequential(*, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("row", 12, subsample_size=batch.get("row")):
        pyro.sample(f"y_{i}", dist.StudentT(3.0, mu, 1.0), obs=Y[i])


def enumerated(*, batch):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    centres = pyro.sample("centres", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("row", 12, subsample_size=batch.get("row")) as i:
        which = pyro.sample("which", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(centres[which], 0.6), obs=Y[i])


def enumerated_by_hand(*, batch):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    centres = pyro.sample("centres", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("row", 12, subsample_size=batch.get("row")) as i:
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(centres, 0.6))
        pyro.sample("y", mixture, obs=Y[i])


CASES = {  # model -> rows of every plate, and the model by whose trace Pyro gives the density
    grouped: ({"row": [3, 11, 0, 7]}, grouped),
    by_subsample: ({"row": [3, 11, 0]}, by_subsample),
    two_plates: ({"row": [3, 11, 0], "other": [5, 1]}, two_plates),
    crossed: ({"outer": [4, 2], "row": [3, 11, 0, 7]}, crossed),
    nested: ({"row": [3, 11, 0, 7]}, nested),
    scaled_and_masked: ({"row": [3, 11, 0, 7, 5, 6]}, scaled_and_masked),
    sequential: ({"row": [3, 11, 0]}, sequential),
    enumerated: ({"row": [3, 11, 0]}, enumerated_by_hand),
}
cases = pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)


def program_of(model) -> tuple[LaneProgram, dict[str, torch.Tensor], torch.Tensor]:
    rows = {name: torch.tensor(values) for name, values in CASES[model][0].items()}
    program = LaneProgram(model, (), {"batch": {name: len(x) for name, x in rows.items()}})
    generator = torch.Generator().manual_seed(5)
    return program, rows, torch.randn(3, program.num_latent, dtype=torch.float64, generator=generator)


def by_pyro(model, rows, program: LaneProgram, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(u, y) and gradient by Pyro's trace, its plates conditioned on the rows."""
    u, log_jacobian, values = u.clone().requires_grad_(), torch.zeros(()), dict(rows)
    batch = {"batch": {name: len(x) for name, x in rows.items()}}
    with model_defaults(torch.float64, torch.device("cpu")):
        prior = poutine.trace(model).get_trace(**batch)
        for name, site in program.latent.items():
            transform = biject_to(prior.nodes[name]["fn"].support)
            x = u[site.slice].reshape(site.unconstrained_shape)
            values[name] = transform(x)
            log_jacobian = log_jacobian + transform.log_abs_det_jacobian(x, values[name]).sum()
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(**batch)
        value = trace.log_prob_sum() + log_jacobian
    return value.detach(), torch.autograd.grad(value, u)[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# -- the lane program ------------------------------------------------------------------------------------


@cases
def test_density_and_gradient_on_given_rows_are_those_of_pyro(model, monkeypatch):
    program, rows, u = program_of(model)
    expected = [by_pyro(CASES[model][1], rows, program, x) for x in u]
    value, grad = (torch.stack(parts) for parts in zip(*expected, strict=True))
    found, found_grad = program.evaluate(u, NO_INPUTS, gradient=True, rows=rows)
    assert_close(found, value)
    assert_close(found_grad, grad)
    monkeypatch.setattr(_tiers, "TRACE_AFTER", 0)
    elsewhere = {name: (x + 1) % 6 for name, x in rows.items()}  # the rows are no constants of the graph
    program.evaluate(u + 0.5, NO_INPUTS, gradient=True, rows=elsewhere)
    assert bool(program.tiers.traced) == (model is not sequential)
    found, found_grad = program.evaluate(u, NO_INPUTS, gradient=True, rows=rows)
    assert_close(found, value)
    assert_close(found_grad, grad)
    assert program.loop_reason is None
    program.loop_reason = "asked for by the test"
    found, found_grad = program.evaluate(u, NO_INPUTS, gradient=True, rows=rows)
    assert_close(found, value)
    assert_close(found_grad, grad)


@cases
def test_without_rows_the_density_is_that_of_all_of_them(model):
    program, rows, u = program_of(model)
    assert program.minibatches.keys() == rows.keys()
    whole = LaneProgram(model, (), {"batch": {}})
    assert not whole.minibatches
    for found, expected in zip(
        program.evaluate(u, NO_INPUTS, gradient=True),
        whole.evaluate(u, NO_INPUTS, gradient=True),
        strict=True,
    ):
        assert torch.equal(found, expected)


@cases
def test_gradients_over_a_partition_average_to_that_on_all_rows(model):
    program, rows, u = program_of(model)
    sizes = {name: whole for name, (_, whole) in program.minibatches.items()}
    parts = {
        name: torch.randperm(whole, generator=torch.Generator().manual_seed(whole)).split(whole // 3)
        for name, whole in sizes.items()
    }
    # Plates side by side or crossed: every pair of parts, so that each plate averages given the other.
    pairs = torch.cartesian_prod(*[torch.arange(3)] * len(rows)).reshape(-1, len(rows))
    grads = [
        program.evaluate(
            u,
            NO_INPUTS,
            gradient=True,
            rows={name: parts[name][k] for name, k in zip(parts, pair.tolist(), strict=True)},
        )[1]
        for pair in pairs
    ]
    _, whole = program.evaluate(u, NO_INPUTS, gradient=True)
    assert_close(torch.stack(grads).mean(0), whole)
    assert (grads[0] - whole).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("model", [grouped, crossed, enumerated])
def test_weights_follow_the_rows(model):
    program, rows, u = program_of(model)
    shape = program.observed["y"].shape
    weights = torch.as_tensor(np.random.default_rng(1).integers(0, 2, (len(u), *shape))).double()
    inputs = LaneInputs(weights={"y": weights})
    found, grad = program.evaluate(u, inputs, gradient=True, rows=rows)
    program.loop_reason = "asked for by the test"
    looped, looped_grad = program.evaluate(u, inputs, gradient=True, rows=rows)
    assert_close(found, looped)
    assert_close(grad, looped_grad)
    # A weight of 0 leaves the observation out: the density is that without it, the factor of the rows kept.
    without = program.evaluate(u, LaneInputs(weights={"y": torch.zeros_like(weights)}), rows=rows)
    kept = torch.zeros_like(weights)
    if model is crossed:
        kept[:, rows["outer"][:, None], rows["row"]] = weights[:, rows["outer"][:, None], rows["row"]]
    else:
        kept[:, rows["row"]] = weights[:, rows["row"]]
    factor = np.prod([whole / size for size, whole in program.minibatches.values()])
    alone = program.evaluate(u, LaneInputs(weights={"y": kept}))
    nothing = program.evaluate(u, LaneInputs(weights={"y": torch.zeros_like(weights)}))
    assert_close(found, without + factor * (alone - nothing))


# -- steps of svi ----------------------------------------------------------------------------------------


def logistic_data(num=5000, groups=30):
    rng = np.random.default_rng(0)
    group = torch.as_tensor(rng.integers(0, groups, num))
    x = torch.as_tensor(rng.standard_normal((num, 2)))
    rate = torch.sigmoid(
        0.7 * torch.as_tensor(rng.standard_normal(groups))[group] + x @ x.new_tensor([0.5, -0.8])
    )
    y = torch.as_tensor(rng.random(num)) < rate
    return x, y.double(), group


def logistic(x, y, group, *, sigma, batch=None, groups=30):
    theta = bt.tied("theta", bt.Tie.complete(groups), sigma, dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("row", len(y), subsample_size=batch) as i:
        pyro.sample("y", dist.Bernoulli(logits=theta[group[i]] + x[i] @ b), obs=y[i])


def small(**options):
    x, y, group = logistic_data(300, 5)
    return bt.sweep(
        logistic, x, y, group, over={"sigma": [0.3, 1.0]}, groups=5, keep=("posterior",), **options
    )


def task_of(model, *args, num_draws=250, options=None, **kwargs) -> Task:
    program = LaneProgram(model, args, kwargs, {"sigma": torch.tensor([0.3, 1.0], dtype=torch.float64)})
    density = build_density(program)
    return Task(program, density, 2, 4, num_draws, 400.0, 3, lambda event: None, options=options or {})


def test_scores_of_minibatches_are_unbiased_and_quieter_near_the_anchor():
    task = task_of(logistic, *logistic_data(300, 5), batch=20, groups=5)
    generator = torch.Generator().manual_seed(2)
    anchor = 0.3 * torch.randn(2, task.density.num_latent, generator=generator, dtype=torch.float64)
    near = anchor.unsqueeze(1) + 0.1 * torch.randn(
        2, 4, task.density.num_latent, generator=generator, dtype=torch.float64
    )
    score = MinibatchScore(task, task.points, anchor, 0)
    _, whole = task.density.value_and_grad(task.points, near)
    found = torch.stack([score(near)[1] for _ in range(200)]) - whole
    error = found.std(0) / 200**0.5
    assert (found.mean(0).abs() < 4.5 * error).all()
    plain = torch.stack(
        [score.density.value_and_grad(task.points, near, draw_rows(task, t))[1] - whole for t in range(200)]
    )
    assert (plain.mean(0).abs() < 4.5 * plain.std(0) / 200**0.5).all()
    assert (found.var(0).mean() < 0.1 * plain.var(0).mean()).all()


def test_rows_are_fresh_at_every_step_and_all_as_likely():
    task = task_of(logistic, *logistic_data(300, 5), batch=20, groups=5)
    drawn = torch.stack([draw_rows(task, step)["row"] for step in range(600)])
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()  # without replacement
    counts = torch.bincount(drawn.flatten(), minlength=300).double()
    expected = 600 * 20 / 300
    assert ((counts - expected).square().sum() / expected) < 300 + 5 * (2 * 300) ** 0.5
    assert torch.equal(draw_rows(task, 7)["row"], drawn[7])


def test_svi_on_minibatches_agrees_with_all_rows():
    data, over = logistic_data(), {"sigma": [0.1, 0.3, 1.0, 3.0]}
    run = functools.partial(bt.sweep, logistic, *data, over=over, seed=1, keep=("posterior",))
    found, whole = run(engine="svi", batch=200), run(engine="laplace")
    assert found["sweep"].certified.all() and (found["sweep"].khat < 0.7).all()
    for reason in found["sweep"].reason.values:
        assert "settled after" in reason and "minibatches of 200 of 5000 rows of plate 'row'" in reason
    for name in ("theta", "b"):
        a, b = (tree["posterior"].to_dataset()[name].values.reshape(4, 1000, -1) for tree in (found, whole))
        # Both engines resample weighted draws, whose worth is at least the 400 that certifies them.
        error = b.std(1) * (2 / 400) ** 0.5
        assert (np.abs(a.mean(1) - b.mean(1)) < 4.0 * error).all()
        assert (np.abs(a.std(1) / b.std(1) - 1.0) < 4.0 / 400**0.5).all()
    gap = found["sweep"].log_evidence - whole["sweep"].log_evidence
    error = np.hypot(found["sweep"].log_evidence_error, whole["sweep"].log_evidence_error)
    assert (np.abs(gap) < 4.0 * error).all()


def test_steps_on_minibatches_find_the_posterior_from_elsewhere():
    task = task_of(logistic, *logistic_data(2000, 5), batch=100, groups=5)
    fit = fit_laplace(task, task.points)
    # From a small ball at the origin: nothing but the steps can find the way.
    draws = run_svi(task, dataclasses.replace(fit, converged=torch.zeros_like(fit.converged)))
    assert all(draws.certified) and (draws.khat < 0.7).all()
    assert all("settled after" in reason for reason in draws.reason)


@pytest.mark.parametrize("engine", ["laplace", "nuts", "auto"])
def test_other_engines_see_all_rows(engine):
    found, whole = (small(engine=engine, batch=batch, num_chains=2) for batch in (20, None))
    for name, values in whole["posterior"].to_dataset().items():
        assert np.array_equal(found["posterior"].to_dataset()[name].values, values.values)
    assert np.array_equal(found["sweep"].log_evidence, whole["sweep"].log_evidence, equal_nan=True)


def watched_mean(y, *, sigma, batch, sizes=None):
    mu = pyro.sample("mu", dist.Normal(0.0, sigma))
    with pyro.plate("row", len(y), subsample_size=batch) as i:
        if sizes is not None:
            sizes.append(len(y[i]))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


def test_pyro_nuts_sees_all_rows():
    tasks = [task_of(watched_mean, Y, batch=batch, num_draws=5, options={"warmup": 3}) for batch in (4, 12)]
    found, whole = (run_pyro_nuts(task, task.points[:1]) for task in tasks)
    assert torch.equal(found.position, whole.position)


def test_pyro_svi_takes_minibatches_of_its_own():
    sizes = []
    model = functools.partial(watched_mean, sizes=sizes)
    task = task_of(model, Y, batch=4, num_draws=5, options={"num_steps": 7})
    sizes.clear()
    draws = run_pyro_svi(task, task.points[:1])
    assert sizes.count(4) >= 7
    position = draws.position.reshape(1, -1, 1)
    expected = task.density.value(task.points[:1], position).reshape(draws.log_density.shape)
    assert torch.equal(draws.log_density, expected)  # what judges the guide sees all rows
    assert 12 in sizes


def test_simulation_sees_all_rows():
    data = logistic_data(300, 5)
    found, whole = (
        Simulator.of(LaneProgram(logistic, data, {"batch": batch, "groups": 5, "sigma": 0.5}))
        .run(NO_INPUTS, 3, seed=2)
        .values["y"]
        for batch in (20, None)
    )
    assert found.shape == (3, 300)
    assert torch.equal(found, whole)


def test_same_seed_same_bits(monkeypatch):
    monkeypatch.setattr(_svi, "MAX_STEPS", 60)
    first, second = (small(engine="svi", batch=40, seed=5) for _ in range(2))
    other = small(engine="svi", batch=60, seed=5)
    first, second, other = (tree["posterior"].to_dataset() for tree in (first, second, other))
    for name, values in first.items():
        assert np.array_equal(second[name].values, values.values)
        assert not np.array_equal(other[name].values, values.values)


TIED_NET = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def net_model(x, y, *, sigma, batch=None):
    net = bt.nn.tied_modules("net", TIED_NET, bt.Tie.complete(2), sigma, bt.nn.fan_in())
    with pyro.plate("branch", 2, dim=-2), pyro.plate("row", x.shape[1], subsample_size=batch, dim=-1) as i:
        pyro.sample("y", dist.Normal(net.map(x[:, i])[..., 0], 0.2), obs=y[:, i])


def test_a_tied_net_is_fitted_on_minibatches(monkeypatch):
    monkeypatch.setattr(_svi, "MAX_FULL_RANK", 1)  # as for a large net: no search for modes first
    monkeypatch.setattr(_svi, "MAX_STEPS", 830)
    x = torch.linspace(-2, 2, 400, dtype=torch.float64).expand(2, 400)
    noise = 0.2 * torch.as_tensor(np.random.default_rng(3).standard_normal((2, 400)))
    truth = torch.tanh(torch.tensor([[0.8], [1.3]]) * x)
    path = bt.sweep(
        net_model,
        x[..., None],
        truth + noise,
        over={"sigma": [0.0, 0.5]},
        engine="svi",
        guide="mean_field",
        batch=40,
    )
    for reason in path["sweep"].reason.values:
        assert "minibatches of 40 of 400 rows of plate 'row'" in reason
    mean = path["posterior_predictive"].to_dataset()["y"].mean(("chain", "draw")).values
    fitted = np.abs(mean - truth.numpy()).mean((1, 2))
    assert fitted[1] < 0.05  # a quarter of the noise
    assert fitted[1] < fitted[0]  # one net for both branches cannot have both slopes


# -- refusals --------------------------------------------------------------------------------------------


def local_latent(y, *, sigma):
    with pyro.plate("row", len(y), subsample_size=4) as i:
        x = pyro.sample("x", dist.Normal(0.0, sigma))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y[i])


def forgotten_index(y, *, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, sigma))
    with pyro.plate("row", len(y), subsample_size=4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def shared_category(y, *, sigma):
    centres = pyro.sample("centres", dist.Normal(torch.zeros(2), sigma).to_event(1))
    which = pyro.sample("which", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
    with pyro.plate("row", len(y), subsample_size=4) as i:
        pyro.sample("y", dist.Normal(centres[which], 1.0), obs=y[i])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (local_latent, ["latent site 'x' in plate 'row'", "4 of 12 rows", "outside", "subsample_size"]),
        (forgotten_index, ["observed site 'y'", "(12,)", "(4,)", "minibatch", "y[rows]"]),
        (shared_category, ["'which'", "'y'", "enumerated site", "subsample_size"]),
    ],
)
def test_svi_refuses_what_minibatches_cannot_serve(model, words):
    with pytest.raises(bt.errors.BayestieError) as refusal:
        bt.fit(model, Y, sigma=1.0, engine="svi")
    for word in words:
        assert word in str(refusal.value)
    assert bt.fit(model, Y, sigma=1.0, engine="laplace")["sweep"].certified.notnull()
