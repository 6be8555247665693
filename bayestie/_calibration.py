"""Simulation-based calibration: do posteriors of data drawn from the prior give the prior back?"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import binom, chi2
from torch import Tensor

from bayestie._collect import collect, tie_uses
from bayestie._errors import OptionError
from bayestie._points import Work, read_over, refuse_options
from bayestie._program import LaneProgram
from bayestie._run_context import resolve_device
from bayestie._simulate import simulate_data

# A bin of the chi-square test expects at least this many ranks.
_PER_BIN = 10
_MOST_BINS = 25
_BAND_PROBABILITY = 0.95
_BAND_SETS = 4000


def calibrate(
    model: Callable[..., Any],
    *args: Any,
    over: Mapping[str, Sequence[float]] | None = None,
    num_data: int = 300,
    num_ranks: int = 99,
    engine: str = "auto",
    seed: int = 0,
    num_chains: int = 4,
    num_draws: int = 250,
    target_ess: float = 400,
    device: str | torch.device | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **kwargs: Any,
) -> xr.Dataset:
    r"""Simulation-based calibration of a model and an engine.

    .. math:: \theta^* \sim p(\theta), \quad y \sim p(y \mid \theta^*), \quad
              \theta_1, \dots, \theta_L \sim p(\theta \mid y)
              \;\Rightarrow\; \#\{l : \theta_l < \theta^*\} \text{ uniform on } 0, \dots, L

    All fits, strengths times data sets, are points of one batch.

    Args:
        model: the Pyro model.
        *args: its positional arguments; the data among them give shapes only.
        over: values of swept keywords, as in `sweep`; none for one strength, or for a strength that
            the model samples.
        num_data: data sets per strength.
        num_ranks: L, posterior draws that the true value is ranked among, thinned evenly from those of a
            fit so that they are nearly independent.
        engine: as in `sweep`, and so are the options that follow.
        seed: of all random numbers.
        num_chains: chains per fit.
        num_draws: draws per chain.
        target_ess: effective sample size wanted of every fit; several times num_ranks.
        device: ``"cpu"`` or ``"cuda"``.
        progress: called with a dict of events.
        **kwargs: the model's other keyword arguments.

    Returns:
        Dataset over the swept dims and ``quantity`` (each scalar of the latents and tied copies, and the
        joint ``log_likelihood``, which sees what single parameters do not): ``ranks`` (..., data, quantity);
        ``p_value`` of a chi-square test of uniform ranks, to be read against 0.001 over the number of
        p-values; ``ecdf`` (..., quantity, rank), the share of ranks below ``rank``, with ``ecdf_lower`` and
        ``ecdf_upper`` (rank), which hold all of a uniform curve with probability 0.95 (plot the
        curve less ``expected``); ``outside``, whether it leaves them; ``certified`` (..., data). Ranks piled
        up in the middle: posteriors too wide; at both ends: too narrow; at one end: biased.

    Raises:
        ModelError: data that no argument of the model holds, or a model that cannot be run forward.
        OptionError: too few draws to rank among.

    Reference: Talts, Betancourt, Simpson, Vehtari, Gelman (2018), arXiv:1804.06788, algorithm 1;
        Säilynoja, Bürkner, Vehtari (2022), Statistics and Computing 32, for the bands; Modrák et al.
        (2023), Bayesian Analysis, for ranking the likelihood.
    """
    refuse_options(model, args, ("num_data", "num_ranks"))
    grid = read_over(over, kwargs)
    work = Work(engine, seed, num_chains, num_draws, target_ess, resolve_device(device), progress)
    _check_numbers(num_data, num_ranks, num_chains * num_draws)
    base = LaneProgram(model, args, kwargs, grid.at(torch.arange(grid.size)), device=work.device, seed=seed)
    points = torch.arange(grid.size).repeat_interleave(num_data)
    data, simulated = simulate_data(base, points.to(base.device), seed)
    truth = torch.cat([simulated.positions[n].reshape(len(points), -1) for n in base.latent], 1)
    ranks, certified = [], []
    for batch, part in enumerate(work.batches(base, len(points))):
        rows = slice(part.start, part.stop)
        program = LaneProgram(
            model,
            args,
            kwargs,
            grid.at(points[rows]),
            data={name: x[rows] for name, x in data.items()},
            device=base.device,
            seed=seed,
        )
        draws, _ = work.run(program, batch)
        flat = draws.position.flatten(1, 2)
        kept = torch.linspace(0, flat.shape[1] - 1, num_ranks).round().long()
        names, true_values = _quantities(program, draws.points, truth[rows].unsqueeze(1))
        _, drawn = _quantities(program, draws.points, flat[:, kept])
        ranks.append(_ranks(true_values[:, 0], drawn, np.random.default_rng([seed, batch])))
        certified.extend(draws.certified)
    shape = (*grid.shape, num_data)
    found = _tests(np.concatenate(ranks).reshape((*shape, -1)), num_ranks, grid.names)
    found["certified"] = ((*grid.names, "data"), np.array(certified).reshape(shape))
    return found.assign_coords(grid.coords() | {"quantity": names})


def _check_numbers(num_data: Any, num_ranks: Any, num_draws: int) -> None:
    whole = all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in (num_data, num_ranks))
    if not whole or num_data < 2 * _PER_BIN or not 1 <= num_ranks <= num_draws:
        raise OptionError(
            "num_data, num_ranks",
            found=f"{num_data!r} data sets, {num_ranks!r} of {num_draws} draws to rank among",
            expected=f"at least {2 * _PER_BIN} data sets, and no more ranks than draws",
            fix="300 data sets and 99 ranks are usual.",
        )


def _quantities(program: LaneProgram, points: Tensor, position: Tensor) -> tuple[list[str], np.ndarray]:
    """Names and values (P, draws, Q) of the scalars that are ranked, at positions (P, draws, D)."""
    wanted = [f"posterior/{name}" for name in program.latent]
    wanted += [f"posterior/{use.name}" for use in tie_uses(program)]
    arrays = collect(
        program,
        points,
        position.unsqueeze(1),
        lambda key: key in wanted or key.startswith("log_likelihood/"),
    )
    names, columns, total = [], [], None
    for key, array in arrays.items():
        values = array[:, 0]
        if key.startswith("log_likelihood/"):
            own = values.reshape((*values.shape[:2], -1)).sum(-1)
            total = own if total is None else total + own
            continue
        name = key.split("/", 1)[1]
        shape = values.shape[2:]
        names += [f"{name}[{','.join(map(str, i))}]" for i in np.ndindex(*shape)] if shape else [name]
        columns.append(values.reshape((*values.shape[:2], -1)))
    if total is not None:
        names.append("log_likelihood")
        columns.append(total[..., None])
    return names, np.concatenate(columns, -1)


def _ranks(truth: np.ndarray, drawn: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Ranks (P, Q) of truth (P, Q) among drawn (P, L, Q); ties, as at sigma = 0, are broken at random."""
    gap = drawn - truth[:, None]
    equal = np.abs(gap) <= 1e-12 * (1.0 + np.abs(truth[:, None]))
    below = ((gap < 0) & ~equal).sum(1)
    return below + generator.integers(0, equal.sum(1) + 1)


def _tests(ranks: np.ndarray, num_ranks: int, names: Sequence[str]) -> xr.Dataset:
    """ranks (*swept, data, quantity) -> ranks, p-values, curves and bands."""
    num_data = ranks.shape[-2]
    per_strength = (*names, "quantity")
    bins = int(np.clip(num_data // _PER_BIN, 2, min(_MOST_BINS, num_ranks + 1)))
    edges = np.linspace(0, num_ranks + 1, bins + 1).round()
    expected = num_data * np.diff(edges) / (num_ranks + 1)
    counts = np.stack([((ranks >= a) & (ranks < b)).sum(-2) for a, b in pairwise(edges)], -1)
    statistic = ((counts - expected) ** 2 / expected).sum(-1)
    at = np.arange(1, num_ranks + 1)
    curve = np.stack([(ranks < i).mean(-2) for i in at], -1)
    lower, upper = simultaneous_band(num_data, num_ranks)
    tolerance = 0.5 / num_data
    outside = ((curve < lower - tolerance) | (curve > upper + tolerance)).any(-1)
    data = {
        "ranks": ((*names, "data", "quantity"), ranks),
        "p_value": (per_strength, chi2.sf(statistic, bins - 1)),
        "ecdf": ((*per_strength, "rank"), curve),
        "expected": (("rank",), at / (num_ranks + 1)),
        "ecdf_lower": (("rank",), lower),
        "ecdf_upper": (("rank",), upper),
        "outside": (per_strength, outside),
    }
    attrs = {"num_bins": bins, "band_probability": _BAND_PROBABILITY}
    return xr.Dataset(data, coords={"rank": at}, attrs=attrs)


def simultaneous_band(num_data: int, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (num_ranks,) that a uniform sample's curve stays within everywhere with probability 0.95.

    Pointwise binomial intervals of level 1 - gamma, gamma chosen by simulation (Säilynoja et al., 2022,
    section 2.2, algorithm 1).
    """
    at = np.arange(1, num_ranks + 1) / (num_ranks + 1)
    generator = np.random.default_rng(0)
    cells = generator.multinomial(num_data, np.full(num_ranks + 1, 1 / (num_ranks + 1)), size=_BAND_SETS)
    below = cells.cumsum(1)[:, :-1]
    table = binom.cdf(np.arange(-1, num_data + 1)[:, None], num_data, at)  # row i: P(count <= i - 1)
    column = np.arange(num_ranks)
    two_sided = 2 * np.minimum(table[below + 1, column], 1 - table[below, column])
    gamma = np.quantile(two_sided.min(1), 1 - _BAND_PROBABILITY)
    return binom.ppf(gamma / 2, num_data, at) / num_data, binom.ppf(1 - gamma / 2, num_data, at) / num_data
