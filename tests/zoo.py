"""Small Pyro models of every kind the lane program must run, with their data.

A case may carry its own log joint in unconstrained space, where Pyro's potential is not the reference.
Pyro fixes the map of a support at the first run, ours follows a support that moves with other latents;
and obs_mask= leaves flat directions in Pyro's potential, which ours fills with their prior.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

import bayestie as bt


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Fixed standard normal numbers, the same whatever ran before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Case:
    """A model with its data; ``affine`` says whether its likelihood is one of A u + b."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    affine: bool = False
    max_plate_nesting: int | None = None  # enumerated models only
    log_joint: Callable[[Tensor], Tensor] | None = None


X = numbers(12, 3)
Y = numbers(12, seed=1)
COUNTS = torch.tensor([0.0, 2.0, 1.0, 5.0, 3.0, 0.0, 1.0, 4.0, 2.0, 2.0, 7.0, 1.0], dtype=torch.float64)
YES = (numbers(12, seed=2) > 0).double()
MASK = YES > 0.5
GROUP = torch.arange(12) % 4
CATEGORY = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 1, 2, 0])


def normal_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.3), obs=y)


def linear_unknown_scale(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, noise), obs=y)


def logistic(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def logistic_by_probabilities(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(probs=torch.sigmoid(x @ beta)), obs=y)


def poisson_groups(x, y, group):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("group", 4):
        effect = pyro.sample("effect", dist.Normal(0.0, 0.5))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((x @ beta + effect[group]).exp()), obs=y)


def binomial(x, heads):
    beta = pyro.sample("beta", dist.Laplace(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(heads)):
        pyro.sample("heads", dist.Binomial(total_count=10, logits=x @ beta), obs=heads)


def nested_plates(y):
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("outer", 3, dim=-2):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 4, dim=-1):
            theta = pyro.sample("theta", dist.Normal(centre, scale))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def crossed_plates(y):
    rows, columns = pyro.plate("row", 3, dim=-2), pyro.plate("column", 4, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.StudentT(3.0, 0.0, 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(a + b, 0.7), obs=y)


def correlated_scales(y):
    scales = pyro.sample("scales", dist.HalfCauchy(torch.ones(3)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(2.0)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scales[:, None] * corr), obs=y)


def dirichlet_multinomial(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("row", len(counts)):
        pyro.sample("counts", dist.Multinomial(10, probs=p), obs=counts)


def dirichlet_per_group(category, group):
    with pyro.plate("group", 4):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", len(category)):
        pyro.sample("category", dist.Categorical(p[group]), obs=category)


def multinomial_logistic(x, category):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
    with pyro.plate("row", len(category)):
        pyro.sample("category", dist.Categorical(logits=x @ beta), obs=category)


def constrained_latents(y):
    a = pyro.sample("a", dist.Beta(2.0, 3.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
    c = pyro.sample("c", dist.Uniform(-2.0, 4.0))
    d = pyro.sample("d", dist.InverseGamma(3.0, 2.0))
    e = pyro.sample("e", dist.Exponential(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a + c, b + d * e), obs=y)


def moving_support(y):
    top = pyro.sample("top", dist.Gamma(3.0, 1.0))
    x = pyro.sample("x", dist.Uniform(0.0, top))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def moving_support_log_joint(u: Tensor) -> Tensor:
    top, share = u[0].exp(), torch.sigmoid(u[1])
    x = top * share
    log_top = 2.0 * u[0] - top - math.log(2.0) + u[0]  # Gamma(3, 1) and the exponential's Jacobian
    log_x = -u[0] + u[0] + torch.log(share * (1.0 - share))  # 1 / top and the Jacobian of top * sigmoid
    return log_top + log_x + torch.distributions.Normal(x, 1.0).log_prob(Y).sum()


def masked(y, mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)), poutine.mask(mask=mask):
        local = pyro.sample("local", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(local, 0.8), obs=y)


def masked_regression(x, y, mask):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)), poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(x @ beta, 0.8), obs=y)


def missing_observations(y, mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.8), obs=y, obs_mask=mask)


def missing_observations_log_joint(u: Tensor) -> Tensor:
    likelihood = torch.distributions.Normal(u[0], 0.8)
    log_joint = torch.distributions.Normal(0.0, 2.0).log_prob(u[0]) + likelihood.log_prob(u[1:]).sum()
    return log_joint + likelihood.log_prob(Y[MASK]).sum()


def factor(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("penalty", -x.square().square().sum())
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x[0] * x[1], 1.0), obs=y)


def scaled(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with poutine.scale(scale=2.5):
        gain = pyro.sample("gain", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta + gain, 0.7), obs=y)


def deterministic(y):
    log_rate = pyro.sample("log_rate", dist.Normal(0.0, 1.0))
    rate = pyro.deterministic("rate", log_rate.exp())
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def gaussian_process(x, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    height = pyro.sample("height", dist.HalfNormal(1.0))
    gaps = (x[:, None, 0] - x[None, :, 0]) / length
    kernel = height * torch.exp(-0.5 * gaps.square()) + 0.1 * torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), kernel), obs=y)


def latent_gaussian_process(x, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    gaps = (x[:, None, 0] - x[None, :, 0]) / length
    factor = torch.linalg.cholesky(torch.exp(-0.5 * gaps.square()) + 1e-3 * torch.eye(len(y)))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((factor @ z).exp()), obs=y)


def mixture_by_logsumexp(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    centres = pyro.sample("centres", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    parts = weights.log() + dist.Normal(centres, 0.6).log_prob(y[:, None])
    pyro.factor("mixture", torch.logsumexp(parts, -1).sum())


def mixture_distribution(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    centres = pyro.sample("centres", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(centres, torch.full((2,), 0.6)))
    with pyro.plate("row", len(y)):
        pyro.sample("y", parts, obs=y)


def mixture_by_enumeration(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        centres = pyro.sample("centres", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0))
    with pyro.plate("row", len(y)):
        which = pyro.sample("which", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(centres[which], 0.6), obs=y)


def hidden_markov(y):
    stay = pyro.sample("stay", dist.Beta(torch.tensor([4.0, 4.0]), 1.0).to_event(1))
    centres = pyro.sample("centres", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    state = torch.tensor(0)
    for t in pyro.markov(range(5)):
        state = pyro.sample(f"state_{t}", dist.Bernoulli(stay[state.long()]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(centres[state.long()], 0.5), obs=y[t])


def with_param(x, y):
    offset = pyro.param("offset", torch.tensor(0.4))
    scale = pyro.param("scale", torch.tensor(0.9), constraint=dist.constraints.positive)
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta + offset, scale), obs=y)


def sequential_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("unit", 4):
        theta = pyro.sample(f"theta_{i}", dist.Normal(mu, 0.5))
        pyro.sample(f"y_{i}", dist.Normal(theta, 1.0), obs=y[i])


def multivariate_normal(y):
    covariance = torch.tensor([[1.0, 0.4, 0.1], [0.4, 2.0, 0.3], [0.1, 0.3, 0.5]])
    mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(3), covariance))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.MultivariateNormal(mu, precision_matrix=torch.eye(3) * 1.5), obs=y)


def ordered_logistic(x, category):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    steps = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    ordered = dist.TransformedDistribution(steps, dist.transforms.OrderedTransform())
    cutpoints = pyro.sample("cutpoints", ordered)
    with pyro.plate("row", len(category)):
        pyro.sample("category", dist.OrderedLogistic(x @ beta, cutpoints), obs=category)


def student_t(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.StudentT(df, x @ beta, 0.7), obs=y)


def negative_binomial(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.GammaPoisson(shape, shape / (x @ beta).exp()), obs=y)


def zero_inflated(y):
    gate = pyro.sample("gate", dist.Beta(1.0, 3.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


def autoregression(y):
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    last = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in range(1, 6):
        last = pyro.sample(f"x_{t}", dist.Normal(phi * last, noise))
        pyro.sample(f"y_{t}", dist.Normal(last, 0.5), obs=y[t])


def reparametrised(y):
    with poutine.reparam(config={"theta": LocScaleReparam(0.0)}):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def tied_level(y, group, *, sigma):
    theta = bt.tied("theta", bt.Tie.exchangeable(4), sigma, dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(theta[group], 1.0), obs=y)


def tied_copies(y, group, *, sigma):
    theta = bt.tied("theta", bt.Tie.ring(4), sigma, dist.Normal(0.0, 2.0), form="copies")
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(theta[group].exp()), obs=y)


def tied_matched(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.grid(3, 4), sigma, dist.Normal(0.5, 2.0), form="matched")
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=theta), obs=y)


def tied_vectors(x, y, group, *, sigma):
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    beta = bt.tied("beta", bt.Tie.chain(4), sigma, base, event_shape=(3,))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * beta[group]).sum(-1), 0.7), obs=y)


def learned_strength(y, group):
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    theta = bt.tied("theta", bt.Tie.complete(4), sigma, dist.StudentT(4.0, 0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(theta[group], 1.0), obs=y)


MATRIX = numbers(3, 4, seed=3)
ROWS = numbers(5, 3, seed=4)
MULTINOMIAL = torch.tensor([[3.0, 3.0, 4.0], [1.0, 2.0, 7.0]], dtype=torch.float64)
SIGMA = torch.tensor(0.7, dtype=torch.float64)

ZOO = {
    case.model.__name__: case
    for case in (
        Case(normal_mean, (Y,), affine=True),
        Case(linear_unknown_scale, (X, Y), affine=True),  # the log of the scale is a predictor too
        Case(logistic, (X, YES), affine=True),
        Case(logistic_by_probabilities, (X, YES), affine=True),
        Case(poisson_groups, (X, COUNTS, GROUP), affine=True),
        Case(binomial, (X, COUNTS), affine=True),
        Case(nested_plates, (MATRIX,), affine=True),
        Case(crossed_plates, (MATRIX,), affine=True),
        Case(correlated_scales, (ROWS,)),
        Case(dirichlet_multinomial, (MULTINOMIAL,)),
        Case(dirichlet_per_group, (CATEGORY, GROUP)),
        Case(multinomial_logistic, (X, CATEGORY)),
        Case(constrained_latents, (Y,)),
        Case(moving_support, (Y,), log_joint=moving_support_log_joint),
        Case(masked, (Y, MASK), affine=True),
        Case(masked_regression, (X, Y, MASK), affine=True),
        Case(missing_observations, (Y, MASK), affine=True, log_joint=missing_observations_log_joint),
        Case(factor, (Y,)),
        Case(scaled, (X, Y), affine=True),
        Case(deterministic, (COUNTS,), affine=True),
        Case(gaussian_process, (X, Y)),
        Case(latent_gaussian_process, (X, COUNTS)),
        Case(mixture_by_logsumexp, (Y,)),
        Case(mixture_distribution, (Y,)),
        Case(mixture_by_enumeration, (Y,), max_plate_nesting=1),
        Case(hidden_markov, (Y,), max_plate_nesting=0),
        Case(with_param, (X, Y), affine=True),
        Case(sequential_plate, (Y,), affine=True),
        Case(multivariate_normal, (ROWS,)),
        Case(ordered_logistic, (X, CATEGORY)),
        Case(student_t, (X, Y), affine=True),
        Case(negative_binomial, (X, COUNTS)),
        Case(zero_inflated, (COUNTS,)),
        Case(autoregression, (Y,), affine=True),
        Case(reparametrised, (Y,), affine=True),
        Case(tied_level, (Y, GROUP), {"sigma": SIGMA}, affine=True),
        Case(tied_copies, (COUNTS, GROUP), {"sigma": SIGMA}, affine=True),
        Case(tied_matched, (YES,), {"sigma": SIGMA}, affine=True),
        Case(tied_vectors, (X, Y, GROUP), {"sigma": SIGMA}, affine=True),
        Case(learned_strength, (Y, GROUP)),
    )
}
