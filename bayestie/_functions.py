"""Diagnostics of functions of the draws: what the data identify may converge where parameters cannot."""

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr

from bayestie._diagnostics import convergence
from bayestie._errors import ModelError
from bayestie._results import swept_names


def diagnose(path: xr.DataTree, **functions: Callable[[xr.Dataset], xr.DataArray]) -> xr.DataTree:
    r"""R-hat and effective sample size of functions of the draws, at every strength.

    Where parameters are identified only up to a group - signs, rotations, labels - their own diagnostics say
    nothing about the posterior of what is identified, such as W^T W.

    Args:
        path: what ``sweep`` returned, or a fit.
        **functions: by name, a function from the posterior, dims (swept..., chain, draw, ...), to an array
            that keeps the dims chain and draw.

    Returns:
        A node per function with ``rhat`` (rank-normalised, split, bulk and folded; below 1.01 is well), and
        ``ess_bulk`` and ``ess_tail``, over the swept dims and the function's own. NaN where a number is
        constant.

    Raises:
        ModelError: a function whose values lack the dims chain and draw.

    Reference: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Bayesian Analysis 16(2).

    Example:
        >>> import numpy as np
        >>> w = xr.DataArray(np.random.default_rng(0).normal(size=(4, 100)), dims=("chain", "draw"))
        >>> root = xr.Dataset(attrs={"swept": "[]"})
        >>> tree = xr.DataTree.from_dict({"/": root, "/posterior": w.to_dataset(name="w")})
        >>> found = diagnose(tree, square=lambda posterior: posterior["w"] ** 2)
        >>> bool(found["square"].to_dataset()["rhat"] < 1.05)
        True
    """
    posterior, swept = path["posterior"].to_dataset(), swept_names(path)
    nodes = {}
    for name, function in functions.items():
        values = function(posterior)
        missing = {"chain", "draw"} - set(values.dims)
        if missing:
            raise ModelError(
                f"function '{name}' of the draws",
                found=f"dims {tuple(values.dims)}",
                expected="the dims chain and draw among them",
                fix="Sum over dims of the parameter only, for example xr.dot(w, w, dim='unit').",
            )
        rest = [dim for dim in values.dims if dim not in ("chain", "draw")]
        ordered = values.transpose("chain", "draw", *rest)
        flat = torch.as_tensor(np.ascontiguousarray(ordered.values.reshape(*ordered.shape[:2], -1)))
        found = convergence(flat.double())._asdict()
        del found["varies"], found["nested_rhat"]
        shape = ordered.shape[2:]
        nodes[f"/{name}"] = xr.Dataset(
            {key: (rest, x.numpy().reshape(shape)) for key, x in found.items()},
            coords={dim: values.coords[dim] for dim in rest if dim in values.coords},
        ).transpose(*[dim for dim in swept if dim in rest], ...)
    return xr.DataTree.from_dict(nodes)
