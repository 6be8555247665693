"""Simulation: prior draws against the dense prior, posterior draws kept as stored, data found or refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from tie_kinds import TIES, dense_covariance

import bayestie as bt
from bayestie._errors import ModelError, NameLookupError, OptionError, ShapeError
from bayestie._lane import LaneInputs
from bayestie._program import LaneProgram
from bayestie._simulate import Simulator, data_arguments, simulate_data

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0])
STDERR = torch.tensor([15.0, 10.0, 16.0, 11.0])


def schools(effect, stderr, *, sigma):
    num = stderr.shape[-1]
    theta = bt.tied("theta", bt.Tie.exchangeable(num), sigma, dist.Normal(0.0, 5.0))
    with pyro.plate("school", num):
        pyro.sample("y", dist.Normal(theta, stderr), obs=effect)


def _covariance_error(found, num):
    """Standard error of each entry of a sample covariance of normals."""
    variance = found.diagonal()
    return np.sqrt((found**2 + np.outer(variance, variance)) / num)


# -- prior -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIES)
def test_prior_draws_have_the_prior_s_covariance(name):
    tie, num = TIES[name], 20_000
    base = dist.Normal(0.5, 1.3)

    def model(y, *, sigma):
        theta = bt.tied("theta", tie, sigma, base)
        with pyro.plate("row", tie.num_copies):
            pyro.sample("y", dist.Normal(theta, 0.7), obs=y)

    drawn = bt.prior_predictive(model, torch.zeros(tie.num_copies), over={"sigma": [0.0, 0.8]}, num_draws=num)
    noise = 0.49 * np.eye(tie.num_copies)
    observed = drawn["prior_predictive"].to_dataset()
    prior = drawn["prior"].to_dataset()
    for index, sigma in enumerate((1e-9, 0.8)):
        exact = dense_covariance(tie, sigma, 1.3, "level").numpy()
        for array, expected in (
            (prior["theta"], exact),
            (observed["y"], exact + noise),
        ):
            draws = array.values[index, 0]
            found = np.atleast_2d(np.cov(draws.T))
            assert np.abs(found - expected).max() < 5.5 * _covariance_error(expected, num).max()
            assert np.abs(draws.mean(0) - 0.5).max() < 5 * math.sqrt(expected.max() / num)


def test_groups_labels_and_data_are_arviz_s():
    drawn = bt.prior_predictive(
        schools, EFFECT, STDERR, over={"sigma": [0.0, 2.0]}, num_draws=7, coords={"school": list("ABCD")}
    )
    assert drawn.prior["theta"].dims == ("sigma", "chain", "draw", "school")
    assert drawn.prior_predictive["y"].shape == (2, 1, 7, 4)
    assert list(drawn.prior.coords["school"].values) == list("ABCD")
    np.testing.assert_array_equal(drawn.observed_data["y"], EFFECT)
    np.testing.assert_array_equal(drawn.constant_data["stderr"], STDERR)
    assert float(drawn.prior["theta"].isel(sigma=0).std("school").max()) == 0.0


def test_one_strength_has_no_swept_dim_and_a_seed_gives_the_same_bits():
    before = torch.random.get_rng_state()
    first = bt.prior_predictive(schools, EFFECT, STDERR, sigma=1.0, num_draws=5, seed=3)
    again = bt.prior_predictive(schools, EFFECT, STDERR, sigma=1.0, num_draws=5, seed=3)
    other = bt.prior_predictive(schools, EFFECT, STDERR, sigma=1.0, num_draws=5, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.prior_predictive["y"].dims == ("chain", "draw", "school")
    np.testing.assert_array_equal(first.prior_predictive["y"], again.prior_predictive["y"])
    assert (first.prior_predictive["y"] != other.prior_predictive["y"]).all()


FAMILIES = {
    "normal": (dist.Normal(1.0, 2.0), 1.0),
    "exponential": (dist.Exponential(2.0), math.log(2) / 2),
    "cauchy": (dist.Cauchy(-1.0, 0.5), -1.0),
    "half-cauchy": (dist.HalfCauchy(3.0), 3.0),
    "laplace": (dist.Laplace(0.3, 1.0), 0.3),
    "gamma": (dist.Gamma(1.0, 2.0), math.log(2) / 2),
    "beta": (dist.Beta(2.0, 2.0), 0.5),  # an old-style function: run by run
    "student": (dist.StudentT(3.0, 0.5, 1.0), 0.5),
    "multivariate": (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), 0.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_drawn_afresh_in_every_run(family):
    law, median = FAMILIES[family]

    def model(y):
        x = pyro.sample("x", law)
        with pyro.plate("row", 1):
            pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)

    drawn = bt.prior_predictive(model, torch.zeros(1), num_draws=600).prior["x"].values[0].reshape(600, -1)
    assert len(np.unique(drawn[:, 0])) == 600
    assert abs((drawn > median).mean() - 0.5) < 5 * 0.5 / math.sqrt(drawn.size)


def test_a_factor_and_an_improper_prior_cannot_be_run_forward():
    def factor(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", x)
        with pyro.plate("row", 2):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def improper(y):
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("row", 2):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"site 'tilt': found a pyro\.factor"):
        bt.prior_predictive(factor, torch.zeros(2))
    with pytest.raises(ModelError):
        bt.prior_predictive(improper, torch.zeros(2))
    with pytest.raises(OptionError, match="num_draws"):
        bt.prior_predictive(schools, EFFECT, STDERR, sigma=1.0, num_draws=0)


# -- posterior ---------------------------------------------------------------------------------------------


def _regression(x, y, *, sigma, noise=1.0):
    beta = bt.tied("beta", bt.Tie.chain(3), sigma, dist.Normal(0.0, 2.0))
    mean = pyro.deterministic("mean", x @ beta)
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


@pytest.fixture(scope="module")
def path():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1) + torch.randn(9, generator=generator, dtype=torch.float64)
    return bt.sweep(_regression, x, y, over={"sigma": [0.0, 0.5, 3.0]}, num_draws=50), x, y


def test_stored_latents_are_kept_draw_by_draw(path):
    # With no noise to speak of the data are a function of the stored draws.
    tree, _, _ = path
    new = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    found = bt.posterior_predictive(tree, _regression, new, None, noise=1e-12)
    expected = np.einsum("scdk,nk->scdn", tree.posterior["beta"].values, new.numpy())
    np.testing.assert_allclose(found.posterior_predictive["y"], expected, atol=1e-9)
    np.testing.assert_allclose(found.predictions["mean"], expected, atol=1e-9)
    np.testing.assert_array_equal(found.constant_data["x"], new)


def test_thinned_draws_say_which_they_are(path):
    tree, x, y = path
    found = bt.posterior_predictive(tree, _regression, x, y, num_draws=4, noise=1e-12)
    rows = found.posterior_predictive.coords["draw"].values
    assert found.posterior_predictive["y"].shape == (3, 4, 4, 9) and rows[0] == 0 and rows[-1] == 49
    expected = tree.posterior["beta"].sel(draw=rows).values @ x.numpy().T
    np.testing.assert_allclose(found.posterior_predictive["y"], expected, atol=1e-9)


def test_data_spread_as_the_model_says(path):
    tree, x, y = path
    found = bt.posterior_predictive(tree, _regression, x, y, noise=0.7)
    residual = found.posterior_predictive["y"].values - tree.posterior["beta"].values @ x.numpy().T
    assert residual.std() == pytest.approx(0.7, abs=5 * 0.7 / math.sqrt(2 * residual.size))


def test_a_selected_strength_brings_its_keyword(path):
    tree, x, y = path
    found = bt.posterior_predictive(bt.select(tree, sigma=0.5), _regression, x, y, num_draws=3)
    assert found.posterior_predictive["y"].dims == ("chain", "draw", "row")


def test_what_does_not_fit_the_path_is_named(path):
    tree, x, y = path

    def other(x, y, *, sigma):
        with pyro.plate("row", len(x)):
            pyro.sample(
                "y", dist.Normal(pyro.sample("slope", dist.Normal(0.0, 1.0).expand([1])), sigma), obs=y
            )

    def longer(x, y, *, sigma):
        bt.tied("beta", bt.Tie.chain(5), sigma, dist.Normal(0.0, 2.0))

    with pytest.raises(NameLookupError, match="none of them a latent of the path"):
        bt.posterior_predictive(tree, other, x, y, num_draws=2)
    with pytest.raises(ShapeError, match=r"site 'beta_z': found shape \(2,\)"):
        bt.posterior_predictive(tree, longer, x, y, num_draws=2)
    with pytest.raises(NameLookupError, match="without posterior draws"):
        bt.posterior_predictive(tree.drop_nodes("posterior"), _regression, x, y)
    with pytest.raises(ModelError, match="simulating model '_regression'"):
        bt.posterior_predictive(tree, _regression, x[:, :2], y, num_draws=2)


# -- which argument holds the data ---------------------------------------------------------------------------


def _observing(transform):
    def model(a, b):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        value = transform(a, b)
        with pyro.plate("row", len(value)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=value)

    return model


A, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])


def test_data_are_found_by_identity_then_by_equality():
    first = LaneProgram(_observing(lambda a, b: a), (A, B))
    assert data_arguments(first) == {"y": "a"}
    second = LaneProgram(_observing(lambda a, b: b.clone()), (A, B))
    assert data_arguments(second) == {"y": "b"}
    counts = LaneProgram(_observing(lambda a, b: b.double()), (A, B.long()))
    assert data_arguments(counts) == {"y": "b"}
    same = LaneProgram(_observing(lambda a, b: a), (A, A.clone()))
    assert data_arguments(same) == {"y": "a"}


@pytest.mark.parametrize(
    ("transform", "found"),
    [
        (lambda a, b: a - b, "no argument of the model that holds its values"),
        (lambda a, b: a[:2], "no argument of the model that holds its values"),
        (lambda a, b: b.clone(), r"arguments \['a', 'b'\] that hold the same values"),
    ],
)
def test_data_that_cannot_be_replaced_are_refused(transform, found):
    args = (A, A.clone()) if "arguments" in found else (A, B)
    with pytest.raises(ModelError, match=f"observed site 'y': found {found}"):
        data_arguments(LaneProgram(_observing(transform), args))


def test_data_that_the_model_also_uses_are_refused():
    def model(y):
        x = pyro.sample("x", dist.Normal(y.mean(), 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"site 'x': found a distribution that depends on the data \['y'\]"):
        simulate_data(LaneProgram(model, (A,)), torch.zeros(3, dtype=torch.long), 0)


def test_counts_keep_their_type_and_positions_their_latents():
    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    program = LaneProgram(model, (torch.tensor([1, 2, 3]),))
    data, simulated = simulate_data(program, torch.zeros(50, dtype=torch.long), 1)
    assert data["y"].dtype == torch.int64 and data["y"].shape == (50, 3)
    torch.testing.assert_close(simulated.positions["rate"].exp(), simulated.values["rate"])


def test_lanes_of_a_loop_are_those_of_the_batch():
    # Given all that is random, the two routes must agree to the last digit.
    program = LaneProgram(schools, (EFFECT, STDERR), swept={"sigma": torch.tensor([0.0, 2.0, 5.0])})
    given = {"theta_z": torch.ones(3, 4).double(), "theta_level": torch.tensor([1.0, 2.0, 3.0]).double()}
    inputs = LaneInputs(swept=program.swept)
    batched = Simulator.of(program).run(inputs, 3, 0, given=given)

    def unbatched(effect, stderr, *, sigma):
        float(sigma)  # what vmap refuses
        schools(effect, stderr, sigma=sigma)

    looped = Simulator(unbatched, ["effect", "stderr"], program.args, {}).run(inputs, 3, 0, given=given)
    torch.testing.assert_close(batched.values["theta"], looped.values["theta"])
    assert batched.kinds == looped.kinds and batched.dims == looped.dims
