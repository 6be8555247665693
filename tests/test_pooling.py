"""Effective number of parameters and pooling factors against dense Gaussian algebra."""

import math

import numpy as np
import pytest
import xarray as xr
from gaussian_sweeps import Tied, gaussian_tree, posterior
from synthetic import EFFECT, SCHOOLS, STDERR, eight_schools_tree, exact_moments, fit_tree

from bayestie._errors import NameLookupError
from bayestie._pooling import pooling
from bayestie._results import select
from bayestie._ties import Tie

STRENGTHS = (0.0, *np.geomspace(0.1, 30, 9).tolist())
TIES = {
    "exchangeable": Tie.exchangeable(6),
    "complete": Tie.complete(6),
    "anchored chain": Tie.chain(6, anchored=True),
    "grid": Tie.grid(2, 3),
    "groups": Tie.groups([0, 1, 0, 1, 1, 2]),
    "mixed": Tie.disjoint(Tie.exchangeable(3), Tie.chain(3)),
}


def _model(tie, form="level", num_draws=1000, seed=2):
    tied = Tied("theta", tie, np.eye(tie.num_copies), form=form, base=(0.5, 2.0))
    y = np.random.default_rng(seed).normal(size=tie.num_copies) * 2
    path = gaussian_tree([tied], y, 0.7, {"sigma": STRENGTHS}, num_draws=num_draws, seed=seed)
    return tied, y, path


def _cases():
    for name, tie in TIES.items():
        yield pytest.param(tie, "level", id=f"{name}-level")
    for name in ("complete", "grid"):
        for form in ("copies", "matched"):
            yield pytest.param(TIES[name], form, id=f"{name}-{form}")
    yield pytest.param(TIES["exchangeable"], "matched", id="exchangeable-matched")


@pytest.mark.parametrize(("tie", "form"), list(_cases()))
def test_effective_number_is_the_trace_of_prior_to_posterior(tie, form):
    tied, y, path = _model(tie, form)
    found = pooling(path)["theta"]
    for i, sigma in enumerate(STRENGTHS):
        # The latents are standardised, so the trace is over 1 - posterior variance.
        _, covariance = posterior([tied], [sigma], y, 0.7)
        exact = len(covariance) - np.trace(covariance)
        error = float(found.p_eff_error[i])
        assert abs(float(found.p_eff[i]) - exact) < 4.5 * error + 1e-12
        assert error < 0.15
    assert float(found.p_deviation[0]) == 0 and float(found.p_deviation_error[0]) == 0
    assert float(found.p_eff_max) == tie.num_components + tie.rank


@pytest.mark.parametrize(("tie", "form"), list(_cases()))
def test_per_copy_pooling_is_posterior_over_prior_variance(tie, form):
    tied, y, path = _model(tie, form)
    found = pooling(path)["theta"]
    c = tie.num_components
    for i, sigma in enumerate(STRENGTHS):
        loading = tied.maps(sigma)[:, c:]
        prior = (loading**2).sum(1)
        _, covariance = posterior([tied], [sigma], y, 0.7)
        exact = np.einsum("kj,jl,kl->k", loading, covariance[c:, c:], loading)
        ours, error = found.pooling[i].values, found.pooling_error[i].values
        live = prior > 0
        assert np.isnan(ours[~live]).all()
        assert (abs(ours[live] - exact[live] / prior[live]) < 4.5 * error[live]).all()


def test_movement_is_that_of_the_closed_form():
    path = eight_schools_tree(num_draws=1000)
    found = pooling(path)["theta"].to_dataset()
    sigma = path["sweep"].sigma.values
    means = np.stack([exact_moments(s, EFFECT, STDERR)[0] for s in sigma])
    for key, end in (("hard", 0), ("free", -1)):
        gap = found[f"moved_from_{key}"].values - (means - means[end])
        error = found[f"moved_from_{key}_error"].values
        assert (abs(gap) < 4.5 * error + 1e-12).all()
        assert (error[end] == 0).all()
    assert found["moved_from_hard"].dims == ("sigma", "school")
    assert found["school"].values[: len(SCHOOLS)].tolist() == SCHOOLS


def test_pooling_factor_is_gelman_and_pardoes():
    path = eight_schools_tree(num_draws=500)
    found = pooling(path)["theta"].to_dataset()["pooling_factor"]
    draws = path["posterior"].to_dataset()
    deltas = (draws["theta"] - draws["theta_level"]).isel(sigma=12)
    between = deltas.mean(("chain", "draw")).var("school", ddof=1)
    within = deltas.var("school", ddof=1).mean(("chain", "draw"))
    assert float(found[12]) == pytest.approx(1 - float(between / within))
    assert float(found[0]) == 1
    assert float(found[1]) > 0.9 > float(found[-1])


def test_a_level_of_unknown_prior_counts_as_one_and_a_known_level_as_none():
    path = eight_schools_tree()
    known = path.copy()
    known.attrs["ties"] = known.attrs["ties"].replace(
        '"base": "Normal(0, 5)"', '"base": "0 (known)", "base_known": 0.0'
    )
    assert (pooling(known)["theta"].p_level == 0).all()
    other = path.copy()
    other.attrs["ties"] = other.attrs["ties"].replace(
        "Normal(0, 5)", 'StudentT(0, 5)", "base_loc": 0.0, "base_scale": 5.0, "base_name": "StudentT'
    )
    assert (pooling(other)["theta"].p_level == 1).all()


def test_event_elements_are_kept_apart():
    # Two event elements that are the same site twice: everything per copy doubles in shape, p_eff in value.
    path = eight_schools_tree()
    twice = path.copy(deep=True)
    posterior_group = twice["posterior"].to_dataset()
    double = {name: xr.concat([x, x], "element") for name, x in posterior_group.data_vars.items()}
    order = {"theta": ("school", "element"), "theta_z": ("school", "element"), "theta_level": ("element",)}
    twice["posterior"] = xr.DataTree(
        xr.Dataset({str(k): x.transpose("sigma", "chain", "draw", *order[str(k)]) for k, x in double.items()})
    )
    twice.attrs["ties"] = twice.attrs["ties"].replace('"event_shape": []', '"event_shape": [2]')
    one, two = pooling(path)["theta"], pooling(twice)["theta"]
    np.testing.assert_allclose(two.p_eff, 2 * one.p_eff, atol=1e-9)
    assert two.pooling.dims == ("sigma", "school", "element")
    np.testing.assert_allclose(two.pooling.isel(element=1), one.pooling)


@pytest.mark.parametrize(
    "one", [select(eight_schools_tree(), sigma=30.0), fit_tree(30.0)], ids=["selected", "fit"]
)
def test_one_strength(one):
    found = pooling(one)["theta"]
    exact = pooling(eight_schools_tree())["theta"].isel(sigma=-1)
    # The fit has draws of its own.
    joint = math.hypot(float(found.p_eff_error), float(exact.p_eff_error))
    assert abs(float(found.p_eff - exact.p_eff)) < 4 * joint
    assert "moved_from_hard" not in found
    if one.attrs.get("selected"):
        np.testing.assert_allclose(found.pooling, exact.pooling)


def test_missing_draws_are_a_named_error():
    path = eight_schools_tree()
    path["posterior"] = xr.DataTree(path["posterior"].to_dataset().drop_vars("theta_z"))
    with pytest.raises(NameLookupError, match="posterior/theta_z"):
        pooling(path)
