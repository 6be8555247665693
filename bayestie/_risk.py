"""Bias, variance and risk of the estimated copies along sigma, from data sets simulated at a known truth."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayestie._collect import collect, tie_uses
from bayestie._draws import effective_size
from bayestie._engines import Draws
from bayestie._errors import NameLookupError, OptionError, ShapeError
from bayestie._points import Grid, Work, labelled, one_tie, read_over, refuse_options, site_dims
from bayestie._program import LaneProgram
from bayestie._run_context import resolve_device, to_tensors
from bayestie._simulate import simulate_data


def risk(
    model: Callable[..., Any],
    truth: Tensor | np.ndarray | Mapping[str, Any],
    *args: Any,
    over: Mapping[str, Sequence[float]],
    site: str | None = None,
    num_data: int = 200,
    engine: str = "auto",
    seed: int = 0,
    num_chains: int = 4,
    num_draws: int = 50,
    target_ess: float = 100,
    device: str | torch.device | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **kwargs: Any,
) -> xr.Dataset:
    r"""Bias, variance and risk of the posterior mean at every strength, were the truth known.

    .. math:: R_k(\sigma) = E\,(\hat\theta_k - \theta_k)^2
              = (E\hat\theta_k - \theta_k)^2 + \mathrm{var}\,\hat\theta_k, \qquad
              \hat\theta_k = E[\theta_k \mid y, \sigma]

    over data sets y drawn from the model at the truth. All fits, data sets times strengths, are points
    of one batch, and every strength sees the same data sets.

    Args:
        model: the Pyro model.
        truth: true values of the tied copies, shape (K, *E); where the model has other latents (or
            several ties), a dict with a value for each.
        *args: the model's positional arguments; the data among them give shapes only.
        over: values of swept keywords, as in `sweep`. Data are drawn at the first of them: that
            matters only if more than the tie depends on a swept keyword.
        site: the tied site that is estimated; not needed where there is one.
        num_data: number of data sets.
        engine: as in `sweep`, and so are the options that follow.
        seed: of all random numbers.
        num_chains: chains per fit.
        num_draws: draws per chain. They only serve the posterior means, so few will do; where the
            posterior is Gaussian the mean is exact and needs none.
        target_ess: effective sample size wanted of every fit.
        device: ``"cpu"`` or ``"cuda"``.
        dims: names of a variable's axes.
        coords: labels of a dimension.
        progress: called with a dict of events.
        **kwargs: the model's other keyword arguments.

    Returns:
        Dataset over the swept dims, in squared units of theta, averaged over copies and event
        elements: ``risk``, ``bias_squared`` and ``variance`` (the first is the sum of the others), each with
        its Monte Carlo standard error ``*_error``; ``risk_difference`` to the strength of least risk,
        paired by data set, with ``risk_difference_error``; ``num_certified`` fits of ``num_data``. Per copy:
        ``risk_copy``, ``bias_copy`` (signed) and ``variance_copy``, with errors. What the means' own
        Monte Carlo noise adds is subtracted, so a variance or squared bias may come out below 0, by
        no more than its error.

    Raises:
        ModelError: data that no argument of the model holds, or a model that cannot be run forward.
        NameLookupError: a latent without a true value.
        ShapeError: a true value of the wrong shape.

    Reference: Efron, Morris (1973), Journal of the American Statistical Association 68.
    """
    refuse_options(model, args, ("truth", "site", "num_data"))
    if isinstance(num_data, bool) or not isinstance(num_data, int | np.integer) or num_data < 2:
        raise OptionError(
            "num_data", found=repr(num_data), expected="a whole number of at least 2", fix="200 is usual."
        )
    grid = read_over(over, kwargs)
    work = Work(engine, seed, num_chains, num_draws, target_ess, resolve_device(device), progress)
    base = LaneProgram(model, args, kwargs, grid.at(torch.arange(grid.size)), device=work.device, seed=seed)
    use = one_tie(base, site)
    values = _true_values(base, use.name, truth)
    data, _ = simulate_data(base, torch.zeros(num_data, dtype=torch.long), seed, values)
    means, noises, certified = [], [], []
    for batch, part in enumerate(work.batches(base, num_data * grid.size, grid.size)):
        rows = torch.arange(part.start, part.stop)
        program = LaneProgram(
            model,
            args,
            kwargs,
            grid.at(rows % grid.size),
            data={name: x[rows // grid.size] for name, x in data.items()},
            device=base.device,
            seed=seed,
        )
        draws, mode = work.run(program, batch)
        mean, noise = posterior_means(program, draws, mode, use.name)
        means.append(mean)
        noises.append(noise)
        certified.extend(draws.certified)
    shape = (num_data, *grid.shape)
    estimate, noise = (np.concatenate(x).reshape((*shape, *x[0].shape[1:])) for x in (means, noises))
    labels = labelled(base, grid, dims, coords)
    names = site_dims(labels, use)
    out = _summary(grid, estimate, noise, values[use.name].cpu().numpy(), names)
    out["num_certified"] = (grid.names, np.array(certified).reshape(shape).sum(0))
    sizes = dict(zip(names, values[use.name].shape, strict=True))
    own = {dim: labels.coords.get(dim, np.arange(size)) for dim, size in sizes.items()}
    return out.assign_coords(grid.coords() | own).assign_attrs(num_data=num_data)


def _true_values(program: LaneProgram, site: str, truth: Any) -> dict[str, Tensor]:
    """A value per tied site and per latent that no tie makes, of the right shape."""
    given = dict(truth) if isinstance(truth, Mapping) else {site: truth}
    ties = {use.name for use in tie_uses(program)}
    marks = ("bayestie_z", "bayestie_level", "bayestie_level_z")
    free = {name for name, s in program.latent.items() if not any(mark in s.infer for mark in marks)}
    wanted = ties | free | set(program.enumerated)
    missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted)
    if missing or unknown:
        raise NameLookupError(
            "truth",
            found=f"no value for {missing}" if missing else f"a value for {unknown}, which the model lacks",
            expected=f"a value for each of {sorted(wanted)}",
            fix="Pass truth as a dict from site to value.",
        )
    values = {}
    sites = {**program.deterministic, **program.latent}
    for name, value in given.items():
        tensor = torch.as_tensor(to_tensors(value, program.dtype, program.device), device=program.device)
        values[name] = tensor.to(program.dtype) if name in sites else tensor
        expected = tuple(sites[name].shape) if name in sites else tuple(values[name].shape)
        if tuple(values[name].shape) != expected:
            raise ShapeError(
                f"truth of '{name}'",
                found=f"shape {tuple(values[name].shape)}",
                expected=f"shape {expected}",
                fix="Copies come first, then the event shape.",
            )
    return values


def posterior_means(
    program: LaneProgram, draws: Draws, mode: Tensor | None, site: str
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean of a site at every point and the Monte Carlo variance of it, (P, *site shape) each.

    Where the posterior is Gaussian and the site linear in it, the mean is the site at the mode: exact.
    """
    key = f"posterior/{site}"

    def values(position: Tensor, points: Tensor) -> np.ndarray:
        return collect(program, points, position, lambda name: name == key)[key]

    count = len(draws.points)
    shape = program.deterministic[site].shape
    mean, noise = np.empty((count, *shape)), np.zeros((count, *shape))
    exact = np.zeros(count, dtype=bool)
    if mode is not None and any(draws.exact):
        rows = torch.tensor([i for i, e in enumerate(draws.exact) if e], device=mode.device)
        middle, one = mode[rows], draws.position[rows, 0, 0]
        seen = values(torch.stack([middle, one, 2.0 * middle - one], 1).unsqueeze(1), draws.points[rows])[
            :, 0
        ]
        gap = np.abs(seen[:, 1] + seen[:, 2] - 2.0 * seen[:, 0]).reshape(len(rows), -1).max(1)
        linear = gap <= 1e-9 * (1.0 + np.abs(seen).reshape(len(rows), -1).max(1))
        chosen = rows.cpu().numpy()[linear]
        mean[chosen], exact[chosen] = seen[linear, 0], True
    rest = np.flatnonzero(~exact)
    if len(rest):
        index = torch.as_tensor(rest, device=draws.points.device)
        found = values(draws.position[index], draws.points[index])
        mean[rest] = found.mean((1, 2))
        size = effective_size(np.moveaxis(found, 0, 2))
        limit = draws.ess_weights.cpu().numpy()[rest].reshape(-1, *[1] * len(shape))
        noise[rest] = found.var((1, 2), ddof=1) / np.minimum(size, limit)
    return mean, noise


def _summary(
    grid: Grid, estimate: np.ndarray, noise: np.ndarray, truth: np.ndarray, dims: list[str]
) -> xr.Dataset:
    """estimate and the variance of its noise: (data, *swept, K, *E)."""
    num, lead = len(estimate), grid.shape
    cells = tuple(range(1 + len(lead), estimate.ndim))
    middle = estimate.mean(0)
    bias = middle - truth
    centred = estimate - middle
    squares = centred**2 * (num / (num - 1))
    loss = (estimate - truth) ** 2 - noise
    spread = squares - noise
    total = squares.mean(0)  # with the noise: what the mean over data sets feels
    root = math.sqrt(num)

    def error(per_data: np.ndarray) -> np.ndarray:
        return per_data.std(0, ddof=1) / root

    each = loss.mean(cells)
    average = each.mean(0)
    best = np.unravel_index(np.argmin(average), lead) if lead else ()
    gap = each - each[(slice(None), *best)].reshape(-1, *[1] * len(lead))
    # (mean - truth)^2 - var / n has variance 4 b' S b / n + 2 tr(S S) / n^2 for a Gaussian mean.
    slope = (2.0 * bias * centred).mean(cells)
    flat = centred.reshape(num, math.prod(lead), -1)
    wide = flat.shape[2] > num
    gram = np.einsum("nsa,nsb->sab", flat, flat) if not wide else np.einsum("nsa,msa->snm", flat, flat)
    trace = np.square(gram).sum((1, 2)).reshape(lead) / (num - 1) ** 2
    bias_error = np.sqrt(error(slope) ** 2 + 2.0 * trace / (num * flat.shape[2]) ** 2)
    names, copy = grid.names, (*grid.names, *dims)
    data = {
        "risk": (names, average),
        "risk_error": (names, error(each)),
        "bias_squared": (names, (bias**2 - total / num).mean(tuple(range(len(lead), bias.ndim)))),
        "bias_squared_error": (names, bias_error),
        "variance": (names, spread.mean(cells).mean(0)),
        "variance_error": (names, error(spread.mean(cells))),
        "risk_difference": (names, gap.mean(0)),
        "risk_difference_error": (names, error(gap)),
        "risk_copy": (copy, loss.mean(0)),
        "risk_copy_error": (copy, error(loss)),
        "bias_copy": (copy, bias),
        "bias_copy_error": (copy, np.sqrt(total / num)),
        "variance_copy": (copy, spread.mean(0)),
        "variance_copy_error": (copy, error(spread)),
    }
    return xr.Dataset(data)
