"""The posterior over bit configurations: summaries, plots and ArviZ data."""

from pyro_bbits.analysis.arviz_data import to_inference_data
from pyro_bbits.analysis.comparison import EstimatorComparison, compare_estimators
from pyro_bbits.analysis.comparison_plot import plot_comparison
from pyro_bbits.analysis.exact import ExactPosterior, count_configurations
from pyro_bbits.analysis.plots import plot_bit_widths, plot_bops, plot_channels, plot_gates, plot_history
from pyro_bbits.analysis.posterior import GatePosterior

__all__ = [
    "EstimatorComparison",
    "ExactPosterior",
    "GatePosterior",
    "compare_estimators",
    "count_configurations",
    "plot_bit_widths",
    "plot_bops",
    "plot_channels",
    "plot_comparison",
    "plot_gates",
    "plot_history",
    "to_inference_data",
]
