"""TiedNormal, TieReparam and tied: dense normal distributions, exact limits, Pyro's own inference."""

import math
import resource
import sys
import time
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.ops.stats import effective_sample_size
from pyro.optim import PyroOptim
from tie_kinds import TIES, dense_covariance, dense_inverse
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bayestie import Tie, TiedNormal, TieReparam, tied
from bayestie._errors import BaseError, FormError, ModelError, ShapeError, StrengthError

FORMS = ("level", "copies", "matched")
LEGAL = {
    f"{name}-{form}": (tie, form)
    for name, tie in TIES.items()
    for form in FORMS
    if not (form == "copies" and tie.has_hub) and not (form != "level" and tie.anchored)
}
every_tie_and_form = pytest.mark.parametrize(("tie", "form"), LEGAL.values(), ids=LEGAL.keys())
BASE = (0.3, 1.3)


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def normal_base() -> dist.Normal:
    return dist.Normal(torch.tensor(BASE[0]), torch.tensor(BASE[1]))


def trace_of(model, values: dict | None = None) -> Any:
    conditioned = pyro.condition(model, values) if values else model
    trace = pyro.poutine.trace(conditioned).get_trace()
    trace.compute_log_prob()
    return trace


def prior_of(tie, sigma, base, form: Any = "level", **kwargs) -> Any:
    return TiedNormal(tie, sigma, base, form, **kwargs).prior


# -- densities -----------------------------------------------------------------------------------------------


@every_tie_and_form
@pytest.mark.parametrize("sigma", [0.05, 40.0])
def test_log_prob_is_the_dense_normal(tie, form, sigma):
    dense = dist.MultivariateNormal(
        torch.full((tie.num_copies,), BASE[0]), dense_covariance(tie, sigma, BASE[1], form)
    )
    theta = dense.sample((3,))
    found = TiedNormal(tie, sigma, normal_base(), form).log_prob(theta)
    # Relative to the size of the terms that make up the density, one per copy.
    torch.testing.assert_close(found, dense.log_prob(theta), rtol=1e-10, atol=1e-9 * tie.num_copies)


@pytest.mark.parametrize(("tie", "form"), [v for k, v in LEGAL.items() if "1" not in k], ids=str)
def test_log_prob_with_events_batches_and_a_base_per_component(tie, form):
    """Event elements are independent, so the density is a product of dense ones."""
    sigma = torch.tensor([[0.5], [2.0]]) * torch.tensor([1.0, 0.3, 0.8])  # batch 2, event 3
    num = tie.num_components
    loc, scale = torch.randn(num, 3), torch.rand(num, 3) + 0.5
    base = dist.Normal(loc, scale) if num > 1 else dist.Normal(loc[0], scale[0])
    found = TiedNormal(tie, sigma, base, form, event_shape=(3,))
    assert found.batch_shape == (2,) and found.event_shape == (tie.num_copies, 3)
    theta = torch.randn(4, 2, tie.num_copies, 3)
    expected = torch.zeros(4, 2)
    for b in range(2):
        for e in range(3):
            covariance = dense_covariance(tie, sigma[b, e].item(), scale[:, e], form)
            law = dist.MultivariateNormal(loc[:, e][tie.labels], covariance)
            expected[:, b] += law.log_prob(theta[:, b, :, e])
            variance = found.variance[b, :, e]
            torch.testing.assert_close(variance, covariance.diagonal(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.log_prob(theta), expected, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(found.mean, loc[tie.labels].expand(2, -1, -1))


TRIL = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["exchangeable", "chain", "anchored", "groups", "weighted", "mixed"])
@pytest.mark.parametrize("correlated_base", [False, True])
def test_event_scale_tril_correlates_deviations(name, correlated_base):
    tie, sigma = TIES[name], torch.tensor([0.5, 1.5])
    if correlated_base:
        base_covariance = torch.tensor([[2.0, -0.7], [-0.7, 1.0]])
        base = dist.MultivariateNormal(torch.tensor([0.1, -0.2]), base_covariance)
    else:
        base_covariance = torch.diag(torch.tensor([2.0, 0.5]).square())
        base = dist.Normal(torch.tensor([0.1, -0.2]), torch.tensor([2.0, 0.5]))
    law = TiedNormal(tie, sigma, base, event_shape=(2,), event_scale_tril=TRIL)
    root = sigma[:, None] * TRIL
    together = (tie.labels[:, None] == tie.labels).double()
    covariance = torch.kron(together, base_covariance) + torch.kron(dense_inverse(tie), root @ root.mT)
    loc = torch.tensor([0.1, -0.2]).repeat(tie.num_copies)
    dense = dist.MultivariateNormal(loc, covariance)
    theta = dense.sample((3,))
    found = law.log_prob(theta.unflatten(-1, (tie.num_copies, 2)))
    torch.testing.assert_close(found, dense.log_prob(theta), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(law.variance.flatten(), covariance.diagonal())


@pytest.mark.parametrize("name", ["exchangeable", "groups"])
def test_a_multivariate_base_without_event_correlation(name):
    tie, sigma, base_covariance = (
        TIES[name],
        torch.tensor([0.5, 1.5]),
        torch.tensor([[2.0, -0.7], [-0.7, 1.0]]),
    )
    law = TiedNormal(tie, sigma, dist.MultivariateNormal(torch.zeros(2), base_covariance), event_shape=(2,))
    together = (tie.labels[:, None] == tie.labels).double()
    covariance = torch.kron(together, base_covariance)
    covariance += torch.kron(torch.eye(tie.num_copies), torch.diag(sigma.square()))
    theta = torch.randn(3, tie.num_copies, 2)
    expected = dist.MultivariateNormal(torch.zeros(2 * tie.num_copies), covariance).log_prob(theta.flatten(1))
    torch.testing.assert_close(law.log_prob(theta), expected, rtol=1e-10, atol=1e-10)


def test_any_base_on_the_line_for_graph_ties():
    """Only the level's law changes with the base."""
    tie, theta = Tie.grid(2, 3), torch.randn(4, 6)
    student, normal = dist.StudentT(3.0, 0.1, 2.0), normal_base()
    difference = TiedNormal(tie, 0.7, student).log_prob(theta) - TiedNormal(tie, 0.7, normal).log_prob(theta)
    mean = theta.mean(-1)
    torch.testing.assert_close(difference, student.log_prob(mean) - normal.log_prob(mean))


def test_a_known_level():
    theta = torch.randn(4, 5)
    expected = dist.Normal(2.0, 0.7).log_prob(theta).sum(-1)
    torch.testing.assert_close(TiedNormal(Tie.exchangeable(5), 0.7, 2.0).log_prob(theta), expected)
    levels = torch.tensor([1.0, -1.0])
    tie = Tie.groups([0, 1, 0, 1, 1])
    expected = dist.Normal(levels[tie.labels], 0.7).log_prob(theta).sum(-1)
    torch.testing.assert_close(TiedNormal(tie, 0.7, levels).log_prob(theta), expected)
    assert "t_level" not in trace_of(lambda: tied("t", tie, 0.7, levels)).nodes
    with pytest.raises(BaseError, match="log_prob of tied site 'TiedNormal': found a known level"):
        TiedNormal(Tie.chain(5), 0.7, 2.0).log_prob(theta)


def test_copies_is_the_penalty():
    """log p(theta) = sum_k log N(theta_k; m0, s) - q / (2 sigma^2) + constant."""
    tie, sigma, theta = Tie.edges(5, [(0, 3), (3, 1), (2, 4)], [0.5, 2.0, 1.0]), 0.4, torch.randn(6, 5)
    penalised = normal_base().log_prob(theta).sum(-1) - tie.energy(theta) / (2 * sigma**2)
    constant = TiedNormal(tie, sigma, normal_base(), "copies").log_prob(theta) - penalised
    torch.testing.assert_close(constant, constant[:1].expand(6))


@every_tie_and_form
@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_level_and_deviations_make_up_the_density(tie, form, sigma):
    """tied's sites against log p(theta), or log p(theta, hubs) where the level is a hub."""
    trace = trace_of(lambda: tied("t", tie, sigma, normal_base(), form=form))
    about = trace.nodes["t"]["infer"]["bayestie"]
    prior, level, theta = about["prior"], about["level"], trace.nodes["t"]["value"]
    deviations = 0.0 if about["z"] is None else prior.deviation_log_prob(about["z"])
    level_log_prob = prior.level_distribution.log_prob(level)
    if tie.has_hub:
        # log p(theta, hubs) by (level, z) -> (level, theta): z's density over the map's volume.

        def theta_of(z):
            return prior.combine(level, z)

        given_hubs = dist.Normal(0.0, 1.0).log_prob(about["z"]).sum()
        jacobian = torch.autograd.functional.jacobian(theta_of, about["z"])
        volume = 0.5 * (jacobian.mT @ jacobian).slogdet().logabsdet
        means = [p.num_copies for p in tie.components if not p.hub and not p.anchored]
        expected = given_hubs - volume - 0.5 * sum(map(math.log, means))
        torch.testing.assert_close(deviations, expected, rtol=1e-10, atol=1e-10)
        return
    expected = TiedNormal(tie, sigma, normal_base(), form).log_prob(theta)
    torch.testing.assert_close(level_log_prob + deviations, expected, rtol=1e-10, atol=1e-9)
    if about["z"] is not None:
        torch.testing.assert_close(prior.energy(about["z"]), tie.energy(theta, level), rtol=1e-8, atol=1e-12)


# -- draws, moments, shapes ----------------------------------------------------------------------------------


@every_tie_and_form
def test_rsample_moments(tie, form):
    """Means and covariances within five of their own Monte Carlo errors."""
    law, num = TiedNormal(tie, 0.7, normal_base(), form), 20_000
    centred = law.rsample((num,)) - law.mean
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / math.sqrt(num)
    covariance = dense_covariance(tie, 0.7, BASE[1], form)
    assert ((products.mean(0) - covariance).abs() < 5 * error).all()
    assert (centred.mean(0).abs() < 5 * centred.std(0) / math.sqrt(num)).all()
    torch.testing.assert_close(law.variance, covariance.diagonal(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["exchangeable", "chain", "mixed", "no-edge"])
def test_shapes_and_expand(name):
    tie = TIES[name]
    law = TiedNormal(tie, torch.rand(2, 1, 3), normal_base(), event_shape=(3,))
    assert law.batch_shape == (2, 1) and law.event_shape == (tie.num_copies, 3)
    wide = law.expand((4, 2, 5))
    assert wide.rsample((6,)).shape == wide.shape((6,)) == (6, 4, 2, 5, tie.num_copies, 3)
    theta = law.rsample((5,))[:, :, 0].movedim(0, 1)
    torch.testing.assert_close(wide.log_prob(theta), law.log_prob(theta).expand(4, 2, 5))
    assert wide.mean.shape == wide.variance.shape == wide.shape()
    assert law.support.check(theta).all() and wide.expand((4, 2, 5)).batch_shape == (4, 2, 5)
    smooth = wide.to_event(1)
    torch.testing.assert_close(smooth.log_prob(theta), wide.log_prob(theta).sum(-1))


def test_sample_has_no_gradient_and_rsample_does():
    sigma = torch.tensor(0.5, requires_grad=True)
    law = TiedNormal(Tie.chain(3), sigma, normal_base())
    assert law.has_rsample and law.rsample().requires_grad and not law.sample().requires_grad


@every_tie_and_form
@pytest.mark.parametrize("sigma", [0.6, BASE[1]])
def test_gradients(tie, form, sigma):
    """log_prob and the map against finite differences, also at sigma = s, where the filter changes branch."""

    def density(sigma, loc, scale, theta):
        return TiedNormal(tie, sigma, dist.Normal(loc, scale), form).log_prob(theta)

    def parts(sigma, loc, scale, level, z):
        prior = prior_of(tie, sigma, dist.Normal(loc, scale), form)
        return prior.combine(level, z if tie.rank else None), prior.level_distribution.mean, prior.variance()

    num = tie.num_components
    values = [torch.tensor(v, requires_grad=True) for v in (sigma, *BASE)]
    theta = torch.randn(tie.num_copies, requires_grad=True)
    level = torch.randn((num,) if num > 1 else (), requires_grad=True)
    z = torch.randn(tie.rank, requires_grad=True)
    assert torch.autograd.gradcheck(density, (*values, theta), fast_mode=True)
    assert torch.autograd.gradcheck(parts, (*values, level, z), fast_mode=True)


# -- limits --------------------------------------------------------------------------------------------------


@every_tie_and_form
def test_hard_sharing_is_exact(tie, form):
    """sigma = 0: every copy is its level, bit for bit, and almost so at 1e-300; finite gradients."""
    trace = trace_of(lambda: tied("t", tie, 0.0, normal_base(), form=form))
    level = trace.nodes["t"]["infer"]["bayestie"]["level"]
    expected = level.reshape(-1)[tie.labels]
    assert torch.equal(trace.nodes["t"]["value"], expected)
    size = tie.layout.component_sizes.double()
    scale = BASE[1] / size.sqrt() if form == "copies" else torch.full_like(size, BASE[1])
    if form != "level":
        found = prior_of(tie, 0.0, normal_base(), form).level_scale()
        torch.testing.assert_close(found.expand(len(size)), scale)

    def theta(strength, s, level, z):
        return prior_of(tie, strength, dist.Normal(0.0, s), form).combine(level, z if tie.rank else None)

    z = torch.randn(tie.rank)
    torch.testing.assert_close(theta(torch.tensor(1e-300), 1.0, level, z), expected, rtol=0, atol=1e-290)
    inputs = [torch.tensor(0.0), torch.tensor(1.3), level, z]
    inputs = [x.detach().requires_grad_() for x in inputs]
    found = torch.autograd.grad(theta(*inputs).sum(), inputs, allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in found)


@every_tie_and_form
def test_no_sharing_is_exact(tie, form):
    """sigma = inf: K independent copies ~ base (form copies and matched); finite gradients."""
    if form == "level":
        with pytest.raises(StrengthError, match="inf with form 'level'"):
            tied("t", tie, math.inf, normal_base())
        return
    for sigma in (math.inf, 1e200):
        covariance = torch.zeros(tie.num_copies, tie.num_copies)
        prior = prior_of(tie, sigma, normal_base(), form)
        scale = prior.level_scale().expand(tie.num_components)
        together = (tie.labels[:, None] == tie.labels).double()
        covariance = together * scale.square()[tie.labels]
        if tie.rank:
            zero = torch.zeros(tie.num_components if tie.num_components > 1 else ())
            maps = torch.stack([prior.combine(zero, z) for z in torch.eye(tie.rank)])
            covariance = covariance + maps.mT @ maps
        torch.testing.assert_close(
            covariance, BASE[1] ** 2 * torch.eye(tie.num_copies), rtol=1e-10, atol=1e-12
        )
        theta = torch.randn(tie.num_copies)
        found = TiedNormal(tie, sigma, normal_base(), form).log_prob(theta)
        torch.testing.assert_close(found, normal_base().log_prob(theta).sum(), rtol=1e-10, atol=1e-10)

    def total(sigma, s, level_unit, z):
        prior = prior_of(tie, sigma, dist.Normal(0.0, s), form)
        return prior.combine(prior.level_scale() * level_unit, z if tie.rank else None).sum()

    shape = (tie.num_components,) if tie.num_components > 1 else ()
    inputs = [torch.tensor(math.inf), torch.tensor(1.3), torch.randn(shape), torch.randn(tie.rank)]
    inputs = [x.requires_grad_() for x in inputs]
    found = torch.autograd.grad(total(*inputs), inputs, allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in found)


@settings(max_examples=50, deadline=None)
@given(
    st.floats(1e-6, 1e6), st.floats(0.1, 10.0), st.sampled_from([k for k in LEGAL if k.endswith("matched")])
)
def test_matched_keeps_the_average_variance_of_a_copy(sigma, scale, key):
    tie, _ = LEGAL[key]
    sigma, scale = torch.tensor(sigma, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    variance = TiedNormal(tie, sigma, dist.Normal(torch.zeros_like(scale), scale), "matched").variance
    for number in range(tie.num_components):
        mean = variance[tie.labels == number].mean()
        torch.testing.assert_close(mean, scale.square(), rtol=1e-9, atol=0)


def test_deviations_have_no_density_at_zero():
    prior = prior_of(Tie.chain(4), torch.tensor([0.0, 0.5]), normal_base(), event_shape=(2,))
    alone = prior_of(Tie.chain(4), 0.5, normal_base())
    z = torch.randn(3, 2)
    torch.testing.assert_close(prior.deviation_log_prob(z), alone.deviation_log_prob(z[:, 1]))
    assert prior.energy(z)[0] == 0


# -- in Pyro -------------------------------------------------------------------------------------------------


@every_tie_and_form
def test_tie_reparam_changes_coordinates_only(tie, form):
    """Same values; same density after the Jacobian; same gradients."""

    def model():
        return pyro.sample("t", TiedNormal(tie, 0.7, normal_base(), form))

    def stated():
        return tied("t", tie, 0.7, normal_base(), form=form)

    reparametrised = pyro.poutine.reparam(model, {"t": TieReparam()})
    pyro.set_rng_seed(3)
    trace = trace_of(reparametrised)
    pyro.set_rng_seed(3)
    other = trace_of(stated)
    assert list(trace.nodes) == list(other.nodes)
    assert torch.equal(trace.nodes["t"]["value"], other.nodes["t"]["value"])
    latent = {n: site["value"].detach().clone().requires_grad_() for n, site in trace.nodes.items()
              if site["type"] == "sample" and not site["is_observed"]}  # fmt: skip
    names, sizes = list(latent), [value.numel() for value in latent.values()]

    def unpack(flat):
        return {n: v.reshape(latent[n].shape) for n, v in zip(names, flat.split(sizes), strict=True)}

    flat = torch.cat([value.flatten() for value in latent.values()]).detach().requires_grad_()
    new = trace_of(reparametrised, unpack(flat)).log_prob_sum()
    if tie.has_hub:
        return  # (level, z) -> theta drops the hub: the density was compared above, coordinate by coordinate

    def theta_of(flat):
        return trace_of(reparametrised, unpack(flat)).nodes["t"]["value"]

    jacobian = torch.autograd.functional.jacobian(theta_of, flat.detach())
    old = TiedNormal(tie, 0.7, normal_base(), form).log_prob(theta_of(flat)) + jacobian.slogdet().logabsdet
    torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-9)
    found, expected = torch.autograd.grad(new, flat)[0], torch.autograd.grad(old, flat)[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_tie_reparam_at_zero_in_a_plate_and_with_more_event_dims():
    def model():
        with pyro.plate("plate", 3):
            a = pyro.sample("a", TiedNormal(Tie.chain(4), 0.0, normal_base()))
        b = pyro.sample("b", TiedNormal(Tie.chain(4), torch.zeros(2), normal_base()).to_event(1))
        return a, b

    trace = trace_of(pyro.poutine.reparam(model, {"a": TieReparam(), "b": TieReparam()}))
    assert trace.nodes["a_z"]["value"].shape == trace.nodes["a_z"]["fn"].shape() == (3, 3)
    assert trace.nodes["b_level"]["fn"].batch_shape == () and trace.nodes["b_level"]["value"].shape == (2,)
    for name in "ab":
        theta = trace.nodes[name]["value"]
        assert torch.equal(theta, theta[..., :1].expand_as(theta))


@pytest.mark.parametrize(
    ("name", "form"), [("exchangeable", "matched"), ("chain", "copies"), ("mixed", "level")]
)
def test_tie_reparam_starts_from_an_initial_value(name, form):
    theta = torch.randn(TIES[name].num_copies)

    def model():
        return pyro.sample("t", TiedNormal(TIES[name], 0.7, normal_base(), form))

    reparametrised = pyro.poutine.reparam(model, {"t": TieReparam()})
    guide = AutoNormal(reparametrised, init_loc_fn=init_to_value(values={"t": theta}))
    guide()
    found = pyro.condition(reparametrised, guide.median())()
    torch.testing.assert_close(found, theta)


def test_tie_reparam_names_what_it_cannot_do():
    def model(obs=None):
        return pyro.sample("t", TiedNormal(Tie.chain(3), 0.5, normal_base()), obs=obs)

    with pytest.raises(ModelError, match="TieReparam at site 't': found an observed value"):
        pyro.poutine.reparam(model, {"t": TieReparam()})(torch.zeros(3))
    with pytest.raises(ModelError, match="TieReparam at site 'x': found a Normal"):
        pyro.poutine.reparam(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), {"x": TieReparam()})()


def test_sites_and_what_they_carry():
    tie = Tie.groups("aab")
    trace = trace_of(lambda: tied("t", tie, 0.5, normal_base(), event_shape=(2,)))
    assert list(trace.nodes)[1:-1] == ["t_z", "t_level", "t"]
    assert trace.nodes["t_z"]["value"].shape == (3, 2) and trace.nodes["t_level"]["value"].shape == (2, 2)
    assert (
        trace.nodes["t_z"]["infer"]["bayestie_z"] == trace.nodes["t_level"]["infer"]["bayestie_level"] == "t"
    )
    about = trace.nodes["t"]["infer"]["bayestie"]
    assert about["tie"] is tie and about["form"] == "level" and about["sigma"] == 0.5
    assert about["event_shape"] == (2,) and about["level"] is trace.nodes["t_level"]["value"]
    fixed = trace_of(lambda: tied("t", tie, math.inf, normal_base(), form="matched"))
    assert list(fixed.nodes)[1:-1] == ["t_z", "t_level_z", "t_level", "t"]
    assert torch.equal(fixed.nodes["t_level"]["value"], torch.full((2,), BASE[0]))


Y = torch.tensor([1.2, 0.4, -0.3, 0.8], dtype=torch.float64)


def learned(y: Any = Y, event_shape=()):
    """The copies are an event of the likelihood, so that the model also runs in batches."""
    sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros(event_shape), 0.5).to_event(len(event_shape)))
    theta = tied("theta", Tie.chain(4), sigma, dist.Normal(0.0, 2.0), event_shape=event_shape)
    shown = theta if not event_shape else theta[..., 0]
    return pyro.sample("y", dist.Normal(shown, 0.5).to_event(1), obs=y)


def hard(y: Any = Y):
    theta = tied("theta", Tie.groups("aabb", Tie.ring), 0.0, dist.Normal(0.0, 2.0))
    with pyro.plate("copy", 4):
        return pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def test_nuts_with_a_learned_strength():
    mcmc = MCMC(NUTS(learned, max_tree_depth=4), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    assert draws["theta_z"].shape == (20, 3) and draws["theta_level"].shape == (20,)
    assert all(value.isfinite().all() and value.std() > 0 for value in draws.values())


def test_nuts_finds_the_exact_posterior():
    """sigma = 0, a Gaussian target: means of the levels within five Monte Carlo errors (by their ESS)."""
    mcmc = MCMC(NUTS(hard, max_tree_depth=5), num_samples=80, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["theta_level"]
    size = effective_sample_size(draws, chain_dim=0, sample_dim=1)
    precision = 1 / 2.0**2 + 2 / 0.5**2
    expected = torch.stack([Y[:2].sum(), Y[2:].sum()]) / 0.5**2 / precision
    assert ((draws.mean((0, 1)) - expected).abs() < 5 / torch.sqrt(precision * size)).all()


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize(("event_shape", "vectorised"), [((), False), ((), True), ((2,), True)])
def test_svi(guide_class, event_shape, vectorised):
    def model():
        return learned(event_shape=event_shape)

    guide = guide_class(model)
    loss = Trace_ELBO(num_particles=2, vectorize_particles=vectorised, max_plate_nesting=0)
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 0.1}), loss)
    losses: Any = [svi.step() for _ in range(20)]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("event_shape", [(), (2,)])
def test_particles_in_a_batch_are_particles_in_a_loop(event_shape):
    with pyro.plate("particles", 5, dim=-1):
        trace = trace_of(lambda: learned(None, event_shape))
    together = trace.log_prob_sum(lambda name, _: name != "particles")
    latent = {k: trace.nodes[k]["value"] for k in ("sigma", "theta_level", "theta_z", "y")}
    alone = [
        trace_of(lambda: learned(None, event_shape), {k: v[p] for k, v in latent.items()}).log_prob_sum()
        for p in range(5)
    ]
    torch.testing.assert_close(together, torch.stack(alone).sum())


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("event_shape", [(), (2,)])
def test_predictive(parallel, event_shape):
    def model(y=None):
        return learned(y, event_shape)

    prior = Predictive(model, num_samples=6, parallel=parallel)()
    assert prior["theta"].shape == (6, 4, *event_shape)
    posterior = {k: v for k, v in prior.items() if k in ("sigma", "theta_level", "theta_z")}
    again = Predictive(model, posterior, parallel=parallel, return_sites=("theta", "y"))()
    torch.testing.assert_close(again["theta"], prior["theta"])


def test_one_strength_for_all_event_elements_under_particles():
    """A scalar strength sampled in the model has the particles' shape and broadcasts over the event."""

    def model():
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        return tied("t", Tie.chain(4), sigma, dist.Normal(0.0, 1.0), event_shape=(3,))

    with pyro.plate("particles", 5, dim=-2):
        trace = trace_of(model)
    sigma, theta = trace.nodes["sigma"]["value"], trace.nodes["t"]["value"]
    assert sigma.shape == (5, 1) and theta.shape == (5, 1, 4, 3)
    level, z = trace.nodes["t_level"]["value"], trace.nodes["t_z"]["value"]
    for p in range(5):
        alone = prior_of(Tie.chain(4), sigma[p, 0], dist.Normal(0.0, 1.0), event_shape=(3,))
        torch.testing.assert_close(theta[p, 0], alone.combine(level[p, 0], z[p, 0]))

    with (
        pyro.plate("ambiguous", 3),
        pytest.raises(ShapeError, match=r"sigma of tied site .t.: .* may be either"),
    ):
        model()


def test_replay_condition_and_plates():
    def model():
        with pyro.plate("outer", 3):
            return tied(
                "t", Tie.ring(4), torch.tensor([0.1, 0.5, 2.0]), dist.Normal(0.0, 1.0), form="matched"
            )

    trace = trace_of(model)
    assert trace.nodes["t"]["value"].shape == (3, 4)
    again = trace_of(pyro.poutine.replay(model, trace=trace))
    assert torch.equal(again.nodes["t"]["value"], trace.nodes["t"]["value"])
    still = trace_of(model, {"t_z": torch.zeros(3, 3)})
    level = still.nodes["t_level"]["value"]
    torch.testing.assert_close(still.nodes["t"]["value"], level[:, None].expand(3, 4))


def test_a_handler_may_pick_other_coordinates():
    class Centred(pyro.poutine.messenger.Messenger):
        def _pyro_tied(self, msg):
            def centred(name, *args):
                return pyro.sample(name, TiedNormal(*args))

            msg["fn"] = centred

    with Centred():
        trace = trace_of(lambda: tied("t", Tie.chain(4), 0.5, normal_base()))
    assert "t_z" not in trace.nodes and not trace.nodes["t"]["is_observed"]


LANES = ("exchangeable", "chain", "anchored", "weighted", "groups-complete", "mixed")


@pytest.mark.parametrize(("tie", "form"), [LEGAL[k] for k in LEGAL if k.rsplit("-", 1)[0] in LANES], ids=str)
def test_lanes(tie, form):
    """vmap(grad) and its make_fx graph against one strength at a time, at sigma = 0 and inf too."""
    tie = Tie.disjoint(tie)  # a fresh one: constants are first built under the transforms
    free = form == "matched" and tie.has_hub
    shape = (tie.num_components,) if tie.num_components > 1 else ()

    def log_joint(sigma, level, z):
        values = {"t_level_z" if free else "t_level": level} | ({"t_z": z} if tie.rank else {})
        trace = trace_of(lambda: tied("t", tie, sigma, dist.Normal(0.3, 1.3), form=form), values)
        prior = trace.nodes["t"]["infer"]["bayestie"]["prior"]
        extra = prior.deviation_log_prob(z) + prior.energy(z) if tie.rank else 0.0
        return trace.log_prob_sum() + trace.nodes["t"]["value"].square().sum() + extra

    sigmas = torch.tensor([0.0, 1e-8, 0.5, 7.0 if form == "level" else math.inf])
    lanes = (sigmas, torch.randn(4, *shape), torch.randn(4, tie.rank))
    before = torch.distributions.Distribution._validate_args
    pyro.enable_validation(False)
    try:
        step = vmap(grad(log_joint, argnums=(1, 2)))
        found = step(*lanes)
        graph = make_fx(step)(*lanes)(*lanes)
        for lane in range(4):
            alone = grad(log_joint, argnums=(1, 2))(*(x[lane] for x in lanes))
            for batched, traced, single in zip(found, graph, alone, strict=True):
                assert single.isfinite().all()
                torch.testing.assert_close(batched[lane], single)
                torch.testing.assert_close(traced[lane], single)
    finally:
        pyro.enable_validation(before)
    kept = [*tie.layout.__dict__.values(), *tie.layout.__dict__.get("_casts", {}).values()]
    assert not any(is_functorch_wrapped_tensor(value) for value in kept if isinstance(value, torch.Tensor))


def test_a_million_copies():
    """Drawn and scored in seconds and under 2 GB, in every form."""
    tie = Tie.chain(1_000_000)
    unit = 1e6 if sys.platform != "darwin" else 1e9
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for form in FORMS:
        law = TiedNormal(tie, 0.1, dist.Normal(0.0, 1.0), form)
        theta = law.rsample()
        steps = dist.Normal(0.0, 0.1).log_prob(theta.diff()).sum()
        if form == "level":
            mean = dist.Normal(0.0, 1.0).log_prob(theta.mean())
            # p(theta) = p(mean) p(steps) |d steps / d contrasts|, whose logarithm is log sqrt(|L|_+ / K) = 0.
            torch.testing.assert_close(law.log_prob(theta), mean + steps, rtol=1e-10, atol=0)
        assert law.log_prob(theta).isfinite()
    assert time.process_time() - start < 30
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit < 2


def test_dtype_follows_the_arguments():
    half = torch.tensor(0.5, dtype=torch.float32)
    assert tied("t", Tie.chain(3), half, normal_base()).dtype == torch.float64
    base = dist.Normal(torch.zeros((), dtype=torch.float32), torch.ones((), dtype=torch.float32))
    assert tied("u", Tie.chain(3), 0.5, base).dtype == torch.float32


N = dist.Normal
WRONG: dict[str, Any] = {
    "word": "big",
    "form": "soft",
    "base": "N(0,1)",
    "torch": torch.distributions.Normal(0.0, 1.0),
}
BAD = {
    "negative": (
        lambda: tied("t", Tie.chain(3), -0.1, N(0.0, 1.0)),
        StrengthError,
        "found -0.1, expected 0 or more",
    ),
    "nan": (
        lambda: tied("t", Tie.chain(3), math.nan, N(0.0, 1.0)),
        StrengthError,
        "sigma of tied site 't': found nan",
    ),
    "nan tensor": (
        lambda: tied("t", Tie.chain(3), torch.tensor(math.nan), N(0.0, 1.0)),
        StrengthError,
        "found nan",
    ),
    "inf": (
        lambda: tied("t", Tie.chain(3), torch.tensor(math.inf), N(0.0, 1.0)),
        StrengthError,
        "inf with form 'level'",
    ),
    "word": (lambda: tied("t", Tie.chain(3), WRONG["word"], N(0.0, 1.0)), StrengthError, "found a str"),
    "shape": (
        lambda: tied("t", Tie.chain(3), torch.ones(2), N(0.0, 1.0), event_shape=(3,)),
        ShapeError,
        r"sigma of tied site 't': found shape \(2,\)",
    ),
    "batch outside a plate": (
        lambda: tied("t", Tie.chain(3), torch.ones(2), N(0.0, 1.0)),
        ShapeError,
        r"found shape \(2,\)",
    ),
    "form": (
        lambda: tied("t", Tie.chain(3), 1.0, N(0.0, 1.0), form=WRONG["form"]),
        FormError,
        "found 'soft'",
    ),
    "copies, exchangeable": (
        lambda: tied("t", Tie.exchangeable(3), 1.0, N(0.0, 1.0), form="copies"),
        FormError,
        "whose hub is no copy, .* Use Tie.complete",
    ),
    "copies, anchored": (
        lambda: tied("t", Tie.chain(3, anchored=True), 1.0, N(0.0, 1.0), form="copies"),
        FormError,
        "with an anchored chain",
    ),
    "copies, StudentT": (
        lambda: tied("t", Tie.chain(3), 1.0, dist.StudentT(3.0), form="copies"),
        BaseError,
        "base of tied site 't': found a StudentT, expected a Normal",
    ),
    "matched, known": (
        lambda: tied("t", Tie.chain(3), 1.0, 0.0, form="matched"),
        BaseError,
        "found a known level",
    ),
    "base type": (
        lambda: tied("t", Tie.chain(3), 1.0, WRONG["base"]),
        BaseError,
        "base of tied site 't': found a str",
    ),
    "torch base": (
        lambda: tied("t", Tie.chain(3), 1.0, WRONG["torch"]),
        BaseError,
        "expected a number or a tensor or a distribution of pyro.distributions",
    ),
    "discrete base": (
        lambda: tied("t", Tie.chain(3), 1.0, dist.Poisson(1.0)),
        BaseError,
        "found the discrete Poisson",
    ),
    "base shape": (
        lambda: tied("t", Tie.chain(3), 1.0, N(torch.zeros(2), 1.0), event_shape=(3,)),
        BaseError,
        r"found batch shape \(2,\), event shape \(\)",
    ),
    "base event": (
        lambda: tied("t", Tie.chain(3), 1.0, dist.MultivariateNormal(torch.zeros(2), torch.eye(2))),
        BaseError,
        r"event shape \(2,\)",
    ),
    "tril form": (
        lambda: tied(
            "t", Tie.chain(3), 1.0, N(0.0, 1.0), form="matched", event_shape=(2,), event_scale_tril=TRIL
        ),
        FormError,
        "event_scale_tril of tied site 't': found form 'matched'",
    ),
    "tril shape": (
        lambda: tied("t", Tie.chain(3), 1.0, N(0.0, 1.0), event_scale_tril=TRIL),
        ShapeError,
        r"\(2, 2\)",
    ),
    "tril upper": (
        lambda: tied("t", Tie.chain(3), 1.0, N(0.0, 1.0), event_shape=(2,), event_scale_tril=TRIL.mT),
        ShapeError,
        "above the diagonal",
    ),
    "density at 0": (
        lambda: TiedNormal(Tie.chain(3), 0.0, N(0.0, 1.0)).log_prob(torch.zeros(3)),
        StrengthError,
        "sigma of TiedNormal: found 0",
    ),
    "density, half line": (
        lambda: TiedNormal(Tie.chain(3), 1.0, dist.LogNormal(0.0, 1.0)).log_prob(torch.zeros(3)),
        BaseError,
        "a base on part of the real line",
    ),
    "density, hub": (
        lambda: TiedNormal(Tie.exchangeable(3), 1.0, dist.StudentT(3.0)).log_prob(torch.zeros(3)),
        BaseError,
        "found a StudentT base with exchangeable copies.* tied",
    ),
}


@pytest.mark.parametrize(("state", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_statements_are_named(state, error, message):
    with pytest.raises(error, match=message):
        state()
