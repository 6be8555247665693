"""Tension per edge: p-values uniform when the tie is true, and the broken tie found when it is not."""

import math

import numpy as np
import pytest
from gaussian_sweeps import Tied, gaussian_tree
from scipy import stats
from synthetic import EFFECT, STDERR, eight_schools_tree, fit_tree, normal_means_tree

from bayestie._results import select
from bayestie._tension import tension
from bayestie._ties import Tie

CASES = [
    (Tie.exchangeable(4), "level"),
    (Tie.exchangeable(4), "matched"),
    (Tie.complete(4), "level"),
    (Tie.chain(5), "level"),
    (Tie.chain(5, anchored=True), "level"),
    (Tie.ring(4), "copies"),
    (Tie.edges(5, [(0, 1), (1, 2), (2, 0), (3, 4)], [1.0, 2.0, 0.5, 3.0]), "matched"),
    (Tie.groups([0, 1, 0, 1, 1]), "level"),
    (Tie.disjoint(Tie.exchangeable(2), Tie.chain(3)), "level"),
]


@pytest.mark.parametrize(("tie", "form"), CASES, ids=str)
def test_statistics_are_standard_normal_when_the_tie_is_true(tie, form):
    generator = np.random.default_rng(7)
    tied = Tied("theta", tie, np.eye(tie.num_copies), form=form, base=(0.0, 3.0))
    sigma, num = 1.5, 150
    u = generator.normal(size=(num, tie.num_components + tie.rank))
    y = u @ tied.maps(sigma).T + 0.6 * generator.normal(size=(num, tie.num_copies))
    grids = {"sigma": [sigma], "data": np.arange(float(num))}
    path = gaussian_tree([tied], lambda at: y[int(at["data"])], 0.6, grids, num_draws=100)
    statistics = tension(path)["theta"].statistic.isel(sigma=0).transpose("data", "edge").values
    # Each edge over 150 data sets, Bonferroni over edges at level 0.001.
    p_values = [stats.kstest(column, "norm").pvalue for column in statistics.T]
    assert min(p_values) * len(p_values) > 0.001
    assert abs(np.mean(statistics**2) - 1) < 4 * math.sqrt(2 / num)


def test_statistic_is_the_closed_form():
    path = eight_schools_tree(num_draws=4000)
    found = tension(path)["theta"].sel(sigma=path["sweep"].sigma[14])
    sigma = float(found.sigma)
    total = sigma**2 + STDERR**2
    # E[delta | y] = sigma^2 / total (y - E[level | y]); predictive variance sigma^2 - Var(delta | y).
    precision = 1 / 25 + np.sum(1 / total)
    level, gain = np.sum(EFFECT / total) / precision, sigma**2 / total
    mean = gain * (EFFECT - level)
    variance = sigma**2 * (1 - gain) + gain**2 / precision
    exact = mean / np.sqrt(sigma**2 - variance)
    assert (abs(found.difference - mean) < 4.5 * found.difference_error).all()
    np.testing.assert_allclose(found.statistic, exact, atol=0.12)
    np.testing.assert_allclose(found.p_value, 2 * stats.norm.sf(abs(found.statistic)))
    np.testing.assert_allclose(found.information, 1 - variance / sigma**2, atol=0.08)


def test_an_outlying_copy_is_found_and_named():
    y = np.array([0.2, -0.4, 0.1, 9.0, 0.3, -0.2])
    path = normal_means_tree(y, np.full(6, 0.5), strengths=(0.0, 0.3, 1.0), labels=list("abcdef"), dim="copy")
    found = tension(path)["theta"].sel(sigma=1.0)
    assert found.edge.values[int(np.argmin(found.p_value.values))] == "d"
    assert float(found.p_value.min()) < 1e-4 and float(found.statistic.sel(edge="d")) > 4


def test_a_step_breaks_its_own_edge_of_a_chain():
    tied = Tied("theta", Tie.chain(8), np.eye(8), base=(0.0, 10.0))
    y = np.repeat([0.0, 4.0], 4)
    path = gaussian_tree([tied], y, 0.3, {"sigma": [0.0, 0.5, 1.0]}, num_draws=500)
    found = tension(path)["theta"].sel(sigma=0.5)
    assert found.edge.values[int(np.argmin(found.p_value.values))] == "3 ~ 4"
    assert int((found.p_value * 7 < 0.01).sum()) == 1
    assert float(found.difference.sel(edge="3 ~ 4")) < -2


def test_hard_sharing_has_no_tension_and_silent_data_little():
    path = eight_schools_tree()
    found = tension(path)["theta"]
    assert (found.statistic[0] == 0).all() and (found.p_value[0] == 1).all()
    assert float(abs(found.statistic[1]).max()) < 2.5


def test_one_strength_that_the_tree_knows_and_one_it_does_not():
    path = eight_schools_tree()
    sigma = float(path["sweep"].sigma[12])
    one = tension(select(path, sigma=sigma))["theta"]
    np.testing.assert_allclose(one.statistic, tension(path)["theta"].statistic.sel(sigma=sigma))
    assert "theta" not in tension(fit_tree()).children


def test_grid_copies_are_named_by_both_dims():
    tied = Tied("theta", Tie.grid(2, 2), np.eye(4))
    path = gaussian_tree([tied], np.arange(4.0), 0.5, {"sigma": [0.5, 1.0]}, num_draws=50)
    assert sorted(tension(path)["theta"].edge.values) == ["0 ~ 1", "0 ~ 2", "1 ~ 3", "2 ~ 3"]
