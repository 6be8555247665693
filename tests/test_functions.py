"""bt.diagnose: the diagnostics of a function are ArviZ's of its values, whatever the parameters do."""

import arviz_stats as azs
import numpy as np
import pytest
import xarray as xr

import bayestie as bt


def bimodal():
    """Two chains at +w, two at -w, at two strengths; w^2 mixes."""
    rng = np.random.default_rng(0)
    w = 3.0 + rng.normal(size=(2, 4, 200, 3))
    w[:, ::2] *= -1
    data = xr.DataArray(w, dims=("sigma", "chain", "draw", "unit"), coords={"sigma": [0.0, 1.0]})
    root = xr.Dataset(attrs={"swept": '["sigma"]'})
    return xr.DataTree.from_dict({"/": root, "/posterior": data.to_dataset(name="w")})


def test_what_is_identified_converges_where_the_parameter_cannot():
    path = bimodal()
    found = bt.diagnose(path, w=lambda p: p["w"], product=lambda p: (p["w"] ** 2).sum("unit"))
    w, product = found["w"].to_dataset(), found["product"].to_dataset()
    assert w["rhat"].dims == ("sigma", "unit") and product["rhat"].dims == ("sigma",)
    assert (w["rhat"] > 1.5).all() and (product["rhat"] < 1.02).all()
    assert (w["ess_bulk"] < 20).all() and (product["ess_bulk"] > 400).all()
    values = (path["posterior"].to_dataset()["w"] ** 2).sum("unit").values[1]
    assert float(product["rhat"][1]) == pytest.approx(float(azs.rhat(values)), rel=1e-6)
    assert float(product["ess_bulk"][1]) == pytest.approx(float(azs.ess(values, method="bulk")), rel=1e-6)


def test_a_function_that_averages_the_draws_is_named():
    with pytest.raises(bt.errors.ModelError, match=r"'mean'.*chain and draw"):
        bt.diagnose(bimodal(), mean=lambda p: p["w"].mean("draw"))
