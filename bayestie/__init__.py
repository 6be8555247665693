"""bayestie: how much should these parameters be shared?

Declare a tie between copies of a parameter in any Pyro model, sweep the prior strength from hard
sharing (sigma = 0) to none (sigma = inf) in one batched computation, and read the answer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> module that holds it. Loaded on first use (PEP 562), so that `import bayestie` costs
# nothing and only plots and reports pay for matplotlib.
_HOMES = {
    "Tie": "._ties",
    "TiedNormal": "._tied_normal",
    "TieReparam": "._tied_normal",
    "tied": "._tied_normal",
    "fit": "._sweep",
    "sweep": "._sweep",
    "strengths": "._sweep",
    "save": "._results",
    "load": "._results",
    "select": "._results",
    "evidence": "._evidence",
    "strength_posterior": "._strength",
    "average": "._strength",
    "hard_vs_soft": "._strength",
    "compare": "._predict",
    "diagnose": "._functions",
    "leave_copy_out": "._refit",
    "loo_refits": "._refit",
    "risk": "._risk",
    "calibrate": "._calibration",
    "prior_predictive": "._forward",
    "posterior_predictive": "._forward",
    "pooling": "._pooling",
    "tension": "._tension",
    "verdict": "._verdict",
    "report": "._report",
}
_MODULES = {"errors": "._errors", "nn": ".nn", "plots": ".plots"}

__all__ = [
    "Tie",
    "TieReparam",
    "TiedNormal",
    "average",
    "calibrate",
    "compare",
    "diagnose",
    "errors",
    "evidence",
    "fit",
    "hard_vs_soft",
    "leave_copy_out",
    "load",
    "loo_refits",
    "nn",
    "plots",
    "pooling",
    "posterior_predictive",
    "prior_predictive",
    "report",
    "risk",
    "save",
    "select",
    "strength_posterior",
    "strengths",
    "sweep",
    "tension",
    "tied",
    "verdict",
]

if TYPE_CHECKING:
    from . import _errors as errors
    from . import nn, plots
    from ._calibration import calibrate
    from ._evidence import evidence
    from ._forward import posterior_predictive, prior_predictive
    from ._functions import diagnose
    from ._pooling import pooling
    from ._predict import compare
    from ._refit import leave_copy_out, loo_refits
    from ._report import report
    from ._results import load, save, select
    from ._risk import risk
    from ._strength import average, hard_vs_soft, strength_posterior
    from ._sweep import fit, strengths, sweep
    from ._tension import tension
    from ._tied_normal import TiedNormal, TieReparam, tied
    from ._ties import Tie
    from ._verdict import verdict


def __getattr__(name: str):
    if name in _MODULES:
        value = import_module(_MODULES[name], __name__)
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
