"""The answer in words: how much to share, what it costs not to, and how far to trust it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from torch.distributions import Distribution

from bayestie import _verdict_words as words
from bayestie._curve import MASS_OUTSIDE, Curve
from bayestie._errors import CoverageError, NameLookupError
from bayestie._evidence import evidence
from bayestie._marginal import curve_along
from bayestie._path import holds, sites_along, sweep_value, swept_values, tied_sites
from bayestie._predict import compare, difference, stored_comparison
from bayestie._results import select, swept_names
from bayestie._strength import hard_vs_soft, strength_posterior
from bayestie._strength_prior import describe
from bayestie._tension import tension

# Odds below which evidence is not worth a mention (Jeffreys; Kass and Raftery 1995).
DECIDES = math.log(3.0)
# A strength is supported if no other has twenty times its evidence.
SUPPORTED = math.log(20.0)
# Differences in elpd below this are noise whatever their standard error (Sivula et al. 2025).
SMALL_ELPD = 4.0
# Family-wise level at which a tie is said to be in tension.
TENSION_LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """How much the parameters should be shared: a text to read and the record it was written from."""

    text: str
    record: dict[str, Any]

    def __str__(self) -> str:
        return self.text


def verdict(path: xr.DataTree, prior: Distribution | Mapping[str, Distribution] | None = None) -> Verdict:
    r"""Say in words how much sharing the data support, what the alternatives cost, and how sure that is.

    Three options are weighed by evidence: hard sharing (sigma = 0), soft sharing averaged over the prior
    on sigma, and no sharing (sigma = inf, or the largest strength swept). One beats another if its
    evidence is at least three times as high, by more than two errors of the estimate, and, where soft
    sharing is one of the two, if no half-Cauchy prior on sigma whose median is 1/4 to 4 times that of
    `prior` turns it round. What nothing beats is recommended; if that
    leaves several, the data cannot tell between them, and the text says so. Soft sharing is never
    recommended where the evidence is highest at sigma = 0, since then no prior on sigma prefers it.

    Args:
        path: what ``sweep`` returned, or a fit.
        prior: prior on sigma, as in `strength_posterior`. Where left out, half-Cauchy with its median at the
            geometric middle of the strengths swept (0 and inf aside): symmetric in log sigma about the
            middle of the grid, so that it follows from the strengths you chose and not from the data.

    Returns:
        A frozen `Verdict`: ``text``, paragraphs separated by blank lines, and ``record``, JSON-able (inf
        is the string "inf", unknown is null):

        - ``recommendation``: "hard", "soft", "none", "hard or soft", "soft or none", "cannot tell", or
          "not a tie";
        - ``supported``: range of sigma within 20 to 1 of the best, ``best``; ``posterior`` of sigma;
        - ``hard_vs_soft``: log Bayes factor, its error and its range over priors (``sensitivity``);
        - ``cost_of_hard``, ``cost_of_none``: ``log_bayes_factor`` of soft sharing against it, with
          ``error``, and its ``elpd_difference`` to the best strength, with ``se``;
        - ``tension``: ties the data pull against; ``certified``, ``uncertified``, ``caveats``.

        With several swept names ``answers`` holds one such record for each.

    Reference: Kass and Raftery (1995), JASA 90; Sivula et al. (2025), Bayesian Analysis.
    """
    names = swept_names(path)
    if not names:
        return _of_fit(path)
    compared = _compared(path)
    answers = {name: _answer(path, name, prior, compared) for name in names}
    certified = _certification(path, answers)
    record = words.plain(_merge(answers) | certified)
    return Verdict(words.write(record), record)


def default_prior(values: np.ndarray) -> Distribution:
    """Half-Cauchy with its median at the geometric middle of the strengths between 0 and inf."""
    inner = values[(values > 0) & np.isfinite(values)]
    middle = math.sqrt(float(inner.min()) * float(inner.max()))
    return dist.HalfCauchy(torch.tensor(middle, dtype=torch.float64))


def _merge(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if len(answers) == 1:
        return {**next(iter(answers.values())), "answers": answers}
    joined = "; ".join(f"{name}: {answer['recommendation']}" for name, answer in answers.items())
    return {"recommendation": joined, "answers": answers}


def _answer(path: xr.DataTree, name: str, prior: Any, compared: xr.Dataset | None) -> dict[str, Any]:
    sites = [site.name for site in tied_sites(path).values() if site.axis == name]
    record: dict[str, Any] = {"strength": name, "sites": sites, "recommendation": "not a tie", "caveats": []}
    best = _best_point(path, compared)
    record["prediction"] = _prediction(path, name, compared, best)
    if not sites:
        record["best_by_evidence"] = _best_value(path, name)
        return record
    values = swept_values(path, name)
    if not bool(((values > 0) & np.isfinite(values)).any()):
        record["recommendation"] = "cannot tell"
        held = ", ".join(f"{value:g}" for value in values)
        record["caveats"].append(f"The sweep holds no strength between 0 and inf, only {name} = {held}.")
        return record
    priors = _priors(path, name, prior)
    record["prior"] = describe(priors[name])
    record["prior_chosen"] = "by the strengths swept" if prior is None else "by the user"
    try:
        curve = curve_along(path, name, priors)
    except CoverageError as error:
        record["recommendation"] = "cannot tell"
        record["caveats"].append(str(error))
        return record
    record |= _by_evidence(path, name, priors, curve, record["caveats"])
    record["tension"] = _tension(path, name, sites, record["posterior"]["median"], best)
    if record["prediction"]:
        record["cost_of_hard"] |= record["prediction"]["hard"]
        record["cost_of_none"] |= record["prediction"]["none"]
    return record


def _priors(path: xr.DataTree, name: str, prior: Any) -> dict[str, Distribution]:
    strengths = [other for other in swept_names(path) if other == name or sites_along(path, other)]
    given = dict(prior) if isinstance(prior, Mapping) else {name: prior} if prior is not None else {}
    return {other: given.get(other) or default_prior(swept_values(path, other)) for other in strengths}


def _by_evidence(
    path: xr.DataTree, name: str, priors: dict[str, Distribution], curve: Curve, caveats: list[str]
) -> dict[str, Any]:
    posterior = strength_posterior(path, priors, name=name)
    if not bool(posterior["covered"]):
        caveats.append(str(posterior.attrs["reason"]))
    middle = {f"{q:g}": float(x) for q, x in zip(posterior["quantile"], posterior["quantiles"], strict=True)}
    soft, soft_error = float(posterior["log_marginal"]), float(posterior["log_marginal_error"])
    free, free_error = curve.free or (float(curve.log_evidence[-1]), float(curve.error[-1]))
    out: dict[str, Any] = {
        "posterior": {"median": middle["0.5"], "low": middle["0.025"], "high": middle["0.975"]},
        "supported": _supported(curve),
        "best": _peak_strength(curve),
        "weakest": math.inf if curve.free else float(curve.values[-1]),
        "cost_of_none": {"log_bayes_factor": soft - free, "error": math.hypot(soft_error, free_error)},
        "cost_of_hard": {},
        "hard_vs_soft": None,
    }
    beaten = set()
    softs = [soft]
    try:
        against = hard_vs_soft(path, priors, name=name)
    except CoverageError as error:
        caveats.append(f"Hard sharing was not swept, so nothing is said of it. {error.fix}")
        out["recommendation"] = "cannot tell"
        return out
    factor, error = float(against["log_bayes_factor"]), float(against["log_bayes_factor_error"])
    hard, hard_error = curve.at_zero, curve.at_zero_error
    table = against["sensitivity"].values
    heavy = against["sensitivity"].sel(kind="half_cauchy").values
    softs += list(hard - heavy)
    spread = [float(table.min()), float(table.max())]
    peak, peak_error = float(against["max_log_soft"]), float(against["max_log_soft_error"])
    out["hard_vs_soft"] = {
        "log_bayes_factor": factor,
        "error": error,
        "probability_hard": float(against["probability_hard"]),
        "sensitivity": spread,
        "medians": [float(against["prior_median"].min()), float(against["prior_median"].max())],
        "by_scale": [float(x) for x in heavy],
        "max_log_soft": peak,
        "never_soft": bool(peak <= 2 * peak_error + 1e-3),
    }
    if out["hard_vs_soft"]["never_soft"]:
        # What rises above it does so by less than the error.
        out["best"] = 0.0
    out["cost_of_hard"] = {"log_bayes_factor": -factor, "error": error}
    if _beats(hard - np.array(softs), error) or (
        out["hard_vs_soft"]["never_soft"] and factor > DECIDES + 2 * error
    ):
        beaten.add("soft")
    if _beats(np.array(softs) - hard, error) and not out["hard_vs_soft"]["never_soft"]:
        beaten.add("hard")
    none_error = math.hypot(soft_error, free_error)
    if _beats(np.array(softs) - free, none_error) or _beats(
        np.array([hard - free]), math.hypot(hard_error, free_error)
    ):
        beaten.add("none")
    if _beats(free - np.array(softs), none_error):
        beaten.add("soft")
    if _beats(np.array([free - hard]), math.hypot(hard_error, free_error)):
        beaten.add("hard")
    if not curve.free and _reaches_beyond(posterior):
        # Soft sharing then means weaker sharing than was swept: it cannot be told from none.
        beaten.discard("none")
    left = [option for option in ("hard", "soft", "none") if option not in beaten]
    out["recommendation"] = {
        ("hard",): "hard",
        ("soft",): "soft",
        ("none",): "none",
        ("hard", "soft"): "hard or soft",
        ("soft", "none"): "soft or none",
    }.get(tuple(left), "cannot tell")
    if "none" in left and not curve.free and curve.log_evidence[-1] >= curve.log_evidence.max() - DECIDES:
        caveats.append(
            f"The evidence has not fallen at the largest strength, {name} = {curve.values[-1]:.3g}: "
            "sweep further."
        )
    return out


def _reaches_beyond(posterior: xr.Dataset) -> bool:
    """Whether the posterior of sigma reaches beyond the largest strength swept."""
    return float(posterior["mass_above"]) > MASS_OUTSIDE


def _beats(gaps: np.ndarray, error: float) -> bool:
    # First the gap under the chosen prior, then those under the family around it.
    return bool(gaps[0] >= DECIDES + 2 * error and (gaps >= -2 * error).all())


def _fine(curve: Curve) -> np.ndarray:
    low, high = curve.values[0], curve.values[-1]
    return np.concatenate(
        [low * np.linspace(0.05, 0.95, 19), np.geomspace(low, high, 40 * len(curve.values))]
    )


def _peak_strength(curve: Curve) -> float:
    fine = _fine(curve)
    values = curve(fine)
    best = float(fine[np.argmax(values)])
    top = float(values.max())
    if curve.hard and curve.hard[0] >= top - 1e-6:
        return 0.0
    return math.inf if curve.free and curve.free[0] >= top else best


def _supported(curve: Curve) -> list[float]:
    fine = _fine(curve)
    values = curve(fine)
    ends = [x[0] for x in (curve.hard, curve.free) if x]
    limit = max([float(values.max()), *ends]) - SUPPORTED
    inside = fine[values >= limit]
    low = 0.0 if curve.at_zero >= limit else float(inside.min(initial=math.inf))
    high = math.inf if curve.free and curve.free[0] >= limit else float(inside.max(initial=0.0))
    return [low, high]


def _compared(path: xr.DataTree) -> xr.Dataset | None:
    try:
        return stored_comparison(path) if "loo" in path.children else compare(path)
    except NameLookupError:
        return None


def _best_point(path: xr.DataTree, compared: xr.Dataset | None) -> dict[str, int]:
    """The swept point with most evidence; by prediction where evidence was not kept."""
    values = evidence(path)["combined"]
    if not np.isfinite(values).any():
        values = compared["elpd"] if compared is not None else values.fillna(0.0)
    index = np.unravel_index(int(np.nanargmax(values.values)), values.shape)
    return {str(name): int(i) for name, i in zip(values.dims, index, strict=True)}


def _best_value(path: xr.DataTree, name: str) -> float | None:
    values = evidence(path)["combined"]
    if not np.isfinite(values).any():
        return None
    return float(swept_values(path, name)[_best_point(path, None)[name]])


def _prediction(
    path: xr.DataTree, name: str, compared: xr.Dataset | None, best: dict[str, int]
) -> dict[str, Any] | None:
    """elpd of the ends against the best strength along one name, the others held where evidence is best."""
    if compared is None:
        return None
    others = {key: i for key, i in best.items() if key != name}
    values = swept_values(path, name)
    elpd = compared["elpd"].isel(others).values
    top = {**others, name: int(np.argmax(elpd))}
    gaps = [difference(compared, {**others, name: i}, top) for i in range(len(values))]
    alike = [
        i for i, (gap, se) in enumerate(gaps) if abs(gap) < SMALL_ELPD or abs(gap) <= 2 * np.nan_to_num(se)
    ]
    ends = {"hard": int(np.argmin(values)), "none": int(np.argmax(values))}
    found: dict[str, Any] = {
        key: {"elpd_difference": gaps[i][0], "se": gaps[i][1]} for key, i in ends.items()
    }
    bad = compared["num_bad_k"].isel(others).values if "num_bad_k" in compared else np.zeros(len(values))
    return {
        **found,
        "best": float(values[top[name]]),
        "alike": [float(values[alike].min()), float(values[alike].max())],
        "all_alike": len(alike) == len(values),
        "lowest": float(values.min()),
        "num_bad_k": int(bad[[top[name], *ends.values()]].max()),
    }


def _tension(
    path: xr.DataTree, name: str, sites: list[str], at: float, best: dict[str, int]
) -> list[dict[str, Any]]:
    """Ties that the data pull against at the strength nearest the posterior median."""
    values = swept_values(path, name)
    inner = np.flatnonzero((values > 0) & np.isfinite(values))
    point = {other: float(swept_values(path, other)[i]) for other, i in best.items()}
    point[name] = float(values[inner[np.argmin(np.abs(np.log(values[inner] / at)))]])
    if not all(holds(path, "posterior", x) for site in sites for x in (site, f"{site}_level")):
        return []
    found = []
    for site, node in tension(select(path, **point)).children.items():
        if site not in sites:
            continue
        here = node.to_dataset()
        p_value = here["p_value"]
        for place in np.argwhere(p_value.values * p_value.size < TENSION_LEVEL):
            where = {str(dim): int(i) for dim, i in zip(p_value.dims, place, strict=True)}
            one = here.isel(where)
            rest = [str(one[dim].item()) for dim in p_value.dims if dim != "edge"]
            found.append(
                {
                    "site": site,
                    "tie": ", ".join([str(one["edge"].item()), *rest]),
                    "difference": float(one["difference"]),
                    "statistic": float(one["statistic"]),
                    "p_value": float(one["p_value"]),
                    "at": point[name],
                }
            )
    return sorted(found, key=lambda row: row["p_value"])


def _certification(path: xr.DataTree, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = swept_names(path)
    certified, reason = sweep_value(path, "certified"), sweep_value(path, "reason")
    flags = (
        np.ones([len(swept_values(path, n)) for n in names], bool) if certified is None else certified.values
    )
    bad = []
    for index in np.argwhere(~flags.astype(bool)):
        point = {name: float(swept_values(path, name)[i]) for name, i in zip(names, index, strict=True)}
        bad.append({**point, "reason": "" if reason is None else str(reason.values[tuple(index)])})
    apart = evidence(path)["disagreement"].values
    caveats = [caveat for answer in answers.values() for caveat in answer["caveats"]]
    if apart.any():
        caveats.append(f"The estimates of the evidence disagree at {int(apart.sum())} of the strengths.")
    return {
        "certified": not bad and certified is not None,
        "num_points": int(flags.size),
        "uncertified": bad,
        "caveats": caveats,
    }


def _of_fit(path: xr.DataTree) -> Verdict:
    compared = _compared(path)
    certified, reason = sweep_value(path, "certified"), sweep_value(path, "reason")
    record: dict[str, Any] = {
        "recommendation": "cannot tell",
        "sites": list(tied_sites(path)),
        "elpd": None if compared is None else float(compared["elpd"]),
        "elpd_se": None if compared is None or "elpd_se" not in compared else float(compared["elpd_se"]),
        "certified": certified is not None and bool(certified),
        "reason": "" if reason is None else str(reason.item()),
        "caveats": [],
    }
    record = words.plain(record)
    return Verdict(words.write_fit(record), record)
