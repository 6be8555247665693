"""Monte Carlo errors: the vectorised effective size against ArviZ's, and what resampling leaves of it."""

import numpy as np
import pytest
import xarray as xr
from arviz_stats.base import array_stats

from bayestie._draws import effective_size, mean_error, variance_error


def _autoregression(rho, shape, generator):
    noise = generator.normal(size=shape)
    x = np.empty(shape)
    x[:, 0] = noise[:, 0]
    for i in range(1, shape[1]):
        x[:, i] = rho * x[:, i - 1] + np.sqrt(1 - rho**2) * noise[:, i]
    return x


@pytest.mark.parametrize("rho", [-0.6, 0.0, 0.5, 0.95])
@pytest.mark.parametrize(("num_chains", "num_draws"), [(4, 250), (1, 1001), (64, 20)])
def test_effective_size_is_arviz_ess_of_the_mean(rho, num_chains, num_draws):
    x = _autoregression(rho, (num_chains, num_draws, 5), np.random.default_rng(1))
    expected = array_stats.ess(np.moveaxis(x, -1, 0), chain_axis=-2, draw_axis=-1, method="mean")
    np.testing.assert_allclose(effective_size(x), expected, rtol=1e-6)


def test_constant_columns_count_every_draw():
    x = np.random.default_rng(2).normal(size=(4, 100, 2))
    x[..., 1] = 3.0
    assert effective_size(x)[1] == 400


def test_chunks_do_not_change_columns(monkeypatch):
    x = _autoregression(0.3, (4, 50, 7), np.random.default_rng(3))
    whole = effective_size(x)
    monkeypatch.setattr("bayestie._draws._BUDGET", 1)
    np.testing.assert_allclose(effective_size(x), whole)


def _tree(draws, ess_weights):
    array = xr.DataArray(draws, dims=("sigma", "chain", "draw"), coords={"sigma": [0.5, 1.0]})
    sweep = xr.Dataset({"ess_weights": ("sigma", ess_weights)}, coords={"sigma": [0.5, 1.0]})
    return xr.DataTree.from_dict({"/sweep": sweep}), array


def test_errors_are_those_of_independent_draws():
    draws = np.random.default_rng(4).normal(size=(2, 4, 1000))
    tree, array = _tree(draws, [np.inf, np.inf])
    mean, error = mean_error(tree, array)
    assert (abs(mean) < 4 * error).all()
    np.testing.assert_allclose(error, 4000**-0.5, rtol=0.2)
    variance, error = variance_error(tree, array)
    assert (abs(variance - 1) < 4 * error).all()
    np.testing.assert_allclose(error, (2 / 4000) ** 0.5, rtol=0.25)


def test_resampled_rows_carry_the_size_of_their_weights():
    draws = np.random.default_rng(5).normal(size=(2, 4, 1000))
    tree, array = _tree(draws, [100.0, np.inf])
    _, error = mean_error(tree, array)
    assert float(error[0]) == pytest.approx(float(array[0].std(ddof=1)) / 10)
    assert float(error[1]) < 0.02
