"""What is kept of a model for the next call: the same answers, and never those of another model."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bayestie as bt
from bayestie import _remembered, _tiers
from bayestie._errors import StrengthError

GROUP = torch.arange(6).repeat_interleave(5)
Y = torch.sin(torch.arange(30.0, dtype=torch.float64)) + 0.3 * GROUP
OVER: dict[str, Any] = {"sigma": [0.3, 1.0]}
SHORT: dict[str, Any] = {"num_draws": 120}


@pytest.fixture(autouse=True)
def nothing_kept():
    _remembered._known.clear()
    yield
    _remembered._known.clear()


@pytest.fixture
def built(monkeypatch):
    """The models whose densities were worked out, in order."""
    seen = []
    whole = _remembered.build_density
    monkeypatch.setattr(
        _remembered, "build_density", lambda program: seen.append(program.model) or whole(program)
    )
    return seen


def make_affine(shift=None):
    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(6), sigma, dist.Normal(0.0, 2.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        mean = theta[GROUP] if shift is None else theta[GROUP] + shift[0]
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model


def make_curved():
    """Not a linear model: the lane program serves it."""

    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(6), sigma, dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.StudentT(4.0, torch.tanh(theta[GROUP]), 0.5), obs=y)

    return model


def make_shifted_curve(shift):
    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.exchangeable(6), sigma, dist.Normal(0.0, 3.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.StudentT(4.0, theta[GROUP].exp().log1p() + shift[0], 0.5), obs=y)

    return model


def positions(tree):
    return {name: x.values for name, x in tree["posterior"].items()}


def mean_theta(tree):
    return tree["posterior"]["theta"].to_numpy().mean()


def assert_same(ours, theirs):
    for name, x in positions(theirs).items():
        np.testing.assert_array_equal(positions(ours)[name], x, err_msg=name)


@pytest.mark.parametrize(
    ("make", "engine"), [(make_affine, "auto"), (make_affine, "nuts"), (make_curved, "laplace")]
)
def test_a_second_call_works_nothing_out_and_draws_the_same(make, engine, built):
    model = make()
    first = bt.sweep(model, Y, over=OVER, engine=engine, **SHORT)
    again = bt.sweep(model, Y, over=OVER, engine=engine, **SHORT)
    assert built == [model]
    assert_same(again, first)
    assert first.attrs["lane_tier"] == again.attrs["lane_tier"]
    assert first.attrs["density_route"] == again.attrs["density_route"]
    _remembered._known.clear()
    other_seed = bt.sweep(model, Y, over=OVER, engine=engine, seed=1, **SHORT)
    bt.sweep(model, Y, over=OVER, engine=engine, **SHORT)
    assert_same(bt.sweep(model, Y, over=OVER, engine=engine, seed=1, **SHORT), other_seed)


def test_graphs_are_made_once(monkeypatch):
    traced, make_fx = [], _tiers.make_fx
    monkeypatch.setattr(_tiers, "TRACE_AFTER", 3)
    monkeypatch.setattr(_tiers, "make_fx", lambda *a, **k: traced.append(1) or make_fx(*a, **k))
    model = make_curved()
    calls = [bt.fit(model, Y, sigma=1.0, engine="laplace", **SHORT) for _ in range(2)]
    assert calls[0].attrs["lane_tier"] == calls[1].attrs["lane_tier"] == "traced"
    assert_same(calls[1], calls[0])
    graphs = len(traced)
    assert graphs > 0
    bt.fit(model, Y, sigma=1.0, engine="laplace", **SHORT)
    assert len(traced) == graphs
    _remembered._known.clear()
    bt.fit(model, Y, sigma=1.0, engine="laplace", **SHORT)
    assert len(traced) == 2 * graphs


@pytest.mark.parametrize("make", [make_affine, make_shifted_curve])
def test_what_a_model_reads_beside_its_arguments_may_change(make, built):
    shift = [0.0]
    model = make(shift)
    before = bt.fit(model, Y, sigma=1.0, engine="laplace", **SHORT)
    shift[0] = 2.0
    after = bt.fit(model, Y, sigma=1.0, engine="laplace", **SHORT)
    assert len(built) == 2
    assert mean_theta(after) < mean_theta(before) - 0.5


def test_what_changes_between_the_strengths_is_seen(built):
    shifts = {0.3: 0.0, 0.6: 0.0, 1.0: 0.0}

    def model(y, *, sigma):
        # Lanes hold many strengths at once: a table, as a tensor, looks them up.
        table = torch.tensor(list(shifts.items()), dtype=torch.float64)
        shift = ((table[:, 0] == sigma).double() * table[:, 1]).sum()
        theta = bt.tied("theta", bt.Tie.exchangeable(6), sigma, dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(theta[GROUP] + shift, 1.0), obs=y)

    over = {"sigma": list(shifts)}
    before = bt.sweep(model, Y, over=over, **SHORT)["posterior"]["theta"]
    shifts[0.6] = 2.0
    after = bt.sweep(model, Y, over=over, **SHORT)["posterior"]["theta"]
    assert len(built) == 2
    moved = (after.to_numpy() - before.to_numpy()).mean((1, 2, 3))
    assert moved[1] < -1.0
    assert np.abs(moved[[0, 2]]).max() < 0.2


def test_the_strengths_between_are_not_validated_again():
    runs, model = [], make_affine()

    def counted(y, *, sigma):
        runs.append(pyro.settings.get("validate_distributions_pyro"))
        model(y, sigma=sigma)

    over, validated = bt.strengths(0.1, 1.0, 20), list[int]()
    for _ in range(2):
        bt.sweep(counted, Y, over={"sigma": over}, **SHORT)
        validated.append(sum(runs))
        runs.clear()
    assert validated == [20, 2]
    with pytest.raises(StrengthError):
        bt.sweep(counted, Y, over={"sigma": [*over[:-2], -1.0, 1.0]}, **SHORT)


def test_data_changed_in_place_are_other_data(built):
    model, y = make_affine(), Y.clone()
    before = bt.fit(model, y, sigma=1.0, **SHORT)
    y += 3.0
    after = bt.fit(model, y, sigma=1.0, **SHORT)
    assert len(built) == 2
    assert (
        after["posterior"]["theta"].to_numpy().mean() > before["posterior"]["theta"].to_numpy().mean() + 1.0
    )


def test_a_param_statement_may_change(built):
    def model(y, *, sigma):
        shift = pyro.param("shift", torch.tensor(0.0))
        theta = bt.tied("theta", bt.Tie.exchangeable(6), sigma, dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(theta[GROUP] + shift, 1.0), obs=y)

    pyro.clear_param_store()
    before = bt.fit(model, Y, sigma=1.0, **SHORT)
    pyro.get_param_store()["shift"] = torch.tensor(2.0)
    after = bt.fit(model, Y, sigma=1.0, **SHORT)
    pyro.clear_param_store()
    assert len(built) == 2
    assert (
        after["posterior"]["theta"].to_numpy().mean() < before["posterior"]["theta"].to_numpy().mean() - 0.5
    )


def test_other_strengths_are_worked_out_anew(built):
    model = make_affine()
    bt.sweep(model, Y, over=OVER, **SHORT)
    bt.sweep(model, Y, over={"sigma": [0.3, 1.1]}, **SHORT)
    bt.fit(model, Y, sigma=0.3, **SHORT)
    assert len(built) == 3


def test_a_method_is_the_same_model_of_the_same_object(built):
    class Study:
        def __init__(self):
            self.inner = make_affine()

        def model(self, y, *, sigma):
            self.inner(y, sigma=sigma)

    first, second = Study(), Study()
    for study in (first, first, second):
        bt.fit(study.model, Y, sigma=1.0, **SHORT)
    assert len(built) == 2


def test_few_models_are_kept_and_none_with_much_data(built, monkeypatch):
    models = [make_affine() for _ in range(3)]
    for model in models:
        bt.fit(model, Y, sigma=1.0, **SHORT)
    assert len(_remembered._known) == 2
    bt.fit(models[0], Y, sigma=1.0, **SHORT)
    assert built == [*models, models[0]]
    _remembered._known.clear()
    monkeypatch.setattr(_remembered, "_NUMBERS", 100)
    bt.fit(models[0], Y, sigma=1.0, **SHORT)
    assert not _remembered._known
