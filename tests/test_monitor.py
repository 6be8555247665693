"""`monitor=`: chains judged by what data identify, and drawn without a mode where latents are many."""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2, norm

import bayestie as bt
from bayestie._errors import NameLookupError, OptionError

SIZE, RADIUS, NOISE = 210, 0.8, 0.1


def folded(y):
    """Data know the square of w: its sign has two modes."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("square", w**2)
    pyro.sample("y", dist.Normal(w**2, 0.1), obs=y)


def shell(y, *, sigma):
    """Data know how far from the origin many latents are, and no direction."""
    x = bt.tied("x", bt.Tie.exchangeable(SIZE), sigma, 0.0)
    square = pyro.deterministic("square", (x / sigma).square().mean())
    pyro.sample("y", dist.Normal(square, NOISE), obs=y)


def test_a_sign_need_not_mix_where_the_square_is_what_is_asked_for():
    y = torch.tensor(1.0)
    plain = bt.fit(folded, y, engine="nuts", seed=1)
    asked = bt.fit(folded, y, engine="nuts", seed=1, monitor=["square"])
    assert not bool(plain["sweep"].certified)
    assert bool(asked["sweep"].certified)
    assert "of square over" in str(asked["sweep"].reason.values)
    grid = np.linspace(-3.0, 3.0, 20_001)
    weight = norm.pdf(grid) * norm.pdf(1.0, grid**2, 0.1)
    exact = (weight * grid**2).sum() / weight.sum()
    square = np.asarray(asked["posterior"]["square"])
    error = square.std() / np.sqrt(float(asked["sweep"].min_ess_bulk))
    assert abs(square.mean() - exact) < 4.0 * error


@pytest.mark.parametrize("engine", ["auto", "nuts"])
def test_many_latents_are_drawn_without_a_mode(engine):
    over = {"sigma": [0.5, 2.0]}
    stages = []
    path = bt.sweep(
        shell, torch.tensor(RADIUS), over=over, engine=engine, seed=2, monitor=["square"],
        progress=lambda event: stages.append(event["stage"]),
    )  # fmt: skip
    said = path["sweep"]
    assert list(said.engine.values) == ["nuts", "nuts"]
    assert bool(said.certified.all()), said.reason.values
    assert "laplace" not in stages
    assert bool(np.isnan(said.log_evidence).all())
    assert json.loads(path.attrs["monitor"]) == ["square"]
    # The sum of SIZE squares is chi^2 a priori, whatever sigma.
    total = np.linspace(50.0, 500.0, 20_001)
    weight = chi2.pdf(total, SIZE) * norm.pdf(RADIUS, total / SIZE, NOISE)
    mean = (weight * total).sum() / weight.sum() / SIZE
    spread = np.sqrt((weight * (total / SIZE - mean) ** 2).sum() / weight.sum())
    for i in range(2):
        square = np.asarray(path["posterior"]["square"].isel(sigma=i))
        size = float(said.min_ess_bulk[i])
        assert abs(square.mean() - mean) < 4.0 * spread / np.sqrt(size)
        # The sd of a sample of that size, near normal, is known to sd / sqrt(2 size).
        assert abs(square.std() - spread) < 4.0 * spread / np.sqrt(2.0 * size)


def test_a_net_whose_weights_do_not_mix_is_told_of_monitor():
    def signs(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[:2].prod(), 0.08), obs=y)

    found = bt.fit(signs, torch.tensor(1.0), engine="nuts", seed=0, num_draws=8, num_chains=2)
    assert not bool(found["sweep"].certified)
    assert "monitor=" in str(found["sweep"].reason.values)


def test_pyro_is_judged_by_the_same_names():
    found = bt.fit(
        folded, torch.tensor(1.0), engine="pyro_nuts", seed=0, num_draws=50, num_chains=2, monitor=["square"]
    )
    assert "of square over 100 draws" in str(found["sweep"].reason.values)


def test_a_name_that_no_site_has_is_refused():
    with pytest.raises(NameLookupError, match=r"monitor 'sqare'.*did you mean square") as caught:
        bt.fit(folded, torch.tensor(1.0), monitor=["sqare"])
    assert "pyro.deterministic" in str(caught.value)


@pytest.mark.parametrize("wrong", ["square", [], [3]])
def test_what_is_no_list_of_names_is_refused(wrong):
    with pytest.raises(OptionError, match="monitor"):
        bt.fit(folded, torch.tensor(1.0), monitor=wrong)


def test_a_classifier_without_evidence_has_a_whole_tree_and_a_report(tmp_path):
    # A vector of logits for every observation; no engine gives the evidence.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 55, generator=generator, dtype=torch.float64)

    def classes(x, label, *, sigma):
        weight = bt.tied("weight", bt.Tie.complete(5), sigma, 0.0, event_shape=(55,))
        logits = pyro.deterministic("logits", torch.tanh(x @ weight.mT))
        with pyro.plate("row", len(x)):
            pyro.sample("label", dist.Categorical(logits=3.0 * logits), obs=label)

    label = torch.randint(0, 5, (40,), generator=generator)
    path = bt.sweep(
        classes, x, label, over={"sigma": [0.1, 1.0]}, seed=0, num_draws=50, target_ess=50, monitor=["logits"]
    )
    assert path["log_likelihood"]["label"].shape == (2, 4, 50, 40)
    drawn = np.asarray(path["posterior_predictive"]["label"])
    assert drawn.shape[3:] == (40,) and set(np.unique(drawn)) <= {0, 1, 2, 3, 4}
    assert bool(np.isnan(path["sweep"].log_evidence).all())
    assert bt.report(path, tmp_path / "classes.html").stat().st_size > 10_000
