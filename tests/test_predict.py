"""PSIS-LOO per strength against ArviZ, paired differences, stacking, and what is left without draws."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import xarray as xr
from arviz_stats import compare as arviz_compare
from arviz_stats import loo
from synthetic import EFFECT, STDERR, eight_schools_tree, fit_tree, log_evidence, normal_means_tree

import bayestie as bt
from bayestie._errors import NameLookupError
from bayestie._predict import compare, difference
from bayestie._results import select
from models import eight_schools


@pytest.fixture(scope="module")
def path():
    return eight_schools_tree(num_draws=250)


@pytest.fixture(scope="module")
def compared(path):
    return compare(path)


def _arviz(path, sigma, **options) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
        return loo(select(path, sigma=sigma), pointwise=True, **options)


@pytest.mark.parametrize("index", [0, 1, 8, 16])
def test_each_strength_is_arviz_loo(path, index):
    sigma = float(path["sweep"].sigma[index])
    found = compare(path, reff=1.0).isel(sigma=index)
    expected = _arviz(path, sigma, reff=1.0)
    assert float(found.elpd) == pytest.approx(expected.elpd, abs=1e-8)
    assert float(found.elpd_se) == pytest.approx(expected.se, abs=1e-8)
    assert float(found.p_loo) == pytest.approx(expected.p, abs=1e-8)
    assert float(found.max_pareto_k) == pytest.approx(float(expected.pareto_k.max()), abs=1e-8)
    assert int(found.num_bad_k) == int((expected.pareto_k > expected.good_k).sum())
    np.testing.assert_allclose(found.elpd_i, expected.elpd_i, atol=1e-8)


def test_efficiency_is_arviz_own_where_left_out(path, compared):
    # Only the length of the tail depends on it, so small differences in it leave the elpd as it is.
    for index in (0, 9):
        sigma = float(path["sweep"].sigma[index])
        assert float(compared.elpd[index]) == pytest.approx(_arviz(path, sigma).elpd, abs=0.02)


def test_exact_leave_one_out_within_its_monte_carlo_error():
    # log p(y_i | y_-i) = log p(y) - log p(y_-i), both in closed form.
    strengths = (0.0, 1.0, 3.0)
    path = normal_means_tree(EFFECT, STDERR, strengths=strengths, num_draws=4000, seed=11)
    found = compare(path)
    for index, sigma in enumerate(strengths):
        whole = log_evidence(sigma, EFFECT, STDERR)
        exact = [
            whole - log_evidence(sigma, np.delete(EFFECT, i), np.delete(STDERR, i))
            for i in range(len(EFFECT))
        ]
        assert abs(float(found.elpd[index]) - sum(exact)) < 4 * float(found.elpd_mcse[index])
        assert float(found.elpd_mcse[index]) < 0.05


def test_differences_are_paired_and_the_best_has_none(compared):
    best = int(np.argmax(compared.elpd.values))
    assert float(compared.elpd_difference[best]) == 0 and float(compared.elpd_difference_se[best]) == 0
    assert (compared.elpd_difference <= 0).all()
    gap = (compared.elpd_i[3] - compared.elpd_i[best]).values
    assert float(compared.elpd_difference[3]) == pytest.approx(gap.sum())
    assert float(compared.elpd_difference_se[3]) == pytest.approx(math.sqrt(8 * gap.var(ddof=1)))
    value, error = difference(compared, {"sigma": 3}, {"sigma": best})
    assert (value, error) == pytest.approx((gap.sum(), math.sqrt(8 * gap.var(ddof=1))))


def test_differences_are_those_of_arviz_compare(path):
    sigmas = [float(path["sweep"].sigma[i]) for i in (0, 10, 16)]
    trees = {f"{s:g}": _arviz(path, s, reff=1.0) for s in sigmas}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = arviz_compare(trees, round_to="none")
    part = xr.DataTree.from_dict({node.path: _rows(node, (0, 10, 16)) for node in path.subtree})
    found = compare(part, reff=1.0)
    for s in sigmas:
        row = table.loc[f"{s:g}"]
        assert abs(float(found.elpd_difference.sel(sigma=s))) == pytest.approx(
            abs(row["elpd_diff"]), abs=1e-6
        )
        # ArviZ divides the variance of the differences by n, that of the elpd by n - 1; we by n - 1 both.
        expected = row["dse"] * math.sqrt(8 / 7)
        assert float(found.elpd_difference_se.sel(sigma=s)) == pytest.approx(expected, abs=1e-6)
        assert float(found.weight.sel(sigma=s)) == pytest.approx(row["weight"], abs=0.02)


def _rows(node, rows):
    found = node.to_dataset(inherit=False)
    return found.isel(sigma=list(rows)) if "sigma" in found.dims else found


def test_stacking_weights_satisfy_their_optimality_conditions(compared):
    weight = compared.weight.values
    density = np.exp(compared.elpd_i.values)
    gradient = (density / (weight @ density)).mean(1)
    assert weight.sum() == pytest.approx(1) and (weight >= 0).all()
    # Karush-Kuhn-Tucker: one where the weight is positive, at most one elsewhere.
    assert gradient.max() < 1 + 1e-4
    assert abs(gradient[weight > 0.01] - 1).max() < 1e-3


def test_several_observed_sites_are_taken_together(path):
    tree = path.copy(deep=True)
    likelihood = tree["log_likelihood"].to_dataset()
    halves = xr.Dataset(
        {
            "a": likelihood["y"].isel(school=slice(0, 3)).rename(school="first"),
            "b": likelihood["y"].isel(school=slice(3, 8)).rename(school="second"),
        }
    )
    tree["log_likelihood"] = xr.DataTree(halves)
    np.testing.assert_allclose(compare(tree, reff=1.0).elpd, compare(path, reff=1.0).elpd)


def test_a_fit_has_one_strength():
    found = compare(fit_tree())
    assert found.elpd.ndim == 0 and float(found.weight) == 1 and float(found.elpd_difference) == 0


def test_without_log_likelihood_the_streamed_values_are_used(path):
    tree = path.copy()
    del tree["log_likelihood"]
    found = compare(tree)
    assert found.attrs["source"] == "sweep"
    np.testing.assert_array_equal(found.elpd, path["sweep"].elpd)
    assert float(found.elpd_difference.max()) == 0 and found.elpd_difference_se.isnull().all()
    assert math.isnan(difference(found, {"sigma": 0}, {"sigma": 3})[1])


def test_with_neither_a_named_error(path):
    tree = path.copy()
    del tree["log_likelihood"]
    tree["sweep"] = xr.DataTree(tree["sweep"].to_dataset().drop_vars("elpd"))
    with pytest.raises(NameLookupError, match="neither log_likelihood nor elpd"):
        compare(tree)


def test_a_sweep_keeps_the_score_of_every_observation():
    full = bt.sweep(
        eight_schools.eight_schools,
        **eight_schools.data(),
        over={"sigma": [0.5, 5.0, 50.0]},
        num_draws=1000,
        seed=3,
    )
    thin = full.copy()
    del thin["log_likelihood"]
    found, expected = compare(thin), compare(full)
    assert found.attrs["source"] == "sweep" and "elpd_mcse" not in found
    np.testing.assert_allclose(found.elpd, full["sweep"].elpd)
    np.testing.assert_allclose(found.elpd_se, full["sweep"].elpd_se)
    np.testing.assert_allclose(found.max_pareto_k, full["sweep"].max_pareto_k)
    # The same draws; only the tail's length may differ, by the draws' relative efficiency.
    for name in ("elpd_difference", "elpd_difference_se", "p_loo"):
        np.testing.assert_allclose(found[name], expected[name], atol=0.02)
    np.testing.assert_allclose(found.weight, expected.weight, atol=0.05)
