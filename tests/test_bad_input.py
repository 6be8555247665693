"""Every mistake gets a named error: the site or argument, what was found, what was expected, what to do."""

import pickle
import re
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from zoo import GROUP, MASK, X, Y, normal_mean

import bayestie as bt
from bayestie import _errors as errors

call: Any = bt  # mistakes of type are made on purpose


def schools(y, *, sigma, form: Any = "level", base=None, tie=None):
    tie = bt.Tie.exchangeable(len(y)) if tie is None else tie
    theta = bt.tied("theta", tie, sigma, dist.Normal(0.0, 5.0) if base is None else base, form=form)
    with pyro.plate("school", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def labelled(y, unit, *, sigma):
    theta = bt.tied("theta", bt.Tie.exchangeable(3), sigma, dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(theta[unit], 1.0), obs=y)


def joint(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.chain(8), sigma, dist.Normal(0.0, 5.0))
    pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=y)


def no_latent(y):
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def discrete_latent(y):
    which = pyro.sample("which", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x + which, 1.0), obs=y)


def twice(y):
    pyro.sample("x", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def colliding(y, *, seed):
    normal_mean(y)


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def no_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def crashing(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    raise KeyError("missing column")
    return mu


def negative_scale(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, -1.0), obs=y)


def impossible(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("never", torch.log(torch.zeros(())) + 0.0 * x)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def undefined(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("nowhere", x * torch.tensor(float("nan")))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y), subsample_size=3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def named_like_a_dimension(y):
    chain = pyro.sample("chain", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(chain, 1.0), obs=y)


def failing(event):
    raise ZeroDivisionError("in the callback")


def hole(value, at=5):
    y = Y.clone()
    y[at] = value
    return y


def sweep(over, model=schools, *args, **options):
    return bt.sweep(model, *(args or (Y,)), over=over, **options)


# what is done, the error, and words that the message must hold: the culprit, found, expected, remedy
CASES = {
    "unknown engine": (
        lambda: bt.fit(schools, Y, sigma=1.0, engine="hmc"),
        errors.NameLookupError,
        ["engine", "'hmc'", "auto, laplace, nuts", "auto"],
    ),
    "negative sigma": (
        lambda: bt.fit(schools, Y, sigma=-1.0),
        errors.StrengthError,
        ["sigma of tied site 'theta'", "-1.0", "0 or more", "0 is hard sharing"],
    ),
    "negative sigma in a sweep": (
        lambda: sweep({"sigma": [1.0, -2.0]}),
        errors.StrengthError,
        ["sigma of tied site 'theta'", "-2.0", "0 or more"],
    ),
    "sigma NaN": (
        lambda: bt.fit(schools, Y, sigma=float("nan")),
        errors.StrengthError,
        ["sigma of tied site 'theta'", "nan", "0 or more"],
    ),
    "sigma NaN in a sweep": (
        lambda: sweep({"sigma": [1.0, float("nan")]}),
        errors.StrengthError,
        ["over['sigma']", "NaN", "distinct numbers"],
    ),
    "sigma of a wrong shape": (
        lambda: bt.fit(schools, Y, sigma=torch.ones(3)),
        errors.ShapeError,
        ["sigma of tied site 'theta'", "(3,)"],
    ),
    "sigma as text": (
        lambda: bt.fit(schools, Y, sigma="big"),
        errors.StrengthError,
        ["sigma of tied site 'theta'", "a str", "a number or a tensor", "1.0"],
    ),
    "swept sigma as text": (
        lambda: sweep({"sigma": "abc"}),
        errors.OptionError,
        ["over['sigma']", "'abc'", "a list of numbers"],
    ),
    "swept list of lists": (
        lambda: sweep({"sigma": [[1.0, 2.0], [3.0, 4.0]]}),
        errors.OptionError,
        ["over['sigma']", "a list of numbers", "scalar keyword"],
    ),
    "nothing swept": (lambda: sweep({}), errors.OptionError, ["over", "{}", "a dict", "strengths"]),
    "no values": (lambda: sweep({"sigma": []}), errors.OptionError, ["over['sigma']", "[]", "at least one"]),
    "over is a list": (lambda: sweep([1.0]), errors.OptionError, ["over", "[1.0]", "a dict"]),
    "a value twice": (
        lambda: sweep({"sigma": [1.0, 1.0]}),
        errors.StrengthError,
        ["over['sigma']", "a value twice", "distinct"],
    ),
    "keyword the model lacks": (
        lambda: sweep({"tau": [1.0]}, sigma=1.0),
        errors.KeywordError,
        ["'tau'", "no such argument of model 'schools'", "sigma", "signature"],
    ),
    "swept and given": (
        lambda: sweep({"sigma": [1.0]}, sigma=2.0),
        errors.KeywordError,
        ["'sigma'", "swept as well", "one or the other", "Drop it"],
    ),
    "swept and positional": (
        lambda: sweep({"y": [1.0]}, normal_mean, Y),
        errors.KeywordError,
        ["'y'", "positional", "over="],
    ),
    "an argument left out": (
        lambda: bt.fit(schools, Y),
        errors.KeywordError,
        ["'sigma'", "no value", "schools", "Pass sigma="],
    ),
    "our own name": (
        lambda: bt.fit(colliding, Y),
        errors.KeywordError,
        ["'seed'", "named like an option", "another name", "Rename"],
    ),
    "too many copies": (
        lambda: bt.fit(schools, Y, sigma=1.0, tie=bt.Tie.exchangeable(8)),
        errors.ShapeError,
        ["tied site 'theta'", "8 copies", "'y': (12,)", "at site y", "index them"],
    ),
    "index beyond the copies": (
        lambda: bt.fit(labelled, Y, GROUP, sigma=1.0),
        errors.ShapeError,
        ["tied site 'theta'", "3 copies", "largest index is 3", "as many copies"],
    ),
    "copies as events": (
        lambda: bt.fit(joint, Y, sigma=1.0),
        errors.ShapeError,
        ["observed site 'y'", "(12,)", "(8,)", "number of copies"],
    ),
    "data too long for the plate": (
        lambda: bt.fit(no_plate, Y),
        errors.ModelError,
        ["observed site 'y'", "(12,)", "a pyro.plate for every batch axis", "pyro.plate('row', 12)"],
    ),
    "edge out of range": (
        lambda: bt.Tie.edges(3, [(0, 3)]),
        errors.TieError,
        ["(0, 3)", "3"],
    ),
    "self-loop": (lambda: bt.Tie.edges(3, [(1, 1)]), errors.TieError, ["(1, 1)"]),
    "zero weight": (lambda: bt.Tie.edges(3, [(0, 1)], [0.0]), errors.TieError, ["weight", "0"]),
    "negative weight": (lambda: bt.Tie.edges(3, [(0, 1)], [-2.0]), errors.TieError, ["weight", "-2"]),
    "NaN weight": (lambda: bt.Tie.edges(3, [(0, 1)], [float("nan")]), errors.TieError, ["weight", "nan"]),
    "empty group": (lambda: bt.Tie.groups([]), errors.TieError, ["labels"]),
    "no ties": (bt.Tie.disjoint, errors.TieError, ["number of ties", "0", "at least one"]),
    "no copies": (lambda: bt.Tie.exchangeable(0), errors.TieError, ["0"]),
    "NaN in the data": (
        lambda: bt.fit(schools, hole(float("nan")), sigma=1.0),
        errors.DataError,
        ["observed site 'y'", "1 NaN or infinite of 12", "index (5,)", "finite", "mask"],
    ),
    "inf in the data": (
        lambda: bt.fit(normal_mean, hole(float("inf"))),
        errors.DataError,
        ["observed site 'y'", "1 NaN or infinite of 12", "finite", "Drop those rows"],
    ),
    "NaN in a covariate": (
        lambda: bt.fit(negative_binomial_on, X / torch.zeros(12, 3), Y.abs().round()),
        errors.DataError,
        ["argument 'x'", "NaN or infinite of 36", "finite"],
    ),
    "data that are no tensor": (
        lambda: bt.fit(normal_mean, Y.tolist()),
        errors.DataError,
        ["observed site 'y'", "a list", "a tensor", "torch.as_tensor", ".to_numpy()"],
    ),
    "data outside the support": (
        lambda: bt.fit(counts, Y),
        errors.DataError,
        ["observed site 'y'", "support of Poisson", "coding"],
    ),
    "no latent site": (
        lambda: bt.fit(no_latent, Y),
        errors.NoLatentError,
        ["no_latent", "no latent site", "at least one", "Sample"],
    ),
    "discrete latent": (
        lambda: bt.fit(discrete_latent, Y),
        errors.DiscreteLatentError,
        ["site 'which'", "Bernoulli", "marked for enumeration", "infer={'enumerate': 'parallel'}"],
    ),
    "a name twice": (
        lambda: bt.fit(twice, Y),
        errors.DuplicateSiteError,
        ["site 'x'", "a second statement", "one statement", "Rename"],
    ),
    "a reserved site name": (
        lambda: bt.fit(named_like_a_dimension, Y),
        errors.KeywordError,
        ["site 'chain'", "dimension of the results", "Rename"],
    ),
    "a minibatch without its rows": (
        lambda: bt.fit(subsampled, Y, engine="svi"),
        errors.ShapeError,
        ["observed site 'y'", "(12,)", "(3,)", "minibatches of ['row']", "y[rows]"],
    ),
    "a model that crashes": (
        lambda: bt.fit(crashing, Y),
        errors.ModelError,
        ["crashing", "KeyError after site 'mu'", "missing column", "by hand"],
    ),
    "no function": (lambda: call.fit(3, Y), errors.ModelError, ["int", "not callable", "by hand"]),
    "a negative scale": (
        lambda: bt.fit(negative_scale, Y),
        errors.ModelError,
        ["negative_scale", "after site 'mu'", "scale", "by hand"],
    ),
    "empty data": (
        lambda: bt.fit(normal_mean, Y[:0]),
        errors.ModelError,
        ["normal_mean", "after site 'mu'", "runs on its arguments"],
    ),
    "impossible data": (
        lambda: bt.fit(impossible, Y),
        errors.InferenceError,
        ["site 'never'", "-inf", "finite log density", "Check"],
    ),
    "NaN everywhere": (
        lambda: bt.fit(undefined, Y),
        errors.ModelError,
        ["undefined", "after site 'x'", "log_factor", "nan", "by hand"],
    ),
    "copies with exchangeable": (
        lambda: bt.fit(schools, Y, sigma=1.0, form="copies"),
        errors.FormError,
        ["'theta'", "copies", "exchangeable", "Tie.complete"],
    ),
    "no sharing in the form level": (
        lambda: sweep({"sigma": [1.0, float("inf")]}),
        errors.StrengthError,
        ["'theta'", "inf", "level", "improper", "'matched' or form='copies'"],
    ),
    "a base that is not Gaussian": (
        lambda: bt.fit(schools, Y, sigma=1.0, form="copies", base=dist.StudentT(3.0), tie=bt.Tie.ring(12)),
        errors.BaseError,
        ["base of tied site 'theta'", "StudentT", "Normal", "form='level'"],
    ),
    "an unknown form": (
        lambda: bt.fit(schools, Y, sigma=1.0, form="pairs"),
        errors.FormError,
        ["'theta'", "'pairs'", "'level'", "Choose"],
    ),
    "no CUDA": (
        lambda: bt.fit(normal_mean, Y, device="cuda"),
        errors.DeviceError,
        ["device", "'cuda' asked for", "NVIDIA GPU", "device='cpu'"],
    ),
    "no such device": (
        lambda: bt.fit(normal_mean, Y, device="abacus"),
        errors.DeviceError,
        ["device", "'abacus'", "'cpu'", "Name a device"],
    ),
    "a callback that fails": (
        lambda: bt.fit(normal_mean, Y, progress=failing),
        errors.OptionError,
        ["progress", "ZeroDivisionError: in the callback", "Mend it"],
    ),
    "no callback": (
        lambda: call.fit(normal_mean, Y, progress=True),
        errors.OptionError,
        ["progress", "True", "a callable"],
    ),
    "no chains": (
        lambda: bt.fit(normal_mean, Y, num_chains=0),
        errors.OptionError,
        ["num_chains", "0", "at least 1"],
    ),
    "half a draw": (
        lambda: call.fit(normal_mean, Y, num_draws=100.5),
        errors.OptionError,
        ["num_draws", "100.5", "a whole number"],
    ),
    "no effective draws": (
        lambda: bt.fit(normal_mean, Y, target_ess=0),
        errors.OptionError,
        ["target_ess", "0", "positive"],
    ),
    "a negative seed": (
        lambda: bt.fit(normal_mean, Y, seed=-1),
        errors.OptionError,
        ["seed", "-1", "a whole number"],
    ),
    "a seed of text": (
        lambda: call.fit(normal_mean, Y, seed="today"),
        errors.OptionError,
        ["seed", "'today'", "a whole number"],
    ),
    "a guide without svi": (
        lambda: bt.fit(normal_mean, Y, guide="full_rank"),
        errors.OptionError,
        ["guide", "full_rank", "engine='svi'"],
    ),
    "an unknown group to keep": (
        lambda: bt.fit(normal_mean, Y, keep=["prior"]),
        errors.OptionError,
        ["keep", "'prior'", "posterior, log_likelihood"],
    ),
    "dims of no site": (
        lambda: bt.fit(normal_mean, Y, dims={"theta": ["school"]}),
        errors.NameLookupError,
        ["dims['theta']", "no such site", "mu", "Correct"],
    ),
    "dims as text": (
        lambda: bt.fit(schools, Y, sigma=1.0, dims={"theta": "school"}),
        errors.OptionError,
        ["dims['theta']", "'school'", "a list", '["school"]'],
    ),
    "too many dims": (
        lambda: bt.fit(normal_mean, Y, dims={"mu": ["school"]}),
        errors.OptionError,
        ["dims['mu']", "['school']", "at most 0"],
    ),
    "coords of no dimension": (
        lambda: bt.fit(normal_mean, Y, coords={"rwo": list("abcdefghijkl")}),
        errors.NameLookupError,
        ["coords['rwo']", "did you mean row?", "one of ['row']", "dims="],
    ),
    "too few labels": (
        lambda: bt.fit(normal_mean, Y, coords={"row": ["a", "b"]}),
        errors.ShapeError,
        ["coords['row']", "2 labels", "12", "one label per element"],
    ),
    "no such folder": (
        lambda: bt.fit(normal_mean, Y, out="no/such/folder/result.nc"),
        errors.OutputError,
        ["no/such/folder/result.nc", "FileNotFoundError", "can be written", "folder exists"],
    ),
    "an unknown suffix": (
        lambda: bt.fit(normal_mean, Y, out="result.csv"),
        errors.OutputError,
        ["result.csv", "'.csv'", ".netcdf", "result.nc"],
    ),
    "strengths upside down": (
        lambda: bt.strengths(3.0, 1.0, 4),
        errors.OptionError,
        ["low=3.0, high=1.0", "0 < low <= high", "hard=True"],
    ),
    "strengths from zero": (lambda: bt.strengths(0.0, 1.0, 4), errors.OptionError, ["low=0.0", "hard=True"]),
    "no strengths": (lambda: bt.strengths(0.1, 1.0, 0), errors.OptionError, ["num=0", "at least 2"]),
    "half a strength": (
        lambda: call.strengths(0.1, 1.0, 2.5),
        errors.OptionError,
        ["num=2.5", "whole number"],
    ),
}


def negative_binomial_on(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.NegativeBinomial(5.0, logits=x @ beta), obs=y)


@pytest.mark.parametrize("name", CASES)
def test_named_error(name):
    do, error, words = CASES[name]
    if name == "no CUDA" and torch.cuda.is_available():
        do = _without_cuda(do)
    with pytest.raises(error) as raised:
        do()
    found = raised.value
    assert isinstance(found, errors.BayestieError)
    message = str(found)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert re.fullmatch(r"(?s).+: found .+, expected .+\. .+[.\])]?", message)
    for part in (found.what, found.found, found.expected, found.fix):
        assert part.strip()


def _without_cuda(do):
    def hidden():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            do()

    return hidden


# -- what looks odd and is fine ------------------------------------------------------------------------


def test_one_copy_is_a_model_with_one_parameter():
    tree = bt.sweep(schools, Y[:1], over={"sigma": [0.0, 1.0]}, num_draws=50)
    assert tree.posterior.theta.shape == (2, 4, 50, 1)
    assert bool(tree.sweep.exact.all())
    evidence = dist.Normal(torch.zeros_like(Y[0]), 26.0**0.5).log_prob(Y[0])  # at sigma = 0: N(0, 5^2 + 1)
    assert float(tree.sweep.log_evidence[0]) == pytest.approx(float(evidence), abs=1e-9)


def test_a_model_without_observations_gives_its_prior():
    def model():
        pyro.sample("x", dist.Normal(2.0, 3.0))

    tree = bt.fit(model, num_draws=200)
    draws = tree.posterior.x.values
    assert bool(tree.sweep.exact)
    assert float(tree.sweep.log_evidence) == pytest.approx(0.0, abs=1e-9)
    assert "log_likelihood" not in tree.children
    assert abs(draws.mean() - 2.0) < 4 * 3.0 / np.sqrt(draws.size)


def test_an_improper_posterior_is_not_certified():
    def model(y):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)  # a - b is free

    tree = bt.fit(model, Y, engine="laplace", num_draws=50)
    assert not bool(tree.sweep.certified)
    assert "no mode" in str(tree.sweep.reason.values)


def test_whole_numbers_and_floats_mix():
    whole = torch.tensor([1, 0, 3, 2])
    tree = bt.fit(schools, whole, sigma=1, num_draws=20)
    expected = bt.fit(schools, whole.double(), sigma=1.0, num_draws=20)
    assert np.array_equal(tree.posterior.theta, expected.posterior.theta)


@pytest.mark.parametrize("y", [Y.numpy(), Y.numpy().astype(np.float32), np.arange(12)])
def test_numpy_data(y):
    tree = bt.fit(normal_mean, y, num_draws=20)
    assert np.array_equal(tree.observed_data.y, y.astype(float) if y.dtype.kind == "f" else y)


def test_errors_cross_process_borders():
    error = errors.DataError("site 'y'", found="a", expected="b", fix="Do c.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.DataError
    assert str(again) == str(error)


def test_masking_everything_leaves_the_prior():
    def masked(y, mask):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y)), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    tree = bt.fit(masked, Y, torch.zeros_like(MASK), num_draws=20)
    assert float(tree.sweep.log_evidence) == pytest.approx(0.0, abs=1e-9)


def test_an_axis_with_the_name_of_its_variable_is_refused_before_anything_is_drawn():
    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(3), sigma, dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("obs", dist.Normal(theta, 1.0), obs=y)

    events = []
    with pytest.raises(errors.NameLookupError, match="own name"):
        bt.fit(model, torch.zeros(3), sigma=1.0, dims={"y": ["y"]}, progress=events.append)
    assert not events
