"""What the strengths of a sweep say of one another's draws, for multistate reweighting (`_mbar`)."""

import math

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayestie._draws import effective_size
from bayestie._engines import Draws, LaplaceFit, Task

DRAW = "overlap_draw"
# Draws of a strength that are carried over: never more than this, and no more over all strengths than one
# strength stores, so that the table costs about as many evaluations as there are stored draws.
_MOST, _LEAST = 256, 4
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
    shape = tuple(len(values) for values in swept.values())
    num_chains, length = draws.log_density.shape[1:]
    wanted = min(_MOST, max(_LEAST, num_chains * length // task.num_points))
    rows = np.unique(
        np.linspace(0, length - 1, max(1, min(length, wanted // num_chains))).round().astype(int)
    )
    usable = np.array(
        [ok or engine == "nuts" for ok, engine in zip(draws.certified, draws.engine, strict=True)]
    )
    index = torch.as_tensor(np.flatnonzero(usable), device=task.program.device)
    position = draws.position[index][:, :, rows].flatten(1, 2)
    whitened = torch.linalg.solve_triangular(
        fit.factor[index], (position - fit.mode[index].unsqueeze(1)).mT, upper=False
    ).mT
    per_strength = whitened.shape[1]
    normal = task.normals((max(wanted, per_strength), task.density.num_latent), 107)
    z = torch.cat([normal, whitened.flatten(0, 1)])
    source = np.repeat(np.append(-1, np.flatnonzero(usable)), [len(normal), *[per_strength] * len(index)])
    log_density = _log_density(task, fit, z).cpu().numpy()
    log_normal = -0.5 * z.square().sum(-1) - 0.5 * z.shape[1] * math.log(2.0 * math.pi)
    grid = np.meshgrid(*swept.values(), indexing="ij")
    worth = np.where(usable, _effective_draws(draws, fit, per_strength), 0.0)
    data = {
        "log_density": ((*swept, DRAW), log_density.reshape(*shape, -1)),
        "log_normal": (DRAW, log_normal.cpu().numpy()),
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


def _effective_draws(draws: Draws, fit: LaplaceFit, kept: int) -> np.ndarray:
    """How many independent draws the kept ones of every point are worth.

    1 / (1 / kept + 1 / ess - 1 / stored): all of them where draws are independent, the effective size of
    the chains where that is smaller. The size is that of the log density and of its ratio to the
    Gaussian, whichever mixes worse.
    """
    lp = draws.log_density
    ratio = lp - fit.log_density(draws.position.flatten(1, 2)).reshape(lp.shape)
    columns = torch.stack([lp, ratio], -1).cpu().numpy()
    weights = draws.ess_weights.cpu().numpy()
    stored = lp.shape[1] * lp.shape[2]
    size = np.array([effective_size(one).min() for one in columns])
    size = np.minimum(np.minimum(size, weights), stored)
    return 1.0 / (1.0 / kept + 1.0 / size - 1.0 / stored)
