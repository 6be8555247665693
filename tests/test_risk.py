"""Risk along sigma against the closed form, and the crossing of hard sharing and none (claim C2)."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from tie_kinds import dense_covariance

import bayestie as bt
from bayestie._errors import KeywordError, ModelError, NameLookupError, OptionError, ShapeError
from bayestie._risk import posterior_means

STEPS, NOISE, NUM = 8, 1.2, 4  # T steps, n observations each of sd e
WIDE = 50.0
EXCHANGEABLE, CHAIN = bt.Tie.exchangeable(STEPS), bt.Tie.chain(STEPS)


def series(y, *, sigma, tie=EXCHANGEABLE, noise=NOISE):
    theta = bt.tied("theta", tie, sigma, dist.Normal(0.0, WIDE))
    with pyro.plate("step", STEPS), pyro.plate("repeat", NUM):
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


DATA = torch.zeros(NUM, STEPS)
FEW: dict[str, Any] = {
    "num_draws": 5,
    "target_ess": 5,
}  # means of Gaussian posteriors are exact without any draw


def _truth(spread):
    """T values of variance s^2 (divisor T - 1) around 0.7."""
    shape = torch.sin(1.7 * torch.arange(STEPS, dtype=torch.float64))
    shape = shape - shape.mean()
    return 0.7 + spread * shape / shape.std()


def _closed_form(tie, sigma, truth):
    """bias^2, variance per copy of the posterior mean, a linear map of the steps' averages."""
    prior = dense_covariance(tie, max(sigma, 1e-7), WIDE, "level").numpy()
    noise = NOISE**2 / NUM * np.eye(STEPS)
    gain = prior @ np.linalg.inv(prior + noise)
    return ((gain - np.eye(STEPS)) @ truth.numpy()) ** 2, (gain @ noise @ gain.T).diagonal()


@pytest.mark.parametrize("tie", [EXCHANGEABLE, CHAIN], ids=["exchangeable", "chain"])
def test_bias_and_variance_are_the_closed_form(tie):
    truth, strengths = _truth(0.6), [0.0, 0.2, 0.6, 2.0, 100.0]
    found = bt.risk(series, truth, DATA, over={"sigma": strengths}, num_data=400, tie=tie, **FEW)
    assert (found.num_certified == 400).all()
    for index, sigma in enumerate(strengths):
        bias, variance = _closed_form(tie, sigma, truth)
        for name, exact in (
            ("bias_squared", bias.mean()),
            ("variance", variance.mean()),
            ("risk", (bias + variance).mean()),
        ):
            value, error = float(found[name][index]), float(found[f"{name}_error"][index])
            assert abs(value - exact) < 4 * error, (sigma, name, value, exact, error)
        signed = np.abs(found.bias_copy[index].values) - np.sqrt(bias)
        assert (np.abs(signed) < 4.5 * found.bias_copy_error[index].values).all()
        off = np.abs(found.variance_copy[index].values - variance)
        assert (off < 4.5 * found.variance_copy_error[index].values).all()
    np.testing.assert_allclose(found.risk, found.bias_squared + found.variance)
    assert found.risk_copy.dims == ("sigma", "step")


@pytest.mark.parametrize("ratio", [0.6, 1.6])
def test_hard_sharing_wins_iff_the_spread_is_below_the_noise(ratio):
    # C2: s^2 against e^2 / n; and the best soft strength beats both.
    spread = math.sqrt(ratio) * NOISE / math.sqrt(NUM)
    truth = _truth(spread)
    assert float(truth.var()) == pytest.approx(ratio * NOISE**2 / NUM)
    found = bt.risk(
        series, truth, DATA, over={"sigma": [0.0, 0.2, 0.4, 0.6, 0.8, 1e4]}, num_data=400, seed=1, **FEW
    )
    hard, free = found.isel(sigma=0), found.isel(sigma=-1)
    exact = {s: sum(x.mean() for x in _closed_form(EXCHANGEABLE, s, truth)) for s in (0.0, 1e4)}
    assert exact[0.0] - exact[1e4] == pytest.approx(
        (STEPS - 1) / STEPS * (ratio - 1) * NOISE**2 / NUM, rel=1e-3
    )
    gap = float(hard.risk - free.risk)
    assert math.copysign(1.0, gap) == math.copysign(1.0, ratio - 1)
    assert abs(gap) > 4 * max(float(hard.risk_difference_error), float(free.risk_difference_error))
    assert 0 < int(found.risk.values.argmin()) < 5
    for end in (hard, free):
        assert float(end.risk_difference) > 4 * float(end.risk_difference_error)


def test_errors_are_honest_and_noise_of_the_means_is_taken_off():
    # Draws instead of exact means: fewer draws must not raise variance and risk beyond their errors.
    truth = _truth(0.6)
    bias, variance = _closed_form(EXCHANGEABLE, 0.6, truth)
    scores = []
    for seed in range(20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bayestie._risk.posterior_means", _by_draws)
            found = bt.risk(series, truth, DATA, over={"sigma": [0.6]}, num_data=40, seed=seed, **FEW)
        for name, exact in (("bias_squared", bias.mean()), ("risk", (bias + variance).mean())):
            scores.append(float((found[name][0] - exact) / found[f"{name}_error"][0]))
    scores = np.reshape(scores, (20, 2))
    assert (np.abs(scores.mean(0)) < 4 / math.sqrt(20)).all()
    assert (scores.std(0) < 1.6).all() and (scores.std(0) > 0.5).all()


def _by_draws(program, draws, mode, site):
    return posterior_means(program, draws, None, site)


def test_other_latents_take_their_truth():
    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(3), sigma, dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("copy", 3), pyro.plate("repeat", 20):
            pyro.sample("y", dist.Normal(theta, scale), obs=y)

    data, truth = torch.zeros(20, 3), {"theta": torch.tensor([0.2, 0.0, -0.2]), "scale": 0.5}
    found = bt.risk(model, truth, data, over={"sigma": [0.5]}, num_data=60, num_draws=50, target_ess=50)
    # Twenty observations leave little to shrink: risk near scale^2 / 20.
    assert float(found.risk[0]) == pytest.approx(0.25 / 20, rel=0.35)
    with pytest.raises(NameLookupError, match=r"truth: found no value for \['scale'\]"):
        bt.risk(model, truth["theta"], data, over={"sigma": [0.5]}, num_data=20)
    with pytest.raises(NameLookupError, match=r"a value for \['spare'\]"):
        bt.risk(model, {**truth, "spare": 1.0}, data, over={"sigma": [0.5]}, num_data=20)
    with pytest.raises(ShapeError, match=r"truth of 'theta': found shape \(4,\)"):
        bt.risk(model, {**truth, "theta": torch.zeros(4)}, data, over={"sigma": [0.5]}, num_data=20)


def test_what_cannot_be_simulated_or_asked_is_named():
    def transformed(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(2), sigma, dist.Normal(0.0, 1.0))
        with pyro.plate("row", 2):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=(y - y.mean()))

    def untied(y, *, sigma):
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, sigma)), 1.0), obs=y)

    def clashing(y, *, sigma, num_data):
        transformed(y, sigma=sigma)

    over = {"sigma": [1.0]}
    with pytest.raises(ModelError, match="observed site 'y': found no argument"):
        bt.risk(transformed, torch.zeros(2), torch.tensor([1.0, 2.0]), over=over)
    with pytest.raises(NameLookupError, match="a model without a tied site"):
        bt.risk(untied, torch.zeros(1), torch.tensor(1.0), over=over)
    with pytest.raises(KeywordError, match="keyword 'num_data' of the model"):
        bt.risk(clashing, torch.zeros(2), torch.tensor([1.0, 2.0]), over=over)
    with pytest.raises(OptionError, match="num_data"):
        bt.risk(series, _truth(1.0), DATA, over=over, num_data=1)
