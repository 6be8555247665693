"""Log evidence: the three estimators against closed forms, for every form and on a grid of two ties."""

import math
from functools import partial

import numpy as np
import pytest
import xarray as xr
from gaussian_sweeps import Tied, gaussian_tree, log_evidence
from synthetic import eight_schools_tree, fit_tree, spoil

from bayestie._evidence import evidence
from bayestie._thermodynamic import rule, slope
from bayestie._ties import Tie

STRENGTHS = (0.0, *np.geomspace(0.05, 20, 16).tolist())
GRAPH = [(0, 1), (1, 2), (2, 0), (2, 3), (4, 5)]
TIES = {
    "exchangeable": Tie.exchangeable(7),
    "complete": Tie.complete(7),
    "chain": Tie.chain(7),
    "ring, scaled": Tie.ring(7, scaled=True),
    "grid": Tie.grid(2, 4),
    "weighted graph in two pieces": Tie.edges(6, GRAPH, [1.0, 2.0, 0.5, 3.0, 1.5]),
    "groups": Tie.groups([0, 1, 0, 1, 1, 0, 2]),
}


def _model(tie, form, seed=3, **options):
    generator = np.random.default_rng(seed)
    tied = Tied("theta", tie, np.eye(tie.num_copies), form=form, base=(0.5, 2.0))
    y = 0.5 + 1.5 * generator.normal(size=tie.num_copies)
    return tied, y, gaussian_tree([tied], y, 0.7, {"sigma": options.pop("strengths", STRENGTHS)}, **options)


def _cases():
    for name, tie in TIES.items():
        for form in ("level", "copies", "matched"):
            if form == "level" or not tie.has_hub or (form == "matched" and name == "exchangeable"):
                yield pytest.param(tie, form, id=f"{name}-{form}")


@pytest.mark.parametrize(("tie", "form"), list(_cases()))
def test_slope_is_the_derivative_of_the_closed_form(tie, form):
    tied, y, path = _model(tie, form, num_draws=1000)
    found = slope(path, "sigma")
    assert found is not None
    mean, error = found
    for i, sigma in enumerate(STRENGTHS):
        if sigma == 0:
            assert float(mean[i]) == 0 and float(error[i]) == 0
            continue
        step = 1e-4
        above, below = (log_evidence([tied], [sigma * math.exp(h)], y, 0.7) for h in (step, -step))
        exact = (above - below) / (2 * step)
        assert abs(float(mean[i]) - exact) < 4.5 * float(error[i]) + 1e-6


@pytest.mark.parametrize(("tie", "form"), list(_cases()))
def test_thermodynamic_evidence_within_its_error(tie, form):
    _, _, path = _model(tie, form, num_draws=1000, seed=5)
    found = evidence(path)
    z = (found.thermodynamic - path["sweep"].log_evidence) / found.thermodynamic_error.where(
        found.thermodynamic_error > 0
    )
    assert float(abs(z).max()) < 4
    assert float(found.thermodynamic_error.max()) < 0.5
    assert not found.disagreement.any()


def test_thermodynamic_errors_are_honest():
    # 60 independent sweeps: squared z scores at the far end average to 1 within their own noise.
    z = []
    for seed in range(60):
        tied = Tied("theta", Tie.exchangeable(6), np.eye(6), base=(0.0, 2.0))
        y = np.random.default_rng(seed).normal(size=6) * 1.5
        path = gaussian_tree([tied], y, 0.7, {"sigma": STRENGTHS}, num_draws=100, seed=seed)
        found = evidence(path)
        gap = found.thermodynamic[-1] - path["sweep"].log_evidence[-1]
        z.append(float(gap / found.thermodynamic_error[-1]))
    assert 0.5 < np.mean(np.square(z)) < 1 + 4 * math.sqrt(2 / 60)


@pytest.mark.parametrize("form", ["copies", "matched"])
def test_free_end_is_reached(form):
    tied, y, path = _model(Tie.chain(5), form, strengths=(*STRENGTHS, math.inf), num_draws=1000)
    found = evidence(path)
    exact = log_evidence([tied], [math.inf], y, 0.7)
    assert float(path["sweep"].log_evidence[-1]) == pytest.approx(exact, abs=1e-10)
    assert abs(float(found.thermodynamic[-1]) - exact) < 4 * float(found.thermodynamic_error[-1])


@pytest.mark.parametrize("num", [5, 7, 10, 16, 40])
def test_quadrature_error_covers_what_the_rule_misses(num):
    # With the exact slopes and no Monte Carlo error, what is left is the error of the rule itself.
    tied, y, _ = _model(Tie.chain(7), "level", num_draws=10)
    values = np.array([0.0, *np.geomspace(0.05, 20, num)])
    exact = np.array([log_evidence([tied], [s], y, 0.7) for s in values])
    step = 1e-5
    slopes = np.array(
        [
            (log_evidence([tied], [s * math.exp(step)], y, 0.7) - log_evidence([tied], [s], y, 0.7)) / step
            for s in values
        ]
    )
    slopes[0] = 0.0
    found, error = rule(values).integrate(slopes, np.zeros_like(slopes))
    assert (abs(found - (exact - exact[0])) < 4 * error + 1e-4).all()
    if num >= 16:
        assert error.max() < 0.01


def test_rule_does_not_mind_the_order_of_the_strengths():
    generator = np.random.default_rng(1)
    values = np.array([0.0, 0.1, 0.3, 1.0, 2.0, math.inf])
    slopes, errors = generator.normal(size=6), generator.uniform(size=6)
    order = generator.permutation(6)
    sorted_out = rule(values).integrate(slopes, errors)
    shuffled = rule(values[order]).integrate(slopes[order], errors[order])
    for a, b in zip(sorted_out, shuffled, strict=True):
        np.testing.assert_allclose(b, a[order])


def test_exact_strengths_are_taken_as_they_are():
    path = eight_schools_tree()
    found = evidence(path)
    np.testing.assert_allclose(found.combined, path["sweep"].log_evidence, atol=1e-8)
    np.testing.assert_allclose(found.bridge, path["sweep"].log_evidence, atol=1e-8)
    assert (found.combined_error == 0).all() and not found.disagreement.any()
    assert found.attrs["anchor"] == "absolute"


def test_a_wrong_laplace_value_is_reported_and_not_averaged_away():
    path = eight_schools_tree()
    sigma = float(path["sweep"].sigma[9])
    value = float(path["sweep"].log_evidence[9])
    wrong = spoil(path, sigma, log_evidence=value + 2.0, log_evidence_error=0.05, exact=False)
    found = evidence(wrong).sel(sigma=sigma)
    assert bool(found.disagreement)
    assert evidence(wrong).disagreement.sum() == 1


def test_a_bad_khat_leaves_laplace_out():
    path = eight_schools_tree()
    sigma = float(path["sweep"].sigma[9])
    value = float(path["sweep"].log_evidence[9])
    spoilt = spoil(
        path, sigma, engine="nuts", log_evidence=value + 2.0, log_evidence_error=0.05, khat=1.2, exact=False
    )
    found = evidence(spoilt).sel(sigma=sigma)
    assert float(found.combined) == pytest.approx(value, abs=1e-8)
    assert not bool(found.disagreement)


def test_two_ties_on_a_grid():
    generator = np.random.default_rng(8)
    groups, periods = 5, 4
    rows = np.array([(g, t) for g in range(groups) for t in range(periods)])
    ties = [
        Tied("a", Tie.exchangeable(groups), np.eye(groups)[rows[:, 0]], keyword="sigma"),
        Tied("b", Tie.chain(periods), np.eye(periods)[rows[:, 1]], form="copies", keyword="tau"),
    ]
    y = generator.normal(size=len(rows)) + generator.normal(size=groups)[rows[:, 0]]
    grids = {
        "sigma": (0.0, *np.geomspace(0.1, 10, 9).tolist()),
        "tau": (0.0, *np.geomspace(0.1, 10, 9).tolist(), math.inf),
    }
    path = gaussian_tree(ties, y, 0.8, grids, num_draws=250)
    found = evidence(path)
    assert found.thermodynamic.dims == ("sigma", "tau")
    gap = (found.thermodynamic - path["sweep"].log_evidence).values
    assert (abs(gap) < 4 * found.thermodynamic_error.values + 1e-9).all()
    assert float(abs(gap).max()) < 1.0


def test_a_swept_keyword_that_is_no_strength_gets_its_own_anchors():
    generator = np.random.default_rng(8)
    tied = Tied("theta", Tie.exchangeable(5), np.eye(5))
    y = generator.normal(size=5)
    trees = [gaussian_tree([tied], y, noise, {"sigma": STRENGTHS}) for noise in (0.5, 1.0)]
    datasets = {
        node.path: xr.concat([t[node.path].to_dataset() for t in trees], "noise").transpose("sigma", ...)
        for node in trees[0].subtree
        if "sigma" in node.dims
    }
    datasets = {key: ds.assign_coords(noise=[0.5, 1.0]) for key, ds in datasets.items()}
    root = xr.Dataset(attrs={**trees[0].attrs, "swept": '["sigma", "noise"]'})
    path = xr.DataTree.from_dict({"/": root, **datasets})
    found = evidence(path)
    gap = (found.thermodynamic - path["sweep"].log_evidence).values
    assert (abs(gap) < 4 * found.thermodynamic_error.values + 1e-9).all()


def test_identity_is_not_used_where_the_model_uses_sigma_elsewhere():
    _, _, path = _model(Tie.chain(4), "level")
    records = path.attrs["ties"].replace(
        '"sigma_from": "sigma"', '"sigma_from": "sigma", "sigma_elsewhere": true'
    )
    path.attrs["ties"] = records
    assert slope(path, "sigma") is None
    assert evidence(path).thermodynamic.isnull().all()


def test_what_was_not_kept_is_missing_and_the_rest_stands():
    _, _, path = _model(Tie.chain(4), "level", keep=("posterior", "tie_energy"))
    found = evidence(path)
    assert found.bridge.isnull().all() and found.thermodynamic.notnull().all()
    _, _, path = _model(Tie.chain(4), "level", keep=("posterior",))
    found = evidence(path)
    assert found.thermodynamic.isnull().all() and found.combined.notnull().all()
    nothing = {"log_evidence": None, "log_evidence_error": None}
    _, _, path = _model(Tie.chain(4), "level", keep=("posterior", "tie_energy"), num_draws=500)
    path["sweep"] = xr.DataTree(path["sweep"].to_dataset().drop_vars(list(nothing)))
    found = evidence(path)
    assert found.attrs["anchor"] == "relative"
    assert found.laplace.isnull().all() and float(found.combined[0]) == 0


def test_a_fit_has_scalars():
    found = evidence(fit_tree())
    assert found.combined.ndim == 0 and float(found.combined_error) == 0


def _skewed(generator, a=6.0):
    """p(x) = exp(a x - exp(x)) unnormalised, Z = Gamma(a); g its Laplace Gaussian N(log a, 1 / a)."""

    def densities(x):
        return a * x - np.exp(x), -0.5 * a * (x - math.log(a)) ** 2 + 0.5 * math.log(a / (2 * math.pi))

    draws = np.log(generator.gamma(a, size=(4, 500)))
    return (
        densities(draws),
        densities(math.log(a) + generator.normal(size=4000) / math.sqrt(a)),
        math.lgamma(a),
    )


def _heavy(generator):
    """p(x) the logistic density, Z = 1; g its Laplace Gaussian N(0, 2), with lighter tails."""

    def densities(x):
        return -x - 2 * np.log1p(np.exp(-x)), -0.25 * x**2 - 0.5 * math.log(4 * math.pi)

    return (
        densities(generator.logistic(size=(4, 500))),
        densities(math.sqrt(2) * generator.normal(size=4000)),
        0.0,
    )


def _bridge_tree(make, seed, with_laplace_draws):
    (lp, log_g), (lp_laplace, log_g_laplace), exact = make(np.random.default_rng(seed))
    dims = ("chain", "draw")
    groups = {
        "/": xr.Dataset(attrs={"swept": "[]", "ties": "{}"}),
        "/sample_stats": xr.Dataset({"lp": (dims, lp), "laplace_log_density": (dims, log_g)}),
        "/sweep": xr.Dataset({"engine": ((), "nuts"), "exact": ((), False)}),
    }
    if with_laplace_draws:
        groups["/laplace_draws"] = xr.Dataset(
            {"lp": ("laplace_draw", lp_laplace), "laplace_log_density": ("laplace_draw", log_g_laplace)}
        )
    return xr.DataTree.from_dict(groups), exact


@pytest.mark.parametrize(
    ("make", "with_laplace_draws"),
    [(_skewed, True), (_heavy, True), (_heavy, False)],
    ids=["skewed-pool", "heavy-pool", "heavy"],
)
def test_bridge_with_honest_errors(make, with_laplace_draws):
    z = []
    for seed in range(40):
        tree, exact = _bridge_tree(make, seed, with_laplace_draws)
        found = evidence(tree)
        z.append((float(found.bridge) - exact) / float(found.bridge_error))
        assert float(found.bridge_error) < 0.05
    assert max(abs(np.array(z))) < 4
    # The mean of 40 squares of standard normals has sd sqrt(2 / 40).
    assert abs(np.mean(np.square(z)) - 1) < 4 * math.sqrt(2 / 40)


def test_without_laplace_draws_a_heavy_tailed_ratio_is_refused():
    tree, _ = _bridge_tree(partial(_skewed, a=0.7), 0, with_laplace_draws=False)
    assert math.isnan(float(evidence(tree).bridge))


def test_bridge_is_no_second_opinion_on_resampled_laplace_draws():
    tree, _ = _bridge_tree(_skewed, 0, with_laplace_draws=True)
    for engine in ("laplace", "svi"):
        tree["sweep"] = xr.DataTree(tree["sweep"].to_dataset().assign(engine=((), engine)))
        assert math.isnan(float(evidence(tree).bridge))
