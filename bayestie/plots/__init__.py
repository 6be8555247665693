"""Figures of a results tree, along the strength and at one, and of studies by simulation."""

from bayestie.plots._compare import plot_compare
from bayestie.plots._copies import plot_copies
from bayestie.plots._curves import plot_evidence, plot_pooling
from bayestie.plots._estimates import plot_estimates
from bayestie.plots._paths import plot_strength_paths
from bayestie.plots._predictive import plot_predictive
from bayestie.plots._strength import plot_strength
from bayestie.plots._studies import plot_calibration, plot_risk
from bayestie.plots._tension import plot_tension

__all__ = [
    "plot_calibration",
    "plot_compare",
    "plot_copies",
    "plot_estimates",
    "plot_evidence",
    "plot_pooling",
    "plot_predictive",
    "plot_risk",
    "plot_strength",
    "plot_strength_paths",
    "plot_tension",
]
