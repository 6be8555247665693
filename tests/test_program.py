"""The lane program against Pyro's own potential, on the zoo; lanes that go wrong; the caller's state."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import MASK, ZOO, Case, X, Y, masked_regression, missing_observations, normal_mean

import bayestie as bt
from bayestie import _tiers
from bayestie._errors import BayestieError
from bayestie._lane import LaneInputs
from bayestie._program import LaneProgram
from bayestie._run_context import model_defaults

CPU = torch.device("cpu")
NO_INPUTS = LaneInputs()


def positions(program: LaneProgram, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, program.num_latent, dtype=torch.float64, generator=generator)


def normal(loc, scale):
    loc, scale = (torch.as_tensor(x, dtype=torch.float64) for x in (loc, scale))
    return torch.distributions.Normal(loc, scale)


def pyro_log_joint(case: Case, program: LaneProgram, u: Tensor) -> tuple[Tensor, Tensor]:
    """Log joint and gradient by pyro.infer.mcmc at one flat position."""
    u = u.clone().requires_grad_()
    if case.log_joint is not None:
        value = case.log_joint(u)
    else:
        with model_defaults(torch.float64, CPU):
            _, potential, _, _ = initialize_model(
                case.model, case.args, case.kwargs, max_plate_nesting=case.max_plate_nesting
            )
            sites = program.latent.values()
            value = -potential({x.name: u[x.slice].reshape(x.unconstrained_shape) for x in sites})
    return value.detach(), torch.autograd.grad(value, u)[0]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    scale = 1.0 + float(expected.abs().max())
    assert float((found - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("name", ZOO)
def test_log_joint_and_gradient_are_those_of_pyro(name):
    case = ZOO[name]
    program = LaneProgram(case.model, case.args, case.kwargs)
    u = positions(program)
    value, grad = program.evaluate(u, NO_INPUTS, gradient=True)
    assert program.loop_reason is None
    for i in range(len(u)):
        expected, expected_grad = pyro_log_joint(case, program, u[i])
        assert_close(value[i], expected)
        assert_close(grad[i], expected_grad)


@pytest.mark.parametrize("name", ZOO)
def test_graph_and_loop_agree_with_the_eager_program(name, monkeypatch):
    case = ZOO[name]
    program = LaneProgram(case.model, case.args, case.kwargs)
    u = positions(program)
    value, grad = program.evaluate(u, NO_INPUTS, gradient=True)
    monkeypatch.setattr(_tiers, "TRACE_AFTER", 0)
    traced, traced_grad = program.evaluate(u + 0.5, NO_INPUTS, gradient=True)  # traced at another position
    assert bool(program.tiers.traced) == (name != "sequential_plate")  # Pyro reads its indices off a tensor
    assert not torch.equal(traced, value)
    traced, traced_grad = program.evaluate(u, NO_INPUTS, gradient=True)
    assert_close(traced, value, 1e-13)
    assert_close(traced_grad, grad, 1e-12)
    program.loop_reason = "asked for by the test"
    looped, looped_grad = program.evaluate(u, NO_INPUTS, gradient=True)
    assert_close(looped, value, 1e-13)
    assert_close(looped_grad, grad, 1e-12)


# Two to ten seconds each: half of the zoo, every kind of it.
COMPILED = (
    "binomial", "crossed_plates", "deterministic", "factor", "gaussian_process", "learned_strength",
    "logistic", "logistic_by_probabilities", "masked", "masked_regression", "missing_observations",
    "multinomial_logistic", "multivariate_normal", "poisson_groups", "reparametrised", "scaled", "student_t",
    "tied_copies", "tied_level", "with_param",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_graph_agrees_with_pyro(name, monkeypatch):
    case = ZOO[name]
    program = compiling(LaneProgram(case.model, case.args, case.kwargs), monkeypatch)
    u = positions(program)
    program.evaluate(u + 0.5, NO_INPUTS, gradient=True)  # compiled at another position
    assert program.tiers.highest == "compiled"
    value, grad = program.evaluate(u, NO_INPUTS, gradient=True)
    for i in range(len(u)):
        expected, expected_grad = pyro_log_joint(case, program, u[i])
        assert_close(value[i], expected)
        assert_close(grad[i], expected_grad)


def compiling(program, monkeypatch):
    """A program that compiles what it is called with first."""
    monkeypatch.setattr(_tiers, "TRACE_AFTER", 0)
    monkeypatch.setattr(_tiers, "_calls_worth_compiling", lambda graph: 0.0)
    return program


def test_without_a_compiler_the_graph_runs(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("no g++ here")

    case = ZOO["normal_mean"]
    program = compiling(LaneProgram(case.model, case.args, case.kwargs), monkeypatch)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", missing)
    u = positions(program)
    program.evaluate(u, NO_INPUTS)
    assert program.tiers.highest == "traced"
    assert program.tiers.compile_failure == "FileNotFoundError: no g++ here"


def test_a_compilation_that_disagrees_is_not_used(monkeypatch):
    case = ZOO["normal_mean"]
    program = compiling(LaneProgram(case.model, case.args, case.kwargs), monkeypatch)
    monkeypatch.setattr(_tiers, "_fused", lambda traced, arguments: lambda *x: traced(*x) * (1 + 1e-9))
    u = positions(program)
    expected = LaneProgram(case.model, case.args, case.kwargs).evaluate(u, NO_INPUTS)
    assert_close(program.evaluate(u, NO_INPUTS), expected, 1e-13)
    assert program.tiers.highest == "traced" and "away from" in str(program.tiers.compile_failure)


def test_calls_alone_decide_what_is_compiled(monkeypatch):
    case, compiled_at = ZOO["normal_mean"], []
    program = LaneProgram(case.model, case.args, case.kwargs)
    u = positions(program)
    monkeypatch.setattr(_tiers, "_calls_worth_compiling", lambda graph: 50.0)
    monkeypatch.setattr(_tiers, "_fused", lambda traced, arguments: traced)
    for call in range(1, 200):
        program.evaluate(u, NO_INPUTS)
        if program.tiers.highest == "compiled":
            compiled_at.append(call)
    assert compiled_at[0] == _tiers.TRACE_AFTER + 51


def test_cheap_graphs_are_compiled_after_more_calls_than_costly_ones():
    x = torch.zeros(3, dtype=torch.float64)
    small, large = (make_fx(lambda x: x.exp().sin())(x.expand(n, 3).clone()) for n in (1, 1_000_000))
    calls = [_tiers._calls_worth_compiling(graph) for graph in (small, large)]
    assert calls[0] > 100 * calls[1] > 100


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("tied")])
def test_swept_lanes_equal_lanes_of_one_strength(name):
    case = ZOO[name]
    strengths = [0.0, 0.1, 2.0]
    program = LaneProgram(case.model, case.args, {}, {"sigma": torch.tensor(strengths, dtype=torch.float64)})
    u = positions(program, 6)
    index = torch.tensor([0, 1, 2, 2, 1, 0])
    value, grad = program.evaluate(u, program.point_inputs(index), gradient=True)
    for i, point in enumerate(index.tolist()):
        alone = LaneProgram(case.model, case.args, {"sigma": strengths[point]})
        expected, expected_grad = alone.evaluate(u[i : i + 1], NO_INPUTS, gradient=True)
        assert_close(value[i], expected[0], 1e-13)
        assert_close(grad[i], expected_grad[0], 1e-12)


def test_weights_scale_each_observation():
    program = LaneProgram(normal_mean, (Y,))
    u = positions(program, 2)
    weights = torch.stack([torch.zeros(12), torch.arange(12.0)]).double()
    value = program.evaluate(u, LaneInputs(weights={"y": weights}))
    for i in range(2):
        prior = normal(0.0, 5.0).log_prob(u[i, 0])
        rows = normal(u[i, 0], 1.3).log_prob(Y)
        assert_close(value[i], prior + (weights[i] * rows).sum(), 1e-13)


def test_weights_reach_enumerated_models():
    case = ZOO["mixture_by_enumeration"]
    program = LaneProgram(case.model, case.args)
    u = positions(program, 2)
    repeated = LaneProgram(case.model, (torch.cat([Y, Y[:4]]),)).evaluate(u, NO_INPUTS)
    twice = torch.where(torch.arange(12) < 4, 2.0, 1.0).double().expand(2, 12)
    # A weight scales the observation given its category: twice a term is no second draw of the category.
    weighted = program.evaluate(u, LaneInputs(weights={"y": twice}))
    assert not torch.allclose(weighted, repeated)
    left_out = torch.where(torch.arange(12) < 4, 0.0, 1.0).double().expand(2, 12)
    rest = LaneProgram(case.model, (Y[4:],)).evaluate(u, NO_INPUTS)
    assert_close(program.evaluate(u, LaneInputs(weights={"y": left_out})), rest, 1e-12)


def test_data_may_differ_from_lane_to_lane():
    program = LaneProgram(normal_mean, (Y,))
    u = positions(program, 2)
    value = program.evaluate(u, LaneInputs(data={"y": torch.stack([Y, 2.0 * Y])}))
    for i, y in enumerate((Y, 2.0 * Y)):
        alone = LaneProgram(normal_mean, (y,)).evaluate(u[i : i + 1], NO_INPUTS)
        assert_close(value[i], alone[0], 1e-13)


# -- masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [float("nan"), float("inf"), -999.0])
@pytest.mark.parametrize("model", [masked_regression, missing_observations])
def test_what_is_masked_out_may_be_anything(model, code):
    args = (X, Y, MASK) if model is masked_regression else (Y, MASK)
    holes = tuple(torch.where(MASK, a, code) if a is Y else a for a in args)
    clean, holed = LaneProgram(model, args), LaneProgram(model, holes)
    u = positions(clean)
    for found, expected in zip(
        holed.evaluate(u, NO_INPUTS, gradient=True), clean.evaluate(u, NO_INPUTS, gradient=True), strict=True
    ):
        assert torch.equal(found, expected)


def test_codes_outside_the_support_may_be_masked_out():
    def model(counts, mask):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("row", len(counts)), poutine.mask(mask=mask):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    counts, mask = torch.tensor([-1.0, 3.0, -1.0]), torch.tensor([False, True, False])
    u = torch.tensor([[0.3]], dtype=torch.float64)
    value, grad = LaneProgram(model, (counts, mask)).evaluate(u, NO_INPUTS, gradient=True)
    alone = LaneProgram(model, (counts[1:2], mask[1:2])).evaluate(u, NO_INPUTS, gradient=True)
    assert_close(value, alone[0], 1e-14)
    assert_close(grad, alone[1], 1e-14)


def test_obs_mask_leaves_no_flat_direction():
    with_holes = bt.fit(missing_observations, Y, MASK, num_draws=20)
    assert bool(with_holes.sweep.exact)

    def without(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 0.8), obs=y)

    expected = bt.fit(without, Y[MASK], num_draws=20)
    assert float(with_holes.sweep.log_evidence) == pytest.approx(float(expected.sweep.log_evidence), abs=1e-9)
    assert set(with_holes.posterior) == {"mu", "y_unobserved", "y"}


def test_reparametrised_sites_are_results_and_no_data():
    case = ZOO["reparametrised"]
    program = LaneProgram(case.model, case.args)
    assert list(program.latent) == ["mu", "theta_decentered"]
    assert list(program.deterministic) == ["theta"]
    assert list(program.observed) == ["y"]


def test_flat_priors_have_a_place():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    tree = bt.fit(model, Y, num_draws=500)
    assert bool(tree.sweep.exact)
    draws = tree.posterior.mu.values
    assert abs(draws.mean() - float(Y.mean())) < 4 * draws.std() / np.sqrt(draws.size)


# -- lanes that go wrong -------------------------------------------------------------------------------


def fragile(y):
    """Not positive definite where x <= 0: the Cholesky factor exists in some lanes only."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), x * torch.eye(2)), obs=y)


def undefined(y):
    """NaN where x < 0."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(torch.sqrt(x), 1.0), obs=y)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("model", [fragile, undefined])
def test_a_lane_that_fails_leaves_the_others_alone(model, traced, monkeypatch):
    if traced:
        monkeypatch.setattr(_tiers, "TRACE_AFTER", 0)
    program = _started(model)
    good = torch.tensor([[0.5], [2.0], [1.0]], dtype=torch.float64)
    bad = torch.tensor([[0.5], [-2.0], [1.0]], dtype=torch.float64)
    values, grads = program.evaluate(good, NO_INPUTS, gradient=True)
    broken, broken_grads = program.evaluate(bad, NO_INPUTS, gradient=True)
    assert bool(torch.isfinite(values).all())
    assert not bool(torch.isfinite(broken[1]))
    for i in (0, 2):
        assert torch.equal(broken[i], values[i])
        assert torch.equal(broken_grads[i], grads[i])
    program.loop_reason = "asked for by the test"
    looped, _ = program.evaluate(bad, NO_INPUTS, gradient=True)
    assert torch.isfinite(looped).tolist() == [True, False, True]


def _started(model):
    """A program whose validated run happens to draw a value the model can use."""
    for seed in range(20):
        try:
            return LaneProgram(model, (torch.ones(2, dtype=torch.float64),), seed=seed)
        except BayestieError:
            continue
    raise AssertionError("no seed starts the model")


# -- what vmap cannot do -------------------------------------------------------------------------------


def branching(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    loc = x if x > 0 else 3.0 * x
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_a_branch_on_a_latent_falls_back_to_a_loop():
    program = LaneProgram(branching, (Y,))
    u = torch.tensor([[-0.4], [0.9]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"'branching' cannot be vectorised.*data-dependent control flow"):
        value, grad = program.evaluate(u, NO_INPUTS, gradient=True)
    for i in range(2):
        x = u[i, 0].clone().requires_grad_()
        loc = x if x > 0 else 3.0 * x
        expected = normal(0.0, 1.0).log_prob(x)
        expected = expected + normal(loc, 1.0).log_prob(Y).sum()
        assert_close(value[i], expected.detach(), 1e-13)
        assert_close(grad[i], torch.autograd.grad(expected, x)[0], 1e-13)


def test_a_branching_model_is_fitted_all_the_same():
    with pytest.warns(UserWarning, match="cannot be vectorised"):
        tree = bt.fit(branching, Y, engine="laplace", num_draws=50, num_chains=2)
    grid = torch.linspace(-4.0, 4.0, 4001, dtype=torch.float64)
    loc = torch.where(grid > 0, grid, 3.0 * grid)
    density = normal(0.0, 1.0).log_prob(grid)
    density = density + normal(loc[:, None], 1.0).log_prob(Y).sum(-1)
    evidence = torch.logsumexp(density, 0) + np.log(8.0 / 4000)
    error = float(tree.sweep.log_evidence_error)
    assert abs(float(tree.sweep.log_evidence) - float(evidence)) < 4 * error + 1e-3


# -- precision and the caller's state ------------------------------------------------------------------


def test_single_precision_arguments_cost_no_digits():
    case = ZOO["poisson_groups"]
    single = tuple(x.float() if x.is_floating_point() else x for x in case.args)
    double = tuple(x.double() if x.is_floating_point() else x for x in single)
    u = positions(LaneProgram(case.model, double))
    found = LaneProgram(case.model, single).evaluate(u, NO_INPUTS, gradient=True)
    expected = LaneProgram(case.model, double).evaluate(u, NO_INPUTS, gradient=True)
    assert found[0].dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "y",
    [
        Y.numpy(),
        Y.numpy().astype(np.float32).astype(np.float64),
        np.ascontiguousarray(Y.numpy()[::-1])[::-1],
        [1.0, 2.0, 3.0],
    ],
)
def test_arrays_become_tensors(y):
    def model(y):
        y = torch.as_tensor(y)
        assert y.dtype == torch.float64
        normal_mean(y)

    program = LaneProgram(model, (y,))
    expected = LaneProgram(normal_mean, (torch.tensor(np.array(y)),))
    u = positions(expected)
    assert torch.equal(program.evaluate(u, NO_INPUTS), expected.evaluate(u, NO_INPUTS))


def test_numpy_numbers_stay_scalars():
    case = ZOO["tied_level"]
    program = LaneProgram(case.model, case.args, {"sigma": np.float64(0.7)})
    expected = LaneProgram(case.model, case.args, {"sigma": 0.7})
    u = positions(expected)
    assert torch.equal(program.evaluate(u, NO_INPUTS), expected.evaluate(u, NO_INPUTS))


def test_read_only_arrays_are_welcome():
    y = Y.numpy().copy()
    y.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LaneProgram(normal_mean, (y,))


@pytest.mark.parametrize("validation", [False, True])
def test_the_callers_state_is_left_as_it_was(validation):
    case = ZOO["with_param"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    pyro.get_param_store().clear()
    pyro.param("offset", torch.tensor(1.5, dtype=torch.float32))
    with pyro.validation_enabled(validation):
        torch_flag = torch.distributions.Distribution._validate_args
        cholesky, state = torch.linalg.cholesky, torch.get_rng_state()
        numpy_state = np.random.get_state()  # noqa: NPY002 the legacy state is what must not move
        try:
            tree = bt.fit(case.model, *case.args, num_draws=20)
        finally:
            found = torch.get_default_dtype()
            torch.set_default_dtype(before)
        assert found == torch.float16
        assert torch.distributions.Distribution._validate_args == torch_flag
        assert poutine.util.is_validation_enabled() == validation
        assert torch.linalg.cholesky is cholesky
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002 as above
    store = pyro.get_param_store()
    assert list(store.keys()) == ["offset"]
    assert store["offset"].dtype == torch.float32
    assert bool(tree.sweep.exact)


def test_params_have_the_values_they_have_at_the_call():
    case = ZOO["with_param"]
    u = positions(LaneProgram(case.model, case.args))
    pyro.param("offset", torch.tensor(0.4, dtype=torch.float64))
    stated = LaneProgram(case.model, case.args)
    pyro.get_param_store()["offset"] = torch.tensor(-1.0, dtype=torch.float64)
    moved = LaneProgram(case.model, case.args)
    values = [program.evaluate(u, NO_INPUTS) for program in (stated, moved)]
    assert not torch.equal(*values)
    pyro.clear_param_store()
    again = LaneProgram(case.model, case.args).evaluate(u, NO_INPUTS)
    assert torch.equal(again, values[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_outcomes_may_be_integers_or_booleans(dtype):
    def coin(heads):
        p = pyro.sample("logit", dist.Normal(0.0, 1.0))
        with pyro.plate("toss", len(heads)):
            pyro.sample("y", dist.Bernoulli(logits=p.expand(len(heads))), obs=heads)

    heads = torch.tensor([1, 0, 1])
    at = torch.tensor([0.7], dtype=torch.float64)
    found, expected = (LaneProgram(coin, (x,)) for x in (heads.to(dtype), heads.double()))
    value = found.log_joint(at, found.point(0))
    assert torch.equal(value, expected.log_joint(at, expected.point(0)))
