"""Figures of a results tree: what they show, what they refuse, and that they leave no trace."""

import json
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import LineCollection
from matplotlib.text import Annotation
from synthetic import EFFECT, SCHOOLS, STDERR, eight_schools_tree, fit_tree, normal_means_tree, spoil

from bayestie._calibration import _tests
from bayestie._errors import NameLookupError
from bayestie._evidence import evidence
from bayestie._predict import compare
from bayestie._results import build_tree, select
from bayestie._strength import hard_vs_soft, strength_posterior
from bayestie._verdict import default_prior
from bayestie.plots import (
    plot_calibration,
    plot_compare,
    plot_copies,
    plot_estimates,
    plot_evidence,
    plot_pooling,
    plot_predictive,
    plot_risk,
    plot_strength,
    plot_strength_paths,
    plot_tension,
)
from bayestie.plots._axis import STRENGTH_AXES, best_index, best_point, strength_axis
from bayestie.plots._compare import comparison_of
from bayestie.plots._estimates import estimates_of
from bayestie.plots._paths import highlighted
from bayestie.plots._predictive import checks_of
from bayestie.plots._strength import factors_of
from bayestie.plots._style import BAD, short
from bayestie.plots._tension import MOST_EDGES, pulls_of
from bayestie.plots._values import copies_of

PLOTS = [plot_strength_paths, plot_evidence, plot_pooling, plot_predictive]


def many_copies(num_copies, **options):
    generator = np.random.default_rng(1)
    return normal_means_tree(
        generator.normal(3, 4, size=num_copies),
        np.full(num_copies, 3.0),
        labels=[f"district {k}" for k in range(num_copies)],
        dim="district",
        strengths=(0.0, 1.0, 10.0),
        num_draws=25,
        **options,
    )


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def points(line):
    """How many points a line has."""
    return np.size(line.get_xdata())


def curve(axes):
    """Values of the longest line of a panel."""
    return np.asarray(max(axes.lines, key=points).get_ydata(), dtype=float)


def strength_panels(figure):
    return [axes for axes in figure.axes if axes.get_gid() == STRENGTH_AXES]


@pytest.mark.parametrize("width", [7.2, 3.5])
@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
@pytest.mark.parametrize("ends", ["hard", "both", "neither"])
def test_every_plot_draws_at_both_widths(plot, width, ends):
    strengths = {"hard": (0.0, 0.5, 5.0), "both": (0.0, 0.5, 5.0, math.inf), "neither": (0.5, 2.0, 5.0)}[ends]
    form = "matched" if ends == "both" else "level"
    tree = normal_means_tree(EFFECT, STDERR, strengths=strengths, form=form, labels=SCHOOLS, num_draws=50)
    figure = plot(tree, width=width)
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == width
    assert all(axes.has_data() for axes in figure.axes)


def test_settings_and_pyplot_are_left_alone():
    before = dict(mpl.rcParams)
    for plot in PLOTS:
        plot(eight_schools_tree())
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_a_panel_per_copy_with_its_label_and_its_exact_mean():
    tree = eight_schools_tree()
    figure = plot_strength_paths(tree)
    assert titles(figure) == SCHOOLS
    for k, axes in enumerate(strength_panels(figure)):
        expected = tree["posterior"].to_dataset()["theta"].mean(("chain", "draw")).values[1:, k]
        np.testing.assert_allclose(curve(axes), expected)


def test_hard_and_free_ends_stand_apart_and_are_named():
    axis = strength_axis("sigma", np.array([0.1, 1.0, 10.0, 0.0, math.inf]))
    assert axis.order == (3, 0, 1, 2, 4)
    assert axis.positions[3] < axis.positions[0] < axis.positions[2] < axis.positions[4]
    np.testing.assert_allclose(axis.positions[:3], [-1, 0, 1])
    assert list(axis.inner) == [True, True, True, False, False]
    figure = plot_evidence(eight_schools_tree(form="matched", free=True))
    words = [label.get_text() for label in strength_panels(figure)[-1].get_xticklabels()]
    assert words[0] == "0\nhard"
    assert words[-1] == "∞\nfree"


@pytest.mark.parametrize("values", [[0.0], [0.0, math.inf], [1.0], [0.0, 2.0], [-1.0, 0.0, 3.0], [1e-6, 1e6]])
def test_unusual_grids_have_an_axis(values):
    axis = strength_axis("sigma", np.array(values))
    assert np.isfinite(axis.positions).all()
    assert len(set(axis.positions)) == len(values)


@pytest.mark.parametrize("num_copies", [60, 400])
def test_many_copies_are_faint_and_six_picked_out(num_copies):
    tree = many_copies(num_copies)
    figure = plot_strength_paths(tree)
    (group,) = copies_of(tree, None)
    picked = [group.labels[k] for k in highlighted(group)]
    assert titles(figure)[1:] == picked
    overview = figure.axes[0]
    (faint,) = [
        c for c in overview.collections if isinstance(c, LineCollection) and len(c.get_segments()) > 20
    ]
    assert len(faint.get_segments()) == min(num_copies, 150)
    assert [text.get_text() for text in overview.texts] == [short(label, 16) for label in picked]
    least = min(group.moved[highlighted(group)])
    assert (np.delete(group.moved, highlighted(group)) <= least).all()
    heights = sorted(text.xy[1] for text in overview.texts if isinstance(text, Annotation))
    assert np.diff(heights).min() > 0.07 * np.ptp(group.mean)


def test_event_elements_get_their_own_part():
    shape = (2, 2, 10)
    tree = build_tree(
        swept={"sigma": [0.0, 1.0]},
        groups={
            "posterior": {"theta": np.random.default_rng(0).normal(size=(*shape, 3, 2))},
            "sweep": {"log_evidence": np.zeros(2), "log_evidence_error": np.zeros(2)},
        },
        event_dims={"theta": ["school", "term"]},
        coords={"school": ["a", "b", "c"], "term": ["intercept", "slope"]},
        attrs={"ties": {"theta": {"kind": "exchangeable", "copy_dims": ["school"], "sigma_from": "sigma"}}},
    )
    assert [group.title for group in copies_of(tree, None)] == ["theta, intercept", "theta, slope"]
    figure = plot_strength_paths(tree)
    assert titles(figure) == ["a", "b", "c"] * 2


def test_the_best_strength_is_the_hardest_of_those_that_errors_cannot_tell_apart():
    assert best_index(np.array([-1.0, -0.5, -0.4, -9.0]), np.array([0.1, 0.1, 0.1, 0.1])) == 1
    assert best_index(np.array([-1.0, -0.5, -0.4]), np.zeros(3)) == 2
    assert best_index(np.array([-math.inf, -0.5, math.nan]), np.array([math.inf, 0.1, math.nan])) == 1
    tree = spoil(spoil(eight_schools_tree(), 30.0, log_evidence=-5.0), 30.0, log_evidence_error=0.01)
    assert best_point(tree) == {"sigma": 30.0}
    assert best_point(fit_tree()) == {}


def test_evidence_is_read_as_a_difference_from_the_best():
    tree = eight_schools_tree()
    above, below = strength_panels(plot_evidence(tree))
    evidence = tree["sweep"].to_dataset()["log_evidence"].values
    expected = evidence - evidence.max()
    np.testing.assert_allclose(curve(above)[-16:], expected[-16:], atol=1e-9)
    assert "elpd" in below.get_title(loc="left")


def test_a_strength_far_below_leaves_the_axis_to_the_others():
    above = strength_panels(plot_evidence(many_copies(60)))[0]
    assert above.get_ylim()[0] > -30
    below = [line for line in above.lines if line.get_marker() == "v"]
    assert [points(line) for line in below] == [1]


def crosses(figure):
    marks = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "x"]
    assert all(line.get_color() == BAD for line in marks)
    return sum(points(line) for line in marks)


def test_numbers_that_must_not_be_trusted_are_crossed():
    tree = eight_schools_tree()
    good = tree["sweep"].to_dataset()["max_pareto_k"].values
    tree["sweep"].dataset = tree["sweep"].to_dataset().assign(max_pareto_k=("sigma", np.minimum(good, 0.1)))
    assert crosses(plot_evidence(tree)) == 0
    assert crosses(plot_pooling(tree)) == 0
    spoiled = spoil(spoil(tree, 0.1, certified=False), 30.0, max_pareto_k=0.9)
    assert crosses(plot_evidence(spoiled)) == 3
    assert crosses(plot_pooling(spoiled)) == 1


def test_pooling_rises_from_one_shared_value():
    tree = eight_schools_tree()
    (axes,) = strength_panels(plot_pooling(tree))
    values = curve(axes)
    assert values[-1] > 3 * values[0]
    assert 0 < values[0] < 1.2


def test_without_ties_pooling_is_that_of_the_model():
    tree = eight_schools_tree()
    tree.attrs["ties"] = "{}"
    (axes,) = strength_panels(plot_pooling(tree))
    assert "p_loo" in axes.get_title(loc="left")


def test_predictive_rows_for_few_observations():
    (check,) = checks_of(select(eight_schools_tree(), sigma=0.0))
    assert list(check.labels) == SCHOOLS
    np.testing.assert_array_equal(check.observed, EFFECT)
    assert check.replicated.shape == (500, 8)


def grouped_tree(index=True, binary=True):
    """A thousand observations in twenty groups, with or without the index that says which."""
    generator = np.random.default_rng(0)
    code = np.arange(1000) % 20
    rate = np.linspace(0.1, 0.9, 20)
    draws = generator.random((2, 50, 1000)) < rate[code]
    observed = generator.random(1000) < rate[code]
    if not binary:
        draws, observed = draws + generator.normal(size=draws.shape), observed + generator.normal(size=1000)
    groups = {
        "posterior": {"theta": generator.normal(size=(2, 50, 20))},
        "posterior_predictive": {"y": draws.astype(float)},
        "observed_data": {"y": observed.astype(float)},
        "sweep": {"log_evidence": np.array(0.0)},
    }
    if index:
        groups["constant_data"] = {"group": code}
    tie = {"kind": "exchangeable", "copy_dims": ["group_name"], "num_copies": 20, "sigma_from": None}
    return build_tree(
        swept={},
        groups=groups,
        event_dims={"theta": ["group_name"], "y": ["row"], "group": ["row"]},
        coords={"group_name": [f"g{k}" for k in range(20)]},
        attrs={"ties": {"theta": tie}},
    )


def test_many_observations_are_averaged_over_the_copies_they_belong_to():
    tree = grouped_tree()
    (check,) = checks_of(tree)
    assert check.xlabel == "mean of y by group"
    assert check.labels[3] == "g3"
    y = tree["observed_data"].to_dataset()["y"].values
    assert check.observed[3] == pytest.approx(y[3::20].mean())


@pytest.mark.parametrize("binary", [True, False])
def test_many_observations_without_groups_are_binned_by_prediction(binary):
    (check,) = checks_of(grouped_tree(index=False, binary=binary))
    assert len(check.labels) == 10
    predicted = check.replicated.mean(0)
    assert (np.diff(predicted) > 0).all()
    assert check.replicated.shape == (100, 10)


def test_predictive_at_one_strength():
    figure = plot_predictive(eight_schools_tree(), sigma=30.0)
    assert titles(figure) == ["sigma = 30"]
    assert len(plot_predictive(eight_schools_tree()).axes) == 6


def test_copies_at_one_strength():
    figure = plot_copies(select(eight_schools_tree(), sigma=30.0), limits=(-50, 50))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == SCHOOLS
    assert axes.get_xlim() == (-50, 50)
    (ribbon,) = plot_copies(select(many_copies(60), sigma=10.0)).axes
    assert ribbon.get_xlabel() == "copies, sorted by mean"


def test_a_chain_keeps_its_order():
    tree = many_copies(60)
    ties = json.loads(tree.attrs["ties"])
    ties["theta"]["kind"] = "chain"
    tree.attrs["ties"] = json.dumps(ties)
    (ribbon,) = plot_copies(select(tree, sigma=10.0)).axes
    assert ribbon.get_xlabel() == "copies in order"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot_strength_paths(fit_tree()), "the tree of a single strength"),
        (lambda: plot_evidence(fit_tree()), "the tree of a single strength"),
        (lambda: plot_pooling(fit_tree()), "the tree of a single strength"),
        (lambda: plot_strength_paths(eight_schools_tree(), "thetta"), "'thetta'.*theta"),
        (lambda: plot_evidence(eight_schools_tree(), along="tau"), r"'tau'.*\['sigma'\]"),
        (lambda: plot_copies(eight_schools_tree()), "a sweep over"),
        (lambda: plot_predictive(eight_schools_tree(), sigma=7.0), "expected one of 0, 0.1"),
        (
            lambda: plot_predictive(select(eight_schools_tree(), sigma=0).drop_nodes("observed_data")),
            "observed_data",
        ),
    ],
)
def test_what_cannot_be_drawn_is_named(call, words):
    with pytest.raises(NameLookupError, match=words):
        call()


@pytest.mark.parametrize(
    ("label", "length", "expected"),
    [
        ("short", 8, "short"),
        ("District 30", 9, "Dist…t 30"),
        ("a  b\nc", 9, "a b c"),
        ("abcdefgh", 5, "ab…gh"),
    ],
)
def test_labels_are_cut_in_the_middle(label, length, expected):
    assert short(label, length) == expected
    assert len(short(label, length)) <= length


# -- the strength itself, and tension ----------------------------------------------------------------


@pytest.mark.parametrize("width", [7.2, 3.5])
def test_strength_shows_the_posterior_and_the_bayes_factors(width):
    tree = eight_schools_tree()
    figure = plot_strength(tree, width=width)
    left, right = figure.axes
    prior = default_prior(tree["sweep"].to_dataset()["sigma"].values)
    posterior, factor = strength_posterior(tree, prior), hard_vs_soft(tree, prior)
    # Density of log sigma: it peaks where density times sigma does.
    sigma = posterior["sigma"].values
    peak = sigma[int(np.argmax(posterior["density"].values * sigma))]
    line = max(left.lines, key=points)
    x, y = (np.asarray(data, dtype=float) for data in (line.get_xdata(), line.get_ydata()))
    assert 10 ** x[int(np.argmax(y))] == pytest.approx(peak)
    rows = [line.get_ydata() for line in right.lines if points(line) == factor.sizes["scale"]]
    np.testing.assert_allclose(np.stack(rows), factor["sensitivity"].values)
    dot = next(line for line in right.lines if points(line) == 1)
    assert np.asarray(dot.get_ydata()) == pytest.approx([float(factor["log_bayes_factor"])])


def test_a_sweep_of_one_strength_has_no_strength_figure():
    tree = normal_means_tree(EFFECT, STDERR, labels=SCHOOLS, dim="school", strengths=(0.0, 1.0))
    assert factors_of(tree) is None


def test_compare_draws_paired_differences():
    tree = eight_schools_tree()
    found, expected = comparison_of(tree), compare(tree)
    assert found is not None
    np.testing.assert_allclose(found.difference, expected["elpd_difference"].values)
    np.testing.assert_allclose(found.error, expected["elpd_difference_se"].values)
    np.testing.assert_allclose(found.weight, expected["weight"].values)
    assert found.difference[found.best] == 0.0 and found.alike[found.best]
    above, below = plot_compare(tree).axes
    assert [bar.get_height() for bar in below.containers[0]] == pytest.approx(found.weight.tolist())
    (bars,) = [x for x in above.collections if isinstance(x, LineCollection)]
    ends = bars.get_segments()
    for (low, high), centre, error in zip(ends, found.difference, found.error, strict=True):
        assert (low[1], high[1]) == pytest.approx((centre - 2 * error, centre + 2 * error))
    assert comparison_of(tree.drop_nodes(["log_likelihood"])) is None
    with pytest.raises(NameLookupError, match="no predictive score of every observation"):
        plot_compare(tree.drop_nodes(["log_likelihood"]))


def test_estimates_are_differences_from_the_joined_one():
    tree = eight_schools_tree()
    found = evidence(tree)
    names = [one.title for one in estimates_of(tree)]
    assert names == ["importance sampling", "bridge sampling", "thermodynamic"]
    for one, name in zip(estimates_of(tree), ("laplace", "bridge", "thermodynamic"), strict=True):
        np.testing.assert_allclose(one.difference, (found[name] - found["combined"]).values)
        np.testing.assert_allclose(one.spread, 1.96 * found[f"{name}_error"].values)
    (axes,) = plot_estimates(tree).axes
    assert len(axes.containers) == 3


def test_tension_marks_the_tie_that_breaks():
    y = np.zeros(40)
    y[7] = 9.0
    labels = [f"district {k}" for k in range(40)]
    tree = normal_means_tree(y, np.full(40, 0.5), strengths=(0.0, 0.3, 1.0), labels=labels, dim="district")
    (site,) = pulls_of(tree)
    assert len(site.labels) == MOST_EDGES
    assert (np.diff(np.abs(site.statistic)) <= 0).all()
    assert site.labels[0] == "district 7"
    assert site.where == "sigma = 1"
    assert site.limit == pytest.approx(3.2272, abs=1e-3)  # normal quantile of 1 - 0.025 / 40
    assert abs(site.statistic[0]) > site.limit > abs(site.statistic[1])
    (axes,) = plot_tension(tree).axes
    red = [line for line in axes.lines if line.get_color() == BAD]
    assert np.concatenate([np.asarray(line.get_xdata()) for line in red]).tolist() == [site.statistic[0]]


def test_tension_without_a_recorded_strength_is_refused():
    tree = many_copies(5)
    records = json.loads(tree.attrs["ties"])
    for record in records.values():
        record["sigma_from"] = None
    tree.attrs["ties"] = json.dumps(records)
    with pytest.raises(NameLookupError, match="no tied site with a recorded strength"):
        plot_tension(tree)


# -- studies -----------------------------------------------------------------------------------------


def test_calibration_names_the_quantity_that_leaves_the_band():
    generator = np.random.default_rng(2)
    uniform = generator.integers(0, 100, (2, 200, 3))
    uniform[1, :, 2] //= 2  # biased at the second strength
    found = _tests(uniform, 99, ["sigma"]).assign_coords(sigma=[0.5, 2.0], quantity=["a", "b", "c"])
    first, second = plot_calibration(found).axes
    assert titles(first.figure) == ["sigma = 0.5", "sigma = 2"]
    for axes, point in ((first, 0), (second, 1)):
        curves = [line for line in axes.lines if points(line) == 99]
        expected = (found["ecdf"] - found["expected"]).isel(sigma=point).transpose("quantity", "rank")
        np.testing.assert_allclose(np.stack([np.asarray(line.get_ydata()) for line in curves]), expected)
    assert [text.get_text() for text in first.texts] == []
    assert [text.get_text() for text in second.texts] == ["c"]


def test_calibration_of_one_strength_has_one_panel():
    ranks = np.random.default_rng(3).integers(0, 100, (200, 2))
    found = _tests(ranks, 99, []).assign_coords(quantity=["a", "b"])
    assert titles(plot_calibration(found)) == ["all quantities"]


def test_risk_is_drawn_with_its_parts_and_its_least():
    sigma = [0.0, 0.5, 1.0, 4.0]
    parts = {"bias_squared": [2.0, 0.5, 0.2, 0.0], "variance": [0.1, 0.4, 1.0, 3.0]}
    data = {name: ("sigma", np.array(value)) for name, value in parts.items()}
    data["risk"] = ("sigma", np.array([2.1, 0.9, 1.2, 3.0]))
    data |= {f"{name}_error": ("sigma", np.full(4, 0.05)) for name in list(data)}
    (axes,) = plot_risk(xr.Dataset(data, coords={"sigma": sigma})).axes
    ring = next(line for line in axes.lines if line.get_markerfacecolor() == "none")
    assert np.asarray(ring.get_ydata()).item() == 0.9
    assert [text.get_text() for text in axes.texts] == ["bias²", "variance", "risk"]
    with pytest.raises(NameLookupError, match="tau"):
        plot_risk(xr.Dataset(data, coords={"sigma": sigma}), along="tau")
