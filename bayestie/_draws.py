"""Monte Carlo errors of many means at once."""

import numpy as np
import xarray as xr

# Numbers transformed at once by the autocovariance: 64 MB of complex values.
_BUDGET = 4_000_000


def effective_size(draws: np.ndarray) -> np.ndarray:
    """Effective sample size for the mean, of every column at once.

    Split chains, Geyer's initial positive and monotone sequences, as ArviZ's ``ess(method="mean")``.

    Args:
        draws: shape (chain, draw, ...), at least four draws.

    Returns:
        Shape (...); constant columns count every draw.

    Reference: Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Bayesian Analysis 16(2), section 3.2.
    """
    num_chains, num_draws = draws.shape[:2]
    columns = draws.reshape(num_chains, num_draws, -1)
    step = max(1, _BUDGET // (num_chains * num_draws))
    parts = [_effective_size(columns[..., i : i + step]) for i in range(0, columns.shape[-1], step)]
    return np.concatenate(parts).reshape(draws.shape[2:]) if parts else np.zeros(draws.shape[2:])


def _effective_size(columns: np.ndarray) -> np.ndarray:
    half = columns.shape[1] // 2
    x = np.concatenate([columns[:, :half], columns[:, -half:]]).astype(float)
    num_chains, num_draws, num_columns = x.shape
    total = num_chains * num_draws
    means = x.mean(1)
    centred = x - means[:, None]
    length = 2 ** int(np.ceil(np.log2(2 * num_draws)))
    spectrum = np.fft.rfft(centred, length, axis=1)
    autocov = np.fft.irfft(np.abs(spectrum) ** 2, length, axis=1)[:, :num_draws].mean(0) / num_draws
    within = autocov[0] * num_draws / (num_draws - 1)
    pooled = autocov[0] + (means.var(0, ddof=1) if num_chains > 1 else 0.0)
    moving = pooled > 1e-300
    rho = 1 - (within - autocov) / np.where(moving, pooled, 1.0)
    rho[0] = 1.0
    # ArviZ's last lag: of the pair it begins only the even one is counted.
    last = 2 * len(range(1, num_draws - 3, 2))
    pairs = rho[0:last:2] + rho[1 : last + 1 : 2]
    positive = np.cumprod(pairs > 0, axis=0).astype(bool)
    monotone = np.minimum.accumulate(np.where(positive, pairs, np.inf), axis=0)
    time = -1 + 2 * np.where(positive, monotone, 0.0).sum(0)
    # The even lag after the last positive pair still counts while it is positive (Geyer 1992).
    after = rho[2 * positive.sum(0), np.arange(num_columns)]
    time = time + np.maximum(after, 0.0)
    time = np.maximum(time, 1 / np.log10(total))
    return np.where(moving, total / time, total)


def mean_error(path: xr.DataTree, draws: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Posterior mean of each column, and the Monte Carlo standard error of that mean.

    The sample size is the effective one, and never more than that of the importance weights the draws
    were resampled with (``sweep/ess_weights``): repeated rows carry no information of their own.

    Args:
        path: the tree the draws belong to.
        draws: dims (swept..., chain, draw, ...).

    Returns:
        Mean and error, without the dims chain and draw.
    """
    size = _sizes(path, draws)
    spread = draws.std(("chain", "draw"), ddof=1)
    return draws.mean(("chain", "draw")), spread / np.sqrt(size)


def variance_error(path: xr.DataTree, draws: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Posterior variance of each column, and the Monte Carlo standard error of that variance."""
    count = draws.sizes["chain"] * draws.sizes["draw"]
    squares = (draws - draws.mean(("chain", "draw"))) ** 2 * (count / (count - 1))
    return mean_error(path, squares)


def _sizes(path: xr.DataTree, draws: xr.DataArray) -> xr.DataArray:
    others = [dim for dim in draws.dims if dim not in ("chain", "draw")]
    ordered = draws.transpose("chain", "draw", *others)
    size = xr.zeros_like(ordered.isel(chain=0, draw=0, drop=True), dtype=float)
    size = size.copy(data=effective_size(ordered.values))
    weights = path["sweep"].to_dataset().get("ess_weights")
    return size if weights is None else size.clip(max=weights).transpose(*others)
