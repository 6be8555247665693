"""Leave-copy-out and leave-one-out by refits: closed forms, brute force, and whose observation is whose."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm, poisson
from synthetic import EFFECT, STDERR
from tie_kinds import TIES, dense_covariance

import bayestie as bt
from bayestie import _leave_out
from bayestie._collect import tie_uses
from bayestie._draws import effective_size
from bayestie._errors import DataError, KeywordError, ModelError, NameLookupError, OptionError, ShapeError
from bayestie._owners import found_owners
from bayestie._program import LaneProgram
from bayestie._tie_arguments import Form
from models.eight_schools import eight_schools

effect, stderr = (torch.as_tensor(x, dtype=torch.float64) for x in (EFFECT, STDERR))
LEVEL_SD = 5.0
FEW: dict[str, Any] = {
    "num_draws": 10,
    "target_ess": 10,
}  # evidence of Gaussian models is exact without any draw


def _gaussian(tie, form: Form = "level"):
    def model(y, owner, *, sigma):
        theta = bt.tied("theta", tie, sigma, dist.Normal(0.3, LEVEL_SD), form=form)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(theta[..., owner], 0.8), obs=y)

    return model


def _log_normal(y, covariance):
    """log N(y; 0.3, covariance); 0 for no y."""
    centred = np.asarray(y) - 0.3
    log_det = np.linalg.slogdet(covariance)[1]
    return -0.5 * (
        len(centred) * math.log(2 * math.pi) + log_det + centred @ np.linalg.solve(covariance, centred)
    )


def _exact(tie, sigma, y, owner, out, form="level"):
    """log p(y_out | the rest), ``out`` boolean: one multivariate normal over another."""
    prior = dense_covariance(tie, max(sigma, 1e-8), LEVEL_SD, form).numpy()
    whole = prior[np.ix_(owner, owner)] + 0.64 * np.eye(len(y))
    return _log_normal(y, whole) - _log_normal(y[~out], whole[np.ix_(~out, ~out)])


# -- whole copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exchangeable", "chain", "anchored", "groups", "mixed", "weighted"])
def test_gaussian_models_score_as_the_closed_form(name):
    tie = TIES[name]
    num, generator = tie.num_copies, np.random.default_rng(3)
    owner = np.concatenate([np.arange(num - 1), generator.integers(0, num - 1, 4)])  # none for the last copy
    y = generator.normal(size=len(owner))
    strengths = [0.0, 0.7, 4.0]
    found = bt.leave_copy_out(
        _gaussian(tie), torch.as_tensor(y), torch.as_tensor(owner), over={"sigma": strengths}, **FEW
    )
    exact = np.array([[_exact(tie, s, y, owner, owner == k) for k in range(num)] for s in strengths])
    np.testing.assert_allclose(found.elpd_copy, exact, atol=2e-6)
    np.testing.assert_allclose(found.elpd, exact.sum(1), atol=1e-5)
    assert (found.mcse_copy == 0).all() and (found.elpd_mcse == 0).all()
    np.testing.assert_array_equal(found.num_observations, np.bincount(owner, minlength=num))
    assert (found.source[:, :-1] == "evidence").all() and (found.source[:, -1] == "none").all()
    best = int(found.elpd.argmax("sigma"))
    gap = (exact - exact[best])[:, :-1]
    assert float(found.elpd_difference.max()) == 0.0
    np.testing.assert_allclose(found.elpd_difference_se, np.sqrt((num - 1) * gap.var(1, ddof=1)), atol=1e-5)


@pytest.mark.parametrize("form", ["copies", "matched"])
def test_no_sharing_predicts_from_the_base(form: Form):
    tie, y, owner = bt.Tie.complete(3), np.array([1.0, -2.0, 0.4]), np.arange(3)
    found = bt.leave_copy_out(
        _gaussian(tie, form),
        torch.as_tensor(y),
        torch.as_tensor(owner),
        over={"sigma": [1.0, math.inf]},
        **FEW,
    )
    own = norm.logpdf(y, 0.3, math.sqrt(LEVEL_SD**2 + 0.64))
    np.testing.assert_allclose(found.elpd_copy[1], own, atol=1e-8)
    assert not np.allclose(found.elpd_copy[0], own, atol=1e-3)


def test_means_over_draws_agree_with_the_evidence_within_their_error(monkeypatch):
    over = {"sigma": [0.0, 2.0, 10.0]}
    exact = bt.leave_copy_out(eight_schools, effect, stderr, over=over, **FEW)
    keep = _leave_out._keep

    def doubt(fits, rows, draws):
        keep(fits, rows, draws)
        fits.usable[rows] = 0.0

    monkeypatch.setattr(_leave_out, "_keep", doubt)
    found = bt.leave_copy_out(eight_schools, effect, stderr, over=over, num_draws=500)
    assert (found.source == "draws").all()
    score = ((found.elpd_copy - exact.elpd_copy) / found.mcse_copy).values
    assert np.abs(score).max() < 4 and 0.5 < score.std() < 1.5
    assert (np.abs(found.elpd - exact.elpd) < 4 * found.elpd_mcse).all()


def test_errors_of_a_shared_evidence_add_up():
    fits = _leave_out._Fits(
        evidence=torch.tensor([-3.0, -2.0, -2.5]),
        evidence_error=torch.tensor([0.3, 0.1, 0.2]),
        usable=torch.ones(3),
        certified=torch.ones(3),
        by_draws=torch.tensor([0.0, -1.1, -0.4]),
        by_draws_error=torch.tensor([9.0, 9.0, 0.05]),
    )
    found = _leave_out._chosen(fits, torch.tensor([0, 0]), 1)
    np.testing.assert_allclose(found.elpd, [-1.0, -0.4])
    np.testing.assert_allclose(found.error, [0.1, 0.05])
    np.testing.assert_allclose(found.shared, [0.3, 0.0])
    assert found.source.tolist() == ["evidence", "draws"]


def test_counts_against_quadrature():
    # A known level makes copies independent: what is left out is predicted by its prior alone.
    counts, sigma = torch.tensor([3.0, 0.0, 9.0]), 0.9

    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(3), sigma, 1.0)
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Poisson(theta.exp()), obs=y)

    found = bt.leave_copy_out(model, counts, over={"sigma": [sigma]})
    for k, count in enumerate(counts.tolist()):
        exact = quad(
            lambda t, n=count: poisson.pmf(n, math.exp(t)) * norm.pdf(t, 1.0, sigma), -6.0, 8.0, epsabs=1e-12
        )[0]
        assert abs(float(found.elpd_copy[0, k]) - math.log(exact)) < 4 * float(found.mcse_copy[0, k]) + 1e-9
        assert float(found.mcse_copy[0, k]) < 0.05


def _rest_of_the_schools(y, noise, sigma):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    with pyro.plate("school", len(y)):
        pyro.sample("y", dist.Normal(level + sigma * z, noise), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.0, 5.0])
def test_eight_schools_by_brute_force_with_pyro_s_nuts(sigma):
    # A plain Pyro model of the other schools, and a new school drawn around each draw of its level.
    found = bt.leave_copy_out(eight_schools, effect, stderr, over={"sigma": [sigma]})
    generator = np.random.default_rng(0)
    for copy in (0, 3):
        rest = [k for k in range(8) if k != copy]
        chains = pyro.infer.MCMC(
            pyro.infer.NUTS(_rest_of_the_schools), 600, warmup_steps=200, disable_progbar=True
        )
        chains.run(effect[rest], stderr[rest], sigma)
        level = chains.get_samples()["level"].double().numpy()
        theta = level + sigma * generator.normal(size=level.size)
        density = norm.pdf(float(effect[copy]), theta, float(stderr[copy]))
        size = min(float(effective_size(density.reshape(1, -1, 1))[0]), level.size)
        error = density.std() / density.mean() / math.sqrt(size)
        value, mcse = (float(found[n][0, copy]) for n in ("elpd_copy", "mcse_copy"))
        assert abs(value - math.log(density.mean())) < 4 * math.hypot(error, mcse)
        assert error < 0.05


# -- whose observation is whose ------------------------------------------------------------------------------


def _owners(model, *args, **kwargs):
    program = LaneProgram(model, args, kwargs)
    return found_owners(program, tie_uses(program)[0])


def test_owners_are_read_off_the_model():
    owner = torch.tensor([2, 0, 0, 1, 2])

    def model(x, y, count, strength):
        theta = bt.tied("theta", bt.Tie.ring(3), strength, dist.Normal(0.0, 1.0), event_shape=(2,))
        common = pyro.sample("common", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 5):
            pyro.sample("y", dist.Normal((x * theta[owner]).sum(-1) + common, 1.0), obs=y)
        with pyro.plate("other", 2):
            pyro.sample("count", dist.Poisson(common.exp()), obs=count)

    # The second observation of copy 2 has covariates of 0: it moves with no copy.
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0], [3.0, 1.0], [0.0, 0.0]])
    for strength in (0.0, 1.0):
        found = _owners(model, x, torch.zeros(5), torch.ones(2), strength)
        assert found["y"].tolist() == [2, 0, 0, 1, -1]
        assert found["count"].tolist() == [-1, -1]


def test_designs_given_as_matrices_are_seen_through():
    design = torch.nn.functional.one_hot(torch.tensor([1, 3, 0, 2, 3])).double()

    def model(y):
        theta = bt.tied("theta", bt.Tie.grid(2, 2), 1.0, dist.Normal(0.0, 1.0))
        with pyro.plate("row", 5):
            pyro.sample("y", dist.Normal(design @ theta, 1.0), obs=y)

    assert _owners(model, torch.zeros(5))["y"].tolist() == [1, 3, 0, 2, 3]


def _increments(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.chain(4), sigma, dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(theta[1:] - theta[:-1], 1.0), obs=y)


def test_observations_of_several_copies_need_groups():
    y, over = torch.tensor([0.5, -0.2, 1.0]), {"sigma": [1.0]}
    with pytest.raises(ModelError, match=r"observation \(0,\) depends on 2 copies of 'theta': \[0, 1\]"):
        bt.leave_copy_out(_increments, y, over=over)
    found = bt.leave_copy_out(_increments, y, over=over, groups=[1, -1, 3], **FEW)
    assert found.num_observations.values.tolist() == [0, 1, 0, 1]
    # Increments of a chain are independent: each is predicted as N(0, sigma^2 + 1) whatever the others are.
    np.testing.assert_allclose(
        found.elpd_copy[0, [1, 3]], norm.logpdf(y[[0, 2]], 0.0, math.sqrt(2)), atol=1e-9
    )
    np.testing.assert_array_equal(
        bt.leave_copy_out(_increments, y, over=over, groups={"y": torch.tensor([1, -1, 3])}, **FEW).elpd,
        found.elpd,
    )


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        ([0, 1], ShapeError, r"of shape \(2,\)"),
        ([0, 1, 4], ShapeError, "from 0 to 4"),
        ([0.0, 1.0, 2.0], ShapeError, "float64"),
        ({"z": [0, 1, 2]}, NameLookupError, "no such observed site"),
    ],
)
def test_groups_that_do_not_fit_are_named(groups, error, match):
    with pytest.raises(error, match=match):
        bt.leave_copy_out(_increments, torch.zeros(3), over={"sigma": [1.0]}, groups=groups)


def test_what_cannot_be_left_out_is_named():
    def through_a_latent(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.chain(2), sigma, dist.Normal(0.0, 1.0))
        with pyro.plate("row", 2):
            mean = pyro.sample("mean", dist.Normal(theta, 1.0))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def clashing(y, *, sigma, groups):
        through_a_latent(y, sigma=sigma)

    over = {"sigma": [1.0]}
    with pytest.raises(ModelError, match="no observation whose distribution moves with a copy"):
        bt.leave_copy_out(through_a_latent, torch.zeros(2), over=over)
    with pytest.raises(NameLookupError, match="site 'phi'"):
        bt.leave_copy_out(_increments, torch.zeros(3), over=over, site="phi")
    with pytest.raises(KeywordError, match="keyword 'groups' of the model"):
        bt.leave_copy_out(clashing, torch.zeros(2), over=over)
    with pytest.raises(OptionError, match="'pyro_nuts', which fits one data set"):
        bt.leave_copy_out(_increments, torch.zeros(3), over=over, engine="pyro_nuts", groups=[0, 1, 2])
    # Given by position it is the model's own.
    with pytest.raises(ModelError, match="no observation"):
        bt.leave_copy_out(
            lambda y, groups, *, sigma: through_a_latent(y, sigma=sigma), torch.zeros(2), 1, over=over
        )


# -- single observations -------------------------------------------------------------------------------------

Y = torch.tensor([0.1, -0.4, 0.3, 25.0, 0.2, -0.1], dtype=torch.float64)
OWNER = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.fixture(scope="module")
def path():
    tie = bt.Tie.exchangeable(3)
    return bt.sweep(_gaussian(tie), Y, OWNER, over={"sigma": [0.0, 3.0, 9.0]}, num_draws=50, seed=2), tie


def test_bad_observations_are_refitted_exactly(path):
    tree, tie = path
    before, after = bt.compare(tree), bt.loo_refits(tree, _gaussian(tie), Y, OWNER, **FEW)
    refitted = after.refitted.values
    assert (before.num_bad_k > 0).any() and (after.num_bad_k == 0).all()
    np.testing.assert_array_equal(refitted, (before.pareto_k > before.attrs["good_k"]).values)
    np.testing.assert_array_equal(after.pareto_k, before.pareto_k)
    np.testing.assert_array_equal(after.elpd_i.values[~refitted], before.elpd_i.values[~refitted])
    for s, i in np.argwhere(refitted):
        sigma = float(tree["sweep"].sigma[s])
        exact = _exact(tie, sigma, Y.numpy(), OWNER.numpy(), np.arange(6) == i)
        assert float(after.elpd_i[s, i]) == pytest.approx(exact, abs=2e-6)
    np.testing.assert_allclose(after.elpd, after.elpd_i.sum("observation"))
    assert set(before.data_vars) < set(after.data_vars)
    np.testing.assert_allclose(after.p_loo + after.elpd, before.p_loo + before.elpd)


def test_nothing_to_refit_leaves_compare_as_it_is(path):
    _, tie = path
    quiet = bt.sweep(_gaussian(tie), Y.clamp(max=0.5), OWNER, over={"sigma": [1.0]}, num_draws=500)
    found = bt.loo_refits(quiet, _gaussian(tie), Y.clamp(max=0.5), OWNER)
    assert not found.refitted.any()
    np.testing.assert_array_equal(found.elpd, bt.compare(quiet).elpd)


def test_other_data_or_no_likelihood_are_refused(path):
    tree, tie = path
    with pytest.raises(DataError, match="values that are not those of the path"):
        bt.loo_refits(tree, _gaussian(tie), Y + 1.0, OWNER)
    with pytest.raises(NameLookupError, match="without pointwise log likelihoods"):
        bt.loo_refits(tree.drop_nodes("log_likelihood"), _gaussian(tie), Y, OWNER)
