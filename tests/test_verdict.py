"""The verdict: what it recommends, that it never oversteps the evidence, and what it says when in doubt."""

import dataclasses
import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from gaussian_sweeps import Tied, gaussian_tree
from synthetic import EFFECT, STDERR, eight_schools_tree, fit_tree, normal_means_tree, spoil

from bayestie._results import select
from bayestie._ties import Tie
from bayestie._verdict import default_prior, verdict

STRENGTHS = (0.0, *np.geomspace(0.1, 100, 16).tolist())
# Standardised group means whose spread is that of their noise, or far more, or with one outlier.
ALIKE = np.array([1.0, 1.2, 0.9, 1.0, 1.1, 0.95, 1.05, 1.0])
APART = np.array([-30.0, 25.0, 1.0, -14.0, 40.0, 7.0, -3.0, 12.0])
OUTLIER = np.array([1.0, 1.2, 0.9, 1.0, 1.1, 0.95, 1.05, 9.0])


def _means(y, noise=1.0, **options):
    return normal_means_tree(y, np.full(len(y), noise), strengths=STRENGTHS, base_sd=20.0, **options)


def test_hard_sharing_where_the_copies_agree():
    found = verdict(_means(ALIKE))
    assert found.record["recommendation"] == "hard"
    assert found.text.startswith("Share theta completely (sigma = 0)")
    assert found.record["best"] == 0 and found.record["supported"][0] == 0


def test_soft_sharing_where_they_differ():
    found = verdict(_means(APART, 2.0))
    assert found.record["recommendation"] == "soft"
    assert found.record["cost_of_hard"]["log_bayes_factor"] > 100
    low, high = found.record["supported"]
    assert 5 < low < found.record["best"] < high < 60
    assert "Share theta softly" in found.text


def test_eight_schools_hard_and_soft_are_not_told_apart():
    found = verdict(eight_schools_tree())
    assert found.record["recommendation"] == "hard or soft"
    assert "No prior on sigma turns it round" in found.text
    assert found.record["hard_vs_soft"]["never_soft"]


def test_forms_with_a_free_end_weigh_no_sharing_itself():
    found = verdict(eight_schools_tree(form="matched", free=True))
    assert found.record["weakest"] == "inf" and found.record["supported"] == [0.0, "inf"]
    assert found.record["recommendation"] == "cannot tell"
    assert found.text.startswith("The data cannot tell how much theta should be shared.")


def test_no_sharing_where_each_copy_is_its_own():
    # A base much narrower than the copies' spread would forbid it; matched at inf is K independent copies.
    tied = Tied("theta", Tie.complete(12), np.repeat(np.eye(12), 3, 0), form="matched", base=(0.0, 5.0))
    generator = np.random.default_rng(4)
    y = np.repeat(5 * generator.normal(size=12), 3) + 0.3 * generator.normal(size=36)
    path = gaussian_tree([tied], y, 0.3, {"sigma": (0.0, *np.geomspace(0.01, 3, 12), math.inf)})
    found = verdict(path)
    assert found.record["recommendation"] == "none"
    assert found.text.startswith("Do not share theta: the data speak for no sharing")


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("make", [dist.HalfNormal, dist.HalfCauchy, lambda s: dist.Exponential(1 / s)])
def test_soft_is_never_favoured_where_the_evidence_peaks_at_zero(make, scale):
    # Dyestuff2's balanced layout: six batches whose means spread less than their noise allows for.
    batches = np.array([5.2, 5.7, 5.6, 5.9, 5.8, 5.6])
    path = normal_means_tree(
        batches - batches.mean(),
        np.full(6, 3.7 / math.sqrt(5)),
        strengths=STRENGTHS,
        base_sd=100.0,
        num_draws=60,
    )
    found = verdict(path, make(scale))
    assert found.record["recommendation"] in ("hard", "hard or soft", "cannot tell")
    assert found.record["hard_vs_soft"]["log_bayes_factor"] >= -1e-6
    assert found.record["hard_vs_soft"]["sensitivity"][0] >= -1e-6
    assert "log Bayes factor" in found.text and "as the prior widens" in found.text
    assert "falling" not in found.text
    assert "for soft sharing" not in found.text and "softly" not in found.text


def test_it_states_how_the_bayes_factor_moves_with_the_prior():
    found = verdict(_means(ALIKE))
    low, high = found.record["hard_vs_soft"]["sensitivity"]
    assert f"it runs from {low:+.2f} to {high:+.2f}, rising as the prior widens" in found.text
    wide = verdict(_means(ALIKE), dist.HalfCauchy(50.0)).record["hard_vs_soft"]["log_bayes_factor"]
    narrow = verdict(_means(ALIKE), dist.HalfCauchy(0.5)).record["hard_vs_soft"]["log_bayes_factor"]
    assert narrow < found.record["hard_vs_soft"]["log_bayes_factor"] < wide


def test_the_default_prior_knows_the_grid_and_not_the_data():
    values = np.array([0.0, 0.1, 1.0, 40.0, math.inf])
    assert float(default_prior(values).icdf(torch.tensor(0.5))) == pytest.approx(2.0)
    one, other = verdict(_means(ALIKE)).record, verdict(_means(APART, 2.0)).record
    assert one["prior"] == other["prior"]
    assert "chosen without looking at the data" in verdict(_means(ALIKE)).text
    assert "HalfNormal(2), as given" in verdict(_means(ALIKE), dist.HalfNormal(2.0)).text


def test_the_outlying_copy_is_named():
    path = _means(OUTLIER, 0.5, labels=list("abcdefgh"), dim="copy")
    found = verdict(path)
    assert [row["tie"] for row in found.record["tension"]] == ["h"]
    assert "theta[h]" in found.text


def test_a_short_grid_is_a_caveat():
    path = normal_means_tree(APART, np.full(8, 2.0), strengths=(0.0, 0.1, 0.3, 1.0, 2.0, 4.0), base_sd=20.0)
    found = verdict(path)
    assert any("sweep further" in caveat for caveat in found.record["caveats"])
    assert "sweep further" in found.text
    assert found.record["recommendation"] != "soft"


def test_without_hard_sharing_in_the_grid_it_says_so():
    path = normal_means_tree(EFFECT, STDERR, strengths=tuple(np.geomspace(8, 60, 8)))
    found = verdict(path)
    assert found.record["recommendation"] == "cannot tell" and found.record["hard_vs_soft"] is None
    assert "Hard sharing was not swept" in found.text


def test_uncertified_strengths_are_said_to_be():
    path = eight_schools_tree()
    sigma = float(path["sweep"].sigma[4])
    found = verdict(spoil(path, sigma, certified=False, reason="khat 0.9 above 0.7"))
    assert found.record["certified"] is False
    assert found.record["uncertified"] == [{"sigma": sigma, "reason": "khat 0.9 above 0.7"}]
    assert "1 of 17 swept points are not certified" in found.text and "khat 0.9" in found.text
    assert "The draws of all 17 swept points are certified." in verdict(path).text


def test_disagreeing_estimates_are_a_caveat():
    path = eight_schools_tree()
    sigma = float(path["sweep"].sigma[9])
    value = float(path["sweep"].log_evidence[9])
    found = verdict(spoil(path, sigma, log_evidence=value + 3.0, log_evidence_error=0.05, exact=False))
    assert "The estimates of the evidence disagree at 1 of the strengths." in found.text


def test_record_survives_json_and_is_frozen():
    found = verdict(eight_schools_tree(form="matched", free=True))
    assert json.loads(json.dumps(found.record, allow_nan=False)) == found.record
    assert str(found) == found.text
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.text = ""  # pyright: ignore[reportAttributeAccessIssue] - that it cannot be set is the test


def _without(path, groups=(), sweep=()):
    out = path.copy()
    for group in groups:
        del out[group]
    out["sweep"] = xr.DataTree(out["sweep"].to_dataset().drop_vars(list(sweep)))
    return out


@pytest.mark.parametrize(
    ("groups", "sweep", "expected"),
    [
        (("log_likelihood",), (), "In leave-one-out prediction"),
        (("log_likelihood",), ("elpd",), "Predictive scores were not kept."),
        (("sample_stats", "log_prior", "tie_energy"), (), "log Bayes factor"),
        (("posterior", "log_likelihood"), (), "log Bayes factor"),
        ((), ("log_evidence", "log_evidence_error"), "log Bayes factor"),
        (("tie_energy", "sample_stats"), ("log_evidence", "log_evidence_error"), "The data cannot tell"),
        ((), ("certified", "reason", "khat", "ess_weights", "engine", "exact"), "does not say whether"),
    ],
)
def test_works_with_what_was_kept(groups, sweep, expected):
    found = verdict(_without(eight_schools_tree(), groups, sweep))
    assert expected in found.text
    assert "nan" not in found.text
    json.dumps(found.record, allow_nan=False)


def test_a_fit_says_that_it_cannot_say():
    found = verdict(fit_tree())
    assert "cannot say how much to share" in found.text and "The draws are certified." in found.text
    assert found.record["recommendation"] == "cannot tell"
    assert "cannot say" in verdict(select(eight_schools_tree(), sigma=0.0)).text


def test_two_ties_get_an_answer_each():
    generator = np.random.default_rng(8)
    rows = np.array([(g, t) for g in range(6) for t in range(4)])
    ties = [
        Tied("a", Tie.exchangeable(6), np.eye(6)[rows[:, 0]], keyword="sigma"),
        Tied("b", Tie.exchangeable(4), np.eye(4)[rows[:, 1]], keyword="tau"),
    ]
    y = 0.4 * generator.normal(size=len(rows)) + 3.0 * generator.normal(size=6)[rows[:, 0]]
    values = (0.0, *np.geomspace(0.05, 40, 8).tolist())
    found = verdict(gaussian_tree(ties, y, 0.4, {"sigma": values, "tau": values}, num_draws=100))
    answers = found.record["answers"]
    assert answers["sigma"]["recommendation"] == "soft"
    assert answers["tau"]["hard_vs_soft"]["log_bayes_factor"] > 0
    assert "sigma: Share a softly" in found.text and "tau: Share b" in found.text
    assert found.record["recommendation"].startswith("sigma: soft; tau: ")


def test_a_keyword_that_is_no_strength_says_nothing_about_sharing():
    path = eight_schools_tree()
    path.attrs["ties"] = path.attrs["ties"].replace('"sigma_from": "sigma"', '"sigma_from": null')
    found = verdict(path)
    assert found.record["recommendation"] == "not a tie"
    assert "sigma is not the strength of a tie" in found.text
