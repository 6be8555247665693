"""Figures of a results tree: strength paths, evidence, pooling, draws against data."""

from bayestie.plots._copies import plot_copies
from bayestie.plots._curves import plot_evidence, plot_pooling
from bayestie.plots._paths import plot_strength_paths
from bayestie.plots._predictive import plot_predictive

__all__ = ["plot_copies", "plot_evidence", "plot_pooling", "plot_predictive", "plot_strength_paths"]
