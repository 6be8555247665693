"""Ways to get draws: one file each, one small protocol."""

from bayestie._engines._laplace import LaplaceProposal, run_laplace
from bayestie._engines._laplace_fit import LaplaceFit, fit_laplace
from bayestie._engines._nuts import run_nuts
from bayestie._engines._plain_coordinates import has_no_use_for_a_mode
from bayestie._engines._protocol import Draws, Interrupted, Task
from bayestie._engines._pyro import run_pyro_nuts, run_pyro_svi
from bayestie._engines._sparse import run_sparse
from bayestie._engines._streamed import QUANTILES
from bayestie._engines._svi import run_svi, settle_guide
from bayestie._engines._whitened import carried, evenly, log_normal

__all__ = [
    "QUANTILES",
    "Draws",
    "Interrupted",
    "LaplaceFit",
    "LaplaceProposal",
    "Task",
    "carried",
    "evenly",
    "fit_laplace",
    "has_no_use_for_a_mode",
    "log_normal",
    "run_laplace",
    "run_nuts",
    "run_pyro_nuts",
    "run_pyro_svi",
    "run_sparse",
    "run_svi",
    "settle_guide",
]
