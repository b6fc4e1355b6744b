"""Pictures of runs. :func:`draw` makes any of them from finished runs, as a matplotlib figure.

Values are accuracies in [0, 1] and are drawn in percent; tasks are counted from 1. Undefined values leave a gap and are
marked, never drawn as 0. Line colours are those of Okabe and Ito, told apart with every common colour vision
deficiency; each line also has a marker and dashes of its own, each bar a hatch.
"""

from .catalog import KINDS, PlotKind, kind_of
from .drawing import Options, draw
from .files import plot_accuracy_curve, plot_comparison, plot_forgetting, plot_matrix, write_run_plots

__all__ = [
    "KINDS",
    "Options",
    "PlotKind",
    "draw",
    "kind_of",
    "plot_accuracy_curve",
    "plot_comparison",
    "plot_forgetting",
    "plot_matrix",
    "write_run_plots",
]
