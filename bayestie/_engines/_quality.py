"""When chains are good: R-hat, effective sample sizes and divergences, one rule for every sampler."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import chi2
from torch import Tensor

from bayestie._diagnostics import convergence

MAX_RHAT = 1.01
MAX_DIVERGENT = 0.001  # of all trajectories


class Quality(NamedTuple):
    """Max R-hat, min bulk ESS and min tail ESS over quantities; max nested R-hat, NaN without superchains."""

    rhat: float
    bulk: float
    tail: float
    nested_rhat: float = math.nan


def quality(draws: Tensor) -> Quality:
    """Of the columns of (chains, draws, Q) that vary."""
    return qualities(draws.unsqueeze(0))[0]


def qualities(draws: Tensor, pieces: int = 1) -> list[Quality]:
    """`quality` of every point of (P, chains, draws, Q), whose chains are ``pieces`` chains end to end."""
    found = []
    for rhat, bulk, tail, held, nested in zip(*convergence(draws, pieces), strict=True):
        if bool(held.any()):
            largest = float(nested[held].max()) if pieces > 1 else math.nan
            worst = float(rhat[held].max()), float(bulk[held].min()), float(tail[held].min())
            found.append(Quality(*worst, largest))
        else:
            found.append(Quality(math.inf, 0.0, 0.0))
    return found


def draws_for_rhat(num_quantities: int, num_chains: int) -> float:
    """Independent draws per chain after which the largest R-hat is right at least three times in four.

    Of m half chains and S effective draws in all, S (R-hat^2 - 1) is near m chi^2 / (m - 1) on m - 1 degrees
    of freedom, for the ranks and for the folded ranks of every quantity.
    """
    halves = 2 * num_chains
    largest = float(chi2.isf(0.25 / (2 * num_quantities), halves - 1)) / (halves - 1)
    return halves * largest / (MAX_RHAT**2 - 1.0) / num_chains


def is_good(quality: Quality, target_ess: float) -> bool:
    """Whether R-hat, nested or not, and both effective sample sizes are where they should be.

    Split R-hat of superchains joined end to end sees what differs between starting points and drifts from one
    half of their chains to the other; nested R-hat gives the means of whole superchains their full weight.
    """
    rhat, bulk, tail, nested = quality
    # NaN: one superchain, or none.
    return rhat < MAX_RHAT and not nested >= MAX_RHAT and bulk >= target_ess and tail >= target_ess


def chain_verdict(
    quality: Quality,
    divergences: int,
    total: int,
    target_ess: float,
    monitor: Sequence[str] = (),
) -> tuple[bool, str]:
    """Certified or not, and why, for chains of ``total`` draws in all; ``monitor`` names what is judged."""
    rhat, bulk, tail, nested = quality
    of_superchains = "" if math.isnan(nested) else f"nested R-hat {nested:.3f}, "
    judged = f" of {', '.join(monitor)}" if monitor else ""
    sizes = f"ESS bulk {bulk:.0f} and tail {tail:.0f}{judged} over {total} draws"
    text = f"R-hat {rhat:.3f}, {of_superchains}{sizes}"
    if not is_good(quality, target_ess):
        return False, f"{text}: wanted R-hat below {MAX_RHAT} and ESS of at least {target_ess:.0f}"
    if divergences > MAX_DIVERGENT * total:
        return (
            False,
            f"{divergences} divergent of {total} trajectories: the posterior has a region they cannot enter",
        )
    return True, text + (f", {divergences} divergent" if divergences else "")
