"""The parts of the report that are figures and tables, each with a caption and a text alternative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from bayestie._report._svg import inline_svg
from bayestie._report._sweep_view import SweepView, Table
from bayestie.plots import (
    plot_compare,
    plot_estimates,
    plot_evidence,
    plot_pooling,
    plot_strength,
    plot_strength_paths,
    plot_tension,
)
from bayestie.plots._compare import SMALL, Comparison, comparison_of
from bayestie.plots._estimates import Estimates, estimates_of
from bayestie.plots._paths import MOST_PANELS
from bayestie.plots._strength import Factors, factors_of
from bayestie.plots._style import number
from bayestie.plots._tension import Pulls, pulls_of
from bayestie.plots._values import Copies

WIDE, NARROW = 7.2, 3.5


@dataclass(frozen=True)
class Section:
    """A figure of the page: heading, drawings for wide and narrow screens, caption, numbers."""

    key: str
    heading: str
    drawings: tuple[Markup, ...]
    caption: tuple[str, ...]
    table: Table | None = None


def sections_of(view: SweepView, prior: Any = None) -> list[Section]:
    """Paths, evidence with LOO, paired differences, the strength's posterior, pooling, tension, estimates."""
    found = [_paths(view), _evidence(view)]
    compared = comparison_of(view.tree)
    if compared is not None:
        found.append(_prediction(view, compared))
    factors = factors_of(view.tree, prior)
    if factors is not None:
        found.append(_strength(view, factors, prior))
    if view.pooled:
        found.append(_pooling(view))
    pulls = pulls_of(view.tree)
    if pulls:
        found.append(_tension(view, pulls))
    estimates = estimates_of(view.tree)
    if len(estimates) > 1:
        found.append(_estimates(view, estimates))
    return found


def _paths(view: SweepView) -> Section:
    groups = view.groups
    name = view.axis.name
    num_copies = len(groups[0].labels)
    what = [
        "Each panel is one copy: the line is its posterior mean; the dark band holds it with probability "
        f"one half, the pale band nine times in ten. Left, at small {name}, all copies are held together; "
        "to the right each may go its own way."
    ]
    if num_copies > MOST_PANELS:
        what = [
            f"Above, the posterior mean of each copy against {name}: left they are held together, to the "
            "right each may go its own way. Picked out are the copies that move farthest; below, each of "
            "these with the bands that hold it with probability one half (dark) and nine times in ten (pale)."
        ]
    ends = [
        text
        for value, text in (
            (0.0, "0 is hard sharing: one value for all."),
            (np.inf, "∞ is no sharing: each copy by itself."),
        )
        if value in view.axis.values
    ]
    if ends:
        what.append(" ".join(ends) + " The ends stand apart, because a log scale never reaches them.")
    description = " ".join(_describe_paths(group, view) for group in groups)
    return Section(
        "paths",
        "Where each copy goes as sharing loosens",
        _drawings(view, "paths", description, lambda width: plot_strength_paths(view.tree, width=width)),
        tuple(what),
    )


def _describe_paths(group: Copies, view: SweepView) -> str:
    first, last = group.mean[0], group.mean[-1]
    low, high = int(np.argmin(last)), int(np.argmax(last))
    end = view.name_of(len(view.axis.values) - 1)
    return (
        f"Posterior means of {group.title} for {len(group.labels)} copies. At {view.name_of(0)} they lie "
        f"between {first.min():.3g} and {first.max():.3g}; at {end} between "
        f"{last[low]:.3g} ({group.labels[low]}) and {last[high]:.3g} ({group.labels[high]})."
    )


def _evidence(view: SweepView) -> Section:
    sentences = []
    for score in view.scores:
        best = score.best
        ends = ", ".join(
            f"{score.values[i] - score.values[best]:+.2f} at {view.name_of(i)}"
            for i in (0, len(score.values) - 1)
        )
        sentences.append(f"{score.title} is highest at {view.name_of(best)}; against that, {ends}.")
    caption = [
        "The ring marks the best strength (of equals, the strongest sharing); heights are differences from "
        "it. Log evidence says how well each "
        "strength predicted the data as a whole, before seeing them: one below the best is odds of 1 to 2.7, "
        "three below, 1 to 20. The band is the Monte Carlo error (95%); exact numbers have none.",
    ]
    if len(view.scores) > 1:
        caption.append(
            "The predictive score says how well each observation is predicted from the others "
            "(leave-one-out). Its band is one standard error over observations, most of which all strengths "
            "share: differences between strengths are surer than the band suggests."
        )
    if any(not score.trusted.all() for score in view.scores):
        caption.append(
            "A red cross marks a number that must not be trusted; the table of diagnostics says why."
        )
    head = [view.axis.name]
    for score in view.scores:
        head += [score.title, "± 95%" if score is view.scores[0] else "± se"]
    rows = [
        (
            number(value),
            *(text for s in view.scores for text in (f"{s.values[i]:.2f}", f"{s.spread[i]:.2g}")),
        )
        for i, value in enumerate(view.axis.values)
    ]
    return Section(
        "evidence",
        "What the data say of each strength",
        _drawings(view, "evidence", " ".join(sentences), lambda width: plot_evidence(view.tree, width=width)),
        tuple(caption),
        Table(tuple(head), tuple(rows)),
    )


def _strength(view: SweepView, factors: Factors, prior: Any) -> Section:
    name, posterior, factor = view.axis.name, factors.posterior, factors.factor
    quantiles = [float(posterior["quantiles"].sel(quantile=q)) for q in (0.5, 0.025, 0.975)]
    log_factor, error = (float(factor[key]) for key in ("log_bayes_factor", "log_bayes_factor_error"))
    median = float(factor["prior_median"].values[len(factor["prior_median"]) // 2])
    description = (
        f"Under the prior {posterior.attrs['prior']}, {name} has posterior median {quantiles[0]:.3g}, 95% "
        f"between {quantiles[1]:.3g} and {quantiles[2]:.3g}. The log Bayes factor of hard against soft "
        f"sharing is {log_factor:+.2f}, with an error of {error:.2g}."
    )
    caption = [
        f"Left, if sharing is soft: what the data and the prior (dashed; {posterior.attrs['prior']}) say of "
        f"{name} together, on a log scale; the bar below holds it with probability 95%. Any other prior "
        "can be put in afterwards, without a new fit.",
        f"Right, one common value against soft sharing: above 0 the data speak for {name} = 0, below for "
        "some spread; dashed lines stand at 3 to 1. The factor depends on the prior, so it is drawn for four "
        f"families against their median; the dot is the prior on the left, median {number(median)}.",
    ]
    if not bool(posterior["covered"]):
        caption.append(f"Not to be trusted: {posterior.attrs['reason']}.")
    rows = tuple(
        (str(kind), *(f"{x:+.2f}" for x in row))
        for kind, row in zip(factor["kind"].values, factor["sensitivity"].values, strict=True)
    )
    head = ("log Bayes factor for hard", *(f"median {number(m)}" for m in factor["prior_median"].values))
    return Section(
        "strength",
        "How strong the sharing is",
        _drawings(
            view, "strength", description, lambda width: plot_strength(view.tree, prior=prior, width=width)
        ),
        tuple(caption),
        Table(head, rows),
    )


def _tension(view: SweepView, pulls: list[Pulls]) -> Section:
    sentences = []
    for site in pulls:
        beyond = [
            label for label, value in zip(site.labels, site.statistic, strict=True) if abs(value) > site.limit
        ]
        sentences.append(
            f"{site.title}: {len(beyond)} of {site.num_edges} beyond what chance allows"
            + (f" ({', '.join(beyond)})" if beyond else "")
            + f"; the strongest pull is {site.statistic[0]:+.2f} at {site.labels[0]}."
        )
    caption = [
        f"At {pulls[0].where}. How far the data pull a copy, or two neighbours, from what the tie expects, "
        "in standard deviations of such pulls where the tie holds: 95% fall in the band. Dashed, the "
        "limit for all of them together; a red dot beyond it is a tie that breaks.",
        *sentences,
    ]
    rows = [
        (label, f"{value:+.2f}", "beyond" if abs(value) > site.limit else "")
        for site in pulls
        for label, value in zip(site.labels, site.statistic, strict=True)
    ]
    return Section(
        "tension",
        "Which ties the data pull against",
        _drawings(view, "tension", " ".join(sentences), lambda width: plot_tension(view.tree, width=width)),
        tuple(caption),
        Table(("tie", "pull", "verdict"), tuple(rows)),
    )


def _prediction(view: SweepView, found: Comparison) -> Section:
    alike = int(found.alike.sum())
    values = view.axis.values
    if alike == len(values):
        sentence = "Nothing tells any strength from the best: prediction alone does not choose."
    else:
        worse = [view.name_of(int(i)) for i in np.flatnonzero(~found.alike)]
        listed = ", ".join(worse[:4]) + (f" and {len(worse) - 4} more" if len(worse) > 4 else "")
        sentence = f"Nothing tells {alike} of {len(values)} strengths from the best. Worse are {listed}."
    caption = [
        f"Each strength against {view.name_of(found.best)}, which predicts best, observation by observation: "
        "what all strengths predict equally well or badly cancels, so these errors are the ones to go by. "
        f"Differences below {SMALL:.0f} (pale band), or within two of their errors, decide nothing. "
        "Stacking weights say how strengths would be mixed to predict best together.",
        sentence,
    ]
    if found.num_bad_k.any():
        caption.append(
            f"A red cross: up to {int(found.num_bad_k.max())} observations there have a Pareto k too large "
            "for their score to be trusted. bayestie.loo_refits leaves these out by fitting again."
        )
    rows = [
        (
            number(value),
            f"{found.difference[i]:+.2f}",
            f"{found.error[i]:.2g}",
            f"{found.weight[i]:.2f}",
            f"{found.num_bad_k[i]}",
        )
        for i, value in enumerate(values)
    ]
    return Section(
        "prediction",
        "Which strengths predict as well as the best?",
        _drawings(view, "prediction", sentence, lambda width: plot_compare(view.tree, width=width)),
        tuple(caption),
        Table((view.axis.name, "difference", "± se", "stacking weight", "bad k"), tuple(rows)),
    )


def _estimates(view: SweepView, estimates: list[Estimates]) -> Section:
    sentences = []
    for one in estimates:
        known = np.isfinite(one.difference)
        worst = int(np.nanargmax(np.abs(one.difference)))
        # Exact values differ by rounding, and have no error.
        inside = np.abs(one.difference[known]) <= one.spread[known] + 1e-6
        sentences.append(
            f"{one.title}: 0 is inside its interval at {int(inside.sum())} of {int(known.sum())} strengths, "
            f"and it is farthest off at {view.name_of(worst)}, by {one.difference[worst]:+.2g} nats."
        )
    caption = [
        "The log evidence is estimated in ways that share little; the figure above shows them joined. Here "
        "is each less the joined value, with its 95% interval. They should scatter around 0 as their "
        "intervals say; where they do not, trust neither.",
        *(text[0].upper() + text[1:] for text in sentences),
    ]
    head = (view.axis.name, *(text for one in estimates for text in (one.title, "± 95%")))
    rows = [
        (
            number(value),
            *(text for e in estimates for text in (f"{e.difference[i]:+.3g}", f"{e.spread[i]:.2g}")),
        )
        for i, value in enumerate(view.axis.values)
    ]
    return Section(
        "estimates",
        "Do the estimates of the evidence agree?",
        _drawings(
            view, "estimates", " ".join(sentences), lambda width: plot_estimates(view.tree, width=width)
        ),
        tuple(caption),
        Table(head, tuple(rows)),
    )


def _pooling(view: SweepView) -> Section:
    points = (0, view.best, len(view.axis.values) - 1)
    description = " ".join(
        f"{pooled.title}: " + ", ".join(f"{pooled.values[i]:.1f} at {view.name_of(i)}" for i in points) + "."
        for pooled in view.pooled
    )
    caption = [
        "How many freely chosen numbers the copies are worth at each strength: low on the left, where they "
        "act as one; it rises as they come apart, and the data, not the prior, decide about each."
    ]
    if any(pooled.most is not None for pooled in view.pooled):
        caption.append("A dashed line, where there is room for it, marks the most it can be.")
    head = [view.axis.name]
    for pooled in view.pooled:
        head += [pooled.title, "± 95%"]
    rows = [
        (number(v), *(t for p in view.pooled for t in (f"{p.values[i]:.2f}", f"{p.spread[i]:.2g}")))
        for i, v in enumerate(view.axis.values)
    ]
    return Section(
        "pooling",
        "How many parameters that amounts to",
        _drawings(view, "pooling", description, lambda width: plot_pooling(view.tree, width=width)),
        tuple(caption),
        Table(tuple(head), tuple(rows)),
    )


def _drawings(
    view: SweepView, key: str, description: str, draw: Callable[[float], Figure]
) -> tuple[Markup, ...]:
    steps = [float(view.axis.positions[point]) for point in view.steps]
    return tuple(
        inline_svg(
            draw(width),
            name=f"{key}-{screen}",
            description=description,
            classes=screen,
            steps=steps,
            step=view.steps.index(view.best),
        )
        for screen, width in (("wide", WIDE), ("narrow", NARROW))
    )
