"""The plot of estimators beside the exact posterior."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_bbits.analysis.comparison import MEAN_FIELD, EstimatorComparison
from pyro_bbits.analysis.exact import ExactPosterior

__all__ = ["plot_comparison"]

Array = np.ndarray[Any, Any]

MARKERS = "oDs^vPX*"
COLORS = ("tab:blue", "tab:cyan", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")
BAR = "0.85"


def plot_comparison(comparison: EstimatorComparison, *, configurations: int = 9) -> Figure:
    """Estimators against the exact posterior: inclusion probabilities on the left, top configurations on the right.

    Grey bars are exact, marks are what each estimator says. The legend gives each one's gap to the log evidence.

    Arguments:
        comparison: The comparison.
        configurations: How many of the most probable configurations to show.

    Returns:
        A figure; its height grows with the number of gates.

    Raises:
        ValueError: If all gates are pinned, so that there is nothing to compare, or `configurations` is below 1.
    """
    if configurations < 1:
        raise ValueError(f"configurations must be at least 1; got {configurations}.")
    inclusion = comparison.inclusion()
    if inclusion.empty:
        raise ValueError("every gate is pinned: there is nothing to compare.")
    exact, names = comparison.exact, [name for name in comparison.probabilities if name != MEAN_FIELD]
    figure = Figure(figsize=(10.5, 1.9 + 0.36 * max(len(inclusion), configurations)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    guessed = [inclusion[name].to_numpy() for name in names]
    _rows(left, _gate_labels(exact), inclusion["exact"].to_numpy(), guessed)
    left.set(title="Is the gate open?", xlabel="posterior probability", xlim=(-0.03, 1.03))
    order = exact.probabilities.argsort(descending=True)[:configurations]
    guessed = [exact.log_q(comparison.probabilities[name]).exp()[order].numpy() for name in names]
    _rows(right, _configuration_labels(exact, len(order)), exact.probabilities[order].numpy(), guessed)
    _cut(right, exact.probabilities.max().item(), guessed)
    right.set(title="The most probable configurations", xlabel="posterior probability")
    right.set_ylabel("bits of " + ", ".join(_free_tensors(exact)), fontsize=8)
    gaps, marks = comparison.table()["gap"], left.get_lines()
    texts = ["exact", *(f"{name} (gap {gaps[name]:.2f} nats)" for name in names)]
    columns = min(3, len(texts))
    figure.legend(
        [left.patches[0], *marks], texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return figure


def _rows(axis: Axes, labels: Sequence[str], exact: Array, guessed: Sequence[Array]) -> None:
    """Exact values as bars, guesses as marks in lanes of their own within each row."""
    y = np.arange(len(labels))
    axis.barh(y, exact, height=0.86, color=BAR)
    axis.vlines(exact, y - 0.43, y + 0.43, color="black", linewidth=1.2)
    lanes = np.linspace(-0.3, 0.3, len(guessed)) if len(guessed) > 1 else np.zeros(1)
    for i, (lane, values) in enumerate(zip(lanes, guessed, strict=True)):
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "color": COLORS[i % len(COLORS)]}
        axis.plot(values, y + lane, linestyle="none", markersize=5, clip_on=False, **style)
    axis.set_yticks(y, labels, fontsize=9)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _cut(axis: Axes, largest: float, guessed: Sequence[Array]) -> None:
    """End the axis at twice the largest exact value; marks beyond stand at the edge, with their value."""
    limit = min(1.0, 2 * largest)
    for line, values in zip(axis.get_lines(), guessed, strict=True):
        y = np.asarray(line.get_ydata(), float)
        for k in np.flatnonzero(values > limit).tolist():
            axis.text(
                0.975 * limit, y[k], f"{values[k]:.2f} →", ha="right", va="center", fontsize=8, color=line.get_color()
            )
        line.set_xdata(np.minimum(values, limit))
    axis.set_xlim(-0.03 * limit, limit)


def _gate_labels(exact: ExactPosterior) -> list[str]:
    """What an open gate means, for every free gate."""
    layout = exact.layout
    labels = [f"{name} kept" for name in layout.channel_names]
    labels += [f"{tensor} ≥{bits} bits" for tensor in layout.tensors for bits in layout.ladder.residuals]
    return [label for label, free in zip(labels, exact.free.tolist(), strict=True) if free]


def _free_tensors(exact: ExactPosterior) -> list[str]:
    bits = exact.top(len(exact))[list(exact.layout.tensors)]
    return [str(name) for name in bits.columns if bits[name].nunique() > 1]


def _configuration_labels(exact: ExactPosterior, count: int) -> list[str]:
    """Top configurations by the widths of the free tensors, and the kept channels of layers that can lose some."""
    every, tensors = exact.top(len(exact)), _free_tensors(exact)
    layers = [name for name in every.columns if str(name).startswith("kept.") and every[name].nunique() > 1]
    return [
        " ".join([f"{row[name]:>2d}" for name in tensors] + [f"{row[name]} ch." for name in layers])
        for row in every.head(count).to_dict("records")
    ]
