"""What the strengths of a sweep say of one another's draws, for multistate reweighting (`_mbar`)."""

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayestie._draws import effective_size
from bayestie._engines import Draws, LaplaceFit, Task, carried, evenly, log_normal

DRAW = "overlap_draw"
_BUDGET = 8_000_000  # numbers in the positions evaluated at once


def overlap(task: Task, draws: Draws, fit: LaplaceFit, swept: dict[str, np.ndarray]) -> xr.Dataset:
    r"""Log density of every strength at draws of every strength, in Laplace-whitened coordinates.

    .. math:: u_{nj} = \log p_j(m_j + F_j z_n) + \log\det F_j, \qquad z_n = F_i^{-1} (u_n - m_i)

    for draw n of strength i, with mode m and factor F of each strength's Laplace fit, and for as many
    draws z of a standard normal, whose evidence is 1. A Gaussian posterior is that normal at every
    strength, whatever its dimension. Draws of a strength whose importance weights were refused are left out.

    Returns:
        Dataset with ``log_density`` (*swept, overlap_draw); ``log_normal`` (overlap_draw), the standard
        normal's; ``standard_normal`` (overlap_draw), true for its draws; ``from_<keyword>`` (overlap_draw),
        the strength that any other draw is of (0 for those); and ``effective_draws`` (*swept), what a
        strength's draws are worth.
    """
    length = draws.log_density.shape[2]
    wanted = carried(task.num_points, task.num_chains, length)
    usable = _usable(draws)
    index = torch.as_tensor(np.flatnonzero(usable), device=task.program.device)
    rows = evenly(length, wanted // task.num_chains)
    position = draws.position[index][:, :, rows].flatten(1, 2)
    whitened = torch.linalg.solve_triangular(
        fit.factor[index], (position - fit.mode[index].unsqueeze(1)).mT, upper=False
    ).mT
    per_strength = whitened.shape[1]
    normal = task.normals((max(wanted, per_strength), task.density.num_latent), 107)
    z = torch.cat([normal, whitened.flatten(0, 1)])
    lp = draws.log_density
    beyond = lp - fit.log_density(draws.position.flatten(1, 2)).reshape(lp.shape)
    return _dataset(
        swept,
        _log_density(task, fit, z).cpu().numpy(),
        log_normal(z.cpu().numpy()),
        _sources(usable, len(normal), per_strength),
        _effective_draws(draws, beyond.cpu().numpy(), per_strength),
    )


def sparse_overlap(task: Task, draws: Draws, swept: dict[str, np.ndarray]) -> xr.Dataset:
    """The same of the sparse route's points, each about the Gaussian that it drew with."""
    usable, points = _usable(draws), draws.whitened
    size = max(point.size for point in points)
    per_strength = len(points[0].noise)
    rng = task.generator(209)
    normal = rng.standard_normal((per_strength, size))
    blocks = [normal]
    for point in (points[i] for i in np.flatnonzero(usable)):
        # Variables that a strength does not have are standard normal there.
        blocks.append(np.hstack([point.noise, rng.standard_normal((per_strength, size - point.size))]))
    z = np.concatenate(blocks)
    with np.errstate(over="ignore", invalid="ignore"):
        log_density = np.stack([point.log_density(z) for point in points])
    return _dataset(
        swept,
        np.nan_to_num(log_density, nan=-np.inf, posinf=-np.inf, neginf=-np.inf),
        log_normal(z),
        _sources(usable, per_strength, per_strength),
        _effective_draws(draws, np.stack([point.beyond for point in points]), per_strength),
    )


def _usable(draws: Draws) -> np.ndarray:
    """Whose draws are worth something: all but weighted ones whose weights were refused."""
    return np.array(draws.certified) | (np.array(draws.engine) != "laplace")


def _sources(usable: np.ndarray, num_normal: int, per_strength: int) -> np.ndarray:
    """Number of the point that each draw is of, -1 the standard normal."""
    index = np.flatnonzero(usable)
    return np.repeat(np.append(-1, index), [num_normal, *[per_strength] * len(index)])


def _dataset(
    swept: dict[str, np.ndarray],
    log_density: np.ndarray,
    log_normal: np.ndarray,
    source: np.ndarray,
    worth: np.ndarray,
) -> xr.Dataset:
    shape = tuple(len(values) for values in swept.values())
    grid = np.meshgrid(*swept.values(), indexing="ij")
    worth = np.where(np.isin(np.arange(len(worth)), source), worth, 0.0)
    data = {
        "log_density": ((*swept, DRAW), log_density.reshape(*shape, -1)),
        "log_normal": (DRAW, log_normal),
        "standard_normal": (DRAW, source < 0),
        "effective_draws": (tuple(swept), worth.reshape(shape)),
    }
    for name, values in zip(swept, grid, strict=True):
        data[f"from_{name}"] = (DRAW, np.where(source < 0, 0.0, values.reshape(-1)[source]))
    return xr.Dataset(data, coords=swept)


def _log_density(task: Task, fit: LaplaceFit, z: Tensor) -> Tensor:
    """(N, D) -> log density of every point at its own position for z, with the volume, (P, N)."""
    points = fit.points
    out = z.new_empty(len(points), len(z))
    width = max(1, _BUDGET // max(1, len(points) * z.shape[1]))
    for start in range(0, len(z), width):
        some = slice(start, start + width)
        position = fit.to_position(z[some].expand(len(points), -1, -1))
        value = task.density.value(points, position) + fit.log_det.unsqueeze(1)
        out[:, some] = torch.nan_to_num(value, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    return out


def _effective_draws(draws: Draws, beyond: np.ndarray, kept: int) -> np.ndarray:
    """How many independent draws the kept ones of every point are worth.

    1 / (1 / kept + 1 / ess - 1 / stored): all of them where draws are independent, the effective size of
    the chains where that is smaller. The size is that of the log density and of its ratio to the
    Gaussian, ``beyond`` (P, chains, draws), whichever mixes worse.
    """
    lp = draws.log_density.cpu().numpy()
    weights = draws.ess_weights.cpu().numpy()
    stored = lp.shape[1] * lp.shape[2]
    size = np.array([effective_size(one).min() for one in np.stack([lp, beyond], -1)])
    size = np.minimum(np.minimum(size, weights), stored)
    return 1.0 / (1.0 / kept + 1.0 / size - 1.0 / stored)
