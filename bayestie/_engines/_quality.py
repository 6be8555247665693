"""When chains are good: R-hat, effective sample sizes and divergences, one rule for every sampler."""

from collections.abc import Sequence

from scipy.stats import chi2
from torch import Tensor

from bayestie._diagnostics import convergence

MAX_RHAT = 1.01
MAX_DIVERGENT = 0.001  # of all trajectories


def quality(draws: Tensor) -> tuple[float, float, float]:
    """(max R-hat, min bulk ESS, min tail ESS) over the columns of (chains, draws, Q) that vary."""
    return qualities(draws.unsqueeze(0))[0]


def qualities(draws: Tensor) -> list[tuple[float, float, float]]:
    """`quality` of every point of (P, chains, draws, Q)."""
    measured = convergence(draws)
    found = []
    for rhat, bulk, tail, held in zip(*measured, strict=True):
        if bool(held.any()):
            found.append((float(rhat[held].max()), float(bulk[held].min()), float(tail[held].min())))
        else:
            found.append((float("inf"), 0.0, 0.0))
    return found


def draws_for_rhat(num_quantities: int, num_chains: int) -> float:
    """Independent draws per chain after which the largest R-hat is right at least three times in four.

    Of m half chains and S effective draws in all, S (R-hat^2 - 1) is near m chi^2 / (m - 1) on m - 1 degrees
    of freedom, for the ranks and for the folded ranks of every quantity.
    """
    halves = 2 * num_chains
    largest = float(chi2.isf(0.25 / (2 * num_quantities), halves - 1)) / (halves - 1)
    return halves * largest / (MAX_RHAT**2 - 1.0) / num_chains


def is_good(quality: tuple[float, float, float], target_ess: float) -> bool:
    """Whether R-hat and both effective sample sizes are where they should be."""
    rhat, bulk, tail = quality
    return rhat < MAX_RHAT and bulk >= target_ess and tail >= target_ess


def chain_verdict(
    quality: tuple[float, float, float],
    divergences: int,
    total: int,
    target_ess: float,
    monitor: Sequence[str] = (),
) -> tuple[bool, str]:
    """Certified or not, and why, for chains of ``total`` draws in all; ``monitor`` names what is judged."""
    rhat, bulk, tail = quality
    judged = f" of {', '.join(monitor)}" if monitor else ""
    text = f"R-hat {rhat:.3f}, ESS bulk {bulk:.0f} and tail {tail:.0f}{judged} over {total} draws"
    if not is_good(quality, target_ess):
        return False, f"{text}: wanted R-hat below {MAX_RHAT} and ESS of at least {target_ess:.0f}"
    if divergences > MAX_DIVERGENT * total:
        return (
            False,
            f"{divergences} divergent of {total} trajectories: the posterior has a region they cannot enter",
        )
    return True, text + (f", {divergences} divergent" if divergences else "")
