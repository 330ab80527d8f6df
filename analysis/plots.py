"""Plots of the posterior over bit configurations and of the training that led to it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_bbits.analysis.posterior import GatePosterior
from pyro_bbits.gates import decide
from pyro_bbits.inference import History
from pyro_bbits.insertion import LayerInfo

__all__ = ["plot_bit_widths", "plot_bops", "plot_channels", "plot_gates", "plot_history"]

ROW = 0.24
"""Height of a row in inches: a name of 8 points with room around it."""

GREY = "0.35"


def plot_gates(posterior: GatePosterior) -> Figure:
    """Inclusion probability of every rung of every tensor: a row per layer, weights on the left, inputs on the right.

    A cell tells how probable it is that the tensor has at least so many bits; 0 and 1 are exact, as for pinned gates.

    Arguments:
        posterior: The posterior.

    Returns:
        A figure; its height grows with the number of layers.
    """
    inclusion = posterior.inclusion()
    labels = [f"≥{bits}" for bits in inclusion.columns]
    figure, axes = _two_columns(posterior, "Probability of having at least so many bits")
    for axis, rows in zip(axes, _tensor_rows(posterior.structure.layers), strict=True):
        values = _rows_of(inclusion, rows)
        image = axis.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlabel("bits")
        _annotate(axis, values)
    figure.colorbar(image, ax=axes, label="inclusion probability", fraction=0.04, pad=0.02)
    return figure


def plot_bit_widths(posterior: GatePosterior) -> Figure:
    """Posterior distribution over the bit width of every tensor, as stacked bars: a row per layer.

    Arguments:
        posterior: The posterior.

    Returns:
        A figure; its height grows with the number of layers.
    """
    widths = posterior.widths()
    colors = _width_colors(posterior.structure.layout.ladder.widths)
    figure, axes = _two_columns(posterior, "Posterior over bit widths")
    for axis, rows in zip(axes, _tensor_rows(posterior.structure.layers), strict=True):
        values, left = _rows_of(widths, rows), np.zeros(len(rows))
        for column, (bits, color) in enumerate(colors.items()):
            part = np.nan_to_num(values[:, column])
            axis.barh(range(len(rows)), part, left=left, height=0.8, color=color, label=f"{bits}")
            left += part
        for y in (y for y, row in enumerate(rows) if row is None):
            axis.text(0.5, y, "8 bit, not quantized", ha="center", va="center", fontsize=7, color=GREY)
        axis.set(xlim=(0, 1), xlabel="probability")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, title="bits", loc="outside right upper", frameon=False)
    return figure


def plot_channels(posterior: GatePosterior) -> Figure:
    """Which share of each layer's output channels is kept, and how sure that is.

    Every row is a layer, its channels sorted by the probability of being kept; the mark shows where the most probable
    configuration cuts: it keeps those on the left.

    Arguments:
        posterior: The posterior.

    Returns:
        A figure; its height grows with the number of prunable layers.
    """
    layout = posterior.structure.layout
    groups, kept = layout.groups, layout.kept(decide(posterior.probabilities))
    figure, axis = _figure(max(len(groups), 4) + 1, 7.0)  # the bar of colours needs the height of four rows
    axis.set_title("Kept output channels")
    if not groups:
        _say(axis, "no channel of this network is pruned")
        return figure
    for y, (group, count) in enumerate(zip(groups, kept, strict=True)):
        ordered = posterior.probabilities.channels[layout.slices[group.layer]].sort(descending=True).values.numpy()
        extent = (0.0, 1.0, y + 0.4, y - 0.4)
        image = axis.imshow(ordered[None], extent=extent, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        cut = axis.vlines(count / group.channels, y - 0.45, y + 0.45, color="tab:red", linewidth=1.5, clip_on=False)
        axis.text(1.02, y, f"{count}/{group.channels}", va="center", fontsize=8)
    axis.set(xlim=(0, 1), ylim=(len(groups) - 0.5, -0.5), xlabel="share of channels, most probable first")
    axis.set_yticks(range(len(groups)), [group.layer for group in groups])
    figure.colorbar(image, ax=axis, label="probability of being kept", fraction=0.04, pad=0.12)
    label = "channels left of the mark are kept in the most probable configuration"
    figure.legend([cut], [label], loc="outside lower center", frameon=False, fontsize=8)
    return figure


def plot_bops(posterior: GatePosterior, *, draws: int = 2000, seed: int = 0) -> Figure:
    """How the relative BOPs of configurations drawn from the posterior spread around the most probable one.

    The dearest hundredth of them is counted in the legend and not drawn, so that the rest can be read.

    Arguments:
        posterior: The posterior.
        draws: Number of configurations.
        seed: Seed of the draws.

    Returns:
        A figure.
    """
    sampled = posterior.sampled_bops(draws, seed=seed).double().numpy()  # bins may be narrower than float32 resolves
    chosen = posterior.map_configuration().relative_bops
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    limit = np.quantile(sampled, 0.99)
    beyond = int((sampled > limit).sum())
    label = f"{draws} drawn configurations" + (f" ({beyond} above {limit:.3g} %)" if beyond else "")
    axis.hist(sampled[sampled <= limit], bins=40, color="tab:blue", alpha=0.6, label=label)
    axis.axvline(posterior.expected_bops(), color=GREY, linestyle="--", label="expected")
    axis.axvline(chosen, color="tab:red", label=f"most probable configuration: {chosen:.3f} %")
    axis.set(xlabel="relative BOPs (% of 32 x 32 bits)", ylabel="draws", title="Cost of drawn configurations")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return figure


def plot_history(history: History) -> Figure:
    """Training curves: loss, held-out accuracy (or likelihood), relative BOPs, and the width of every tensor by epoch.

    Arguments:
        history: What :func:`~pyro_bbits.inference.fit` returned, one epoch at least.

    Returns:
        A figure; the panel of bit widths grows with the number of tensors.

    Raises:
        ValueError: If the history is empty.
    """
    if not len(history):
        raise ValueError("the history is empty: there is no epoch to plot.")
    frame, rows = history.frame(), len(history.tensors)
    height = max(2.2, ROW * rows + 0.8) if rows else 0.0
    figure = Figure(figsize=(9, 3.2 + height), layout="constrained")
    grid = figure.add_gridspec(2 if rows else 1, 3, height_ratios=[3.2, height] if rows else [1])
    panels: Sequence[Callable[[Axes, pd.DataFrame], None]] = (_loss_panel, _quality_panel, _bops_panel)
    for column, panel in enumerate(panels):
        axis = figure.add_subplot(grid[0, column])
        panel(axis, frame)
        _count_epochs(axis)
    if rows:
        _width_panel(figure, figure.add_subplot(grid[1, :]), history)
    return figure


def _loss_panel(axis: Axes, frame: pd.DataFrame) -> None:
    axis.set_title("Loss, nats per sample")
    _curve(axis, frame, "loss", color="tab:blue", label="loss (negative ELBO)")
    if frame["kl"].notna().any():
        _curve(axis, frame, "kl", color="tab:orange", label="KL of the gates")
    _scale(axis)
    _legend_below(axis)


def _quality_panel(axis: Axes, frame: pd.DataFrame) -> None:
    name, title = "validation_accuracy", "Held-out accuracy, %"
    if frame[name].isna().all():
        name, title = "validation_nll", "Held-out negative log-likelihood"
    axis.set_title(title if frame[name].notna().any() else "Held-out quality")
    if frame[name].isna().all():
        _say(axis, "no validation data")
        return
    _curve(axis, frame, name, color="tab:green")


def _bops_panel(axis: Axes, frame: pd.DataFrame) -> None:
    axis.set_title("Relative BOPs, %")
    if frame["bops"].isna().all():
        _say(axis, "no gates")
        return
    _curve(axis, frame, "expected_bops", color=GREY, linestyle="--", label="expected")
    _curve(axis, frame, "bops", color="tab:red", label="hard gates")
    _scale(axis)
    _legend_below(axis)


def _legend_below(axis: Axes) -> None:
    """A legend under the axis label, where no curve can be."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize=8)


def _curve(axis: Axes, frame: pd.DataFrame, name: str, **style: Any) -> None:
    # a line of one point is invisible without a mark
    marker = "o" if frame[name].notna().sum() == 1 else None
    axis.plot(frame["epoch"], frame[name].astype(float), marker=marker, **style)


def _scale(axis: Axes) -> None:
    """A logarithmic axis where all values are positive and span more than a factor of 10."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.get_lines()])
    if np.nanmin(values) > 0 and np.nanmax(values) > 10 * np.nanmin(values):
        axis.set_yscale("log")


def _count_epochs(axis: Axes) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))


def _say(axis: Axes, text: str) -> None:
    """A text in place of data."""
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()


def _width_panel(figure: Figure, axis: Axes, history: History) -> None:
    values = np.array([record.bits for record in history]).T
    ladder = sorted({0, 2, 4, 8, 16, 32} | set(values.flatten().tolist()))
    colors = _width_colors(ladder)
    position = np.searchsorted(ladder, values)
    norm = BoundaryNorm(np.arange(len(ladder) + 1) - 0.5, len(ladder))
    extent = (0.5, len(history) + 0.5, len(history.tensors) - 0.5, -0.5)
    image = axis.imshow(
        position,
        cmap=ListedColormap(list(colors.values())),
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    axis.set_yticks(range(len(history.tensors)), history.tensors, fontsize=8)
    axis.set_title("Bit width with hard gates")
    _count_epochs(axis)
    bar = figure.colorbar(image, ax=axis, label="bits", fraction=0.03, pad=0.02, ticks=range(len(ladder)))
    bar.ax.set_yticklabels([str(bits) for bits in ladder])


def _width_colors(widths: Sequence[int]) -> dict[int, Any]:
    """Light to dark from coarse to fine; pruned away is grey."""
    scale = colormaps["viridis_r"](np.linspace(0.05, 1, max(len(widths) - 1, 1)))
    return {widths[0]: "0.8"} | dict(zip(widths[1:], scale, strict=False))


def _figure(rows: int, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, ROW * rows + 1.6), layout="constrained")
    return figure, figure.subplots()


def _two_columns(posterior: GatePosterior, title: str) -> tuple[Figure, Sequence[Axes]]:
    """Two panels side by side with a row per layer: its weight and its input."""
    names = [layer.name for layer in posterior.structure.layers]
    figure = Figure(figsize=(9, ROW * len(names) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title)
    left.set_title("weight", fontsize=10)
    right.set_title("input", fontsize=10)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_ylim(len(names) - 0.5, -0.5)
    return figure, (left, right)


def _tensor_rows(layers: Sequence[LayerInfo]) -> tuple[list[int | None], list[int | None]]:
    return [layer.weight for layer in layers], [layer.input for layer in layers]


def _rows_of(frame: pd.DataFrame, rows: Sequence[int | None]) -> np.ndarray[Any, Any]:
    """Rows of a table, NaN where there is no tensor."""
    empty = np.full(frame.shape[1], np.nan)
    return np.stack([empty if row is None else frame.iloc[row].to_numpy() for row in rows])


def _short(probability: float) -> str:
    """Two decimals; 0 and 1 are for what is certain."""
    if 0 < probability < 0.01:
        return "<.01"
    if 0.99 < probability < 1:
        return ">.99"
    return f"{probability:.2f}" if 0 < probability < 1 else f"{probability:.0f}"


def _annotate(axis: Axes, values: np.ndarray[Any, Any]) -> None:
    for (y, x), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        axis.text(x, y, _short(value), ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black")
    for y in np.flatnonzero(np.isnan(values).all(1)).tolist():
        middle = (values.shape[1] - 1) / 2
        axis.text(middle, y, "8 bit, not quantized", ha="center", va="center", fontsize=7, color=GREY)
