"""Figures of the experiments, made of `results.jsonl` and of run folders.

python -m benchmarks.paper.figures                                   # accuracy and savings, of all results
python -m benchmarks.paper.figures --runs runs/paper/mnist/parity-seed0 runs/paper/mnist/own-seed0
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from textwrap import fill as fill_text
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from benchmarks.paper.metrics import Saving
from benchmarks.paper.published import PUBLISHED
from benchmarks.paper.recipes import DATA
from benchmarks.paper.results import RESULTS, Result, read_results
from benchmarks.paper.tables import grouped
from pyro_bbits.inference import History

__all__ = ["plot_accuracy", "plot_curves", "plot_savings", "plot_transitions"]

FOLDER = Path(__file__).with_name("figures")
GREY = "0.55"
FAR = 6.0
"""How many times as far below the median as the best is above it a point may lie, to be drawn where it is."""

LINE = 60
"""Letters in a line of a name."""

WIDTHS_OF_NAME = re.compile(r"-w\d+a\d+$|-a\d+$|-fp32$")

COLORS = [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]]  # type: ignore[attr-defined]

METHODS = "bayesian-bits", "float32", "bfloat16", "lsq", "pact", "l0", "dq", "ternary", "binary", "sensitivity"
MARKS = dict(zip(METHODS, "D**s^vP<>d", strict=True))


def plot_accuracy(dataset: str, results: Sequence[Result]) -> Figure:
    """Test accuracy against relative BOPs of the paper's network, its published points in grey.

    A colour is a recipe, whatever its widths and settings, which the table tells apart; bars are the deviation over
    seeds. Diamonds are gated networks, other marks the compared methods; hollow ones had fewer epochs than the paper's
    runs. Points that would press all others together lie at the lower edge, with their accuracy beside them.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.margins(0.08)
    axis.set(xscale="log", xlabel="relative BOPs in percent", ylabel="test accuracy in percent")
    groups = [group for group in grouped(dataset, results) if group[0].network == DATA[dataset].network]
    lowest = _lowest([statistics.fmean(r.test_accuracy for r in group) for group in groups])
    colors: dict[str, Any] = {}
    for group in groups:
        family = WIDTHS_OF_NAME.sub("", group[0].recipe)
        label = family if family not in colors else None
        _plot_group(axis, group, colors.setdefault(family, COLORS[len(colors) % len(COLORS)]), label, lowest)
    published = [row for row in PUBLISHED if row.dataset == dataset]
    for row in published:
        axis.plot(row.bops, row.accuracy, "x" if row.confirmed else "+", color=GREY, zorder=3)
    axis.set_title(f"{dataset}; grey: published; hollow: fewer epochs than published", fontsize=9)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    if published:
        figure.draw_without_rendering()  # names are placed by where things are in the end
        ordered = sorted(published, key=lambda row: not row.confirmed)
        _annotate(axis, [(row.method, row.bops, row.accuracy) for row in ordered])
    return figure


def _lowest(accuracies: Sequence[float]) -> float:
    middle = statistics.median(accuracies)
    return middle - FAR * (max(accuracies) - middle)


def _plot_group(axis: Axes, group: Sequence[Result], color: Any, label: str | None, lowest: float) -> None:
    """One point for runs that differ by their seed."""
    first = group[0]
    bops, accuracy = ([getattr(r, name) for r in group] for name in ("relative_bops", "test_accuracy"))
    across, along = (statistics.stdev(v) if len(v) > 1 else None for v in (bops, accuracy))
    reached = statistics.fmean(accuracy)
    centre = statistics.fmean(bops), max(lowest, reached)
    if reached < lowest:
        axis.annotate(f"\u2193 {reached:.1f} %", centre, (6, 0), textcoords="offset points", fontsize=6, va="center")
    mark = MARKS.get(first.method, "o")
    fill = "none" if first.epochs < DATA[first.dataset].epochs else color
    options: dict[str, Any] = {"color": color, "fmt": mark, "markersize": 6, "markerfacecolor": fill}
    axis.errorbar(*centre, xerr=across, yerr=along, label=label, **options)


def _annotate(axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, each where it covers no point and no other name, if there is such a place."""
    centres = [np.asarray(line.get_xydata()) for line in axis.lines]
    marks = axis.transData.transform(np.concatenate([centre for centre in centres if len(centre) == 1]))
    taken = [Bbox.from_extents(*(mark - 4), *(mark + 4)) for mark in marks]
    for text, x, y in points:
        note = axis.annotate(text, (x, y), (6, 0), textcoords="offset points", fontsize=6, color=GREY, va="center")
        for side, height in product(("left", "right"), (0, 7, -7, 14, -14, 21, -21)):
            note.set(ha=side, position=(6 if side == "left" else -6, height))
            box = note.get_window_extent()
            if not box.count_overlaps(taken) and axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1:
                break
        taken.append(box)


def plot_savings(dataset: str, results: Sequence[Result]) -> Figure:
    """Share of the BOP saving that is due to pruning and to bit widths."""
    labels, shares = [], []
    for group in grouped(dataset, results):
        found = [
            Saving(r.relative_bops, r.widths_only, r.pruning_only).pruning_share
            for r in group
            if r.widths_only is not None and r.pruning_only is not None
        ]
        if found:
            labels.append(fill_text(group[0].title, LINE))
            shares.append(100 * statistics.fmean(found))
    lines = np.array([1 + label.count("\n") for label in labels])
    places = np.cumsum(lines) - lines / 2  # a bar has the room that its label takes
    figure = Figure(figsize=(7, 1.2 + 0.16 * lines.sum()), layout="constrained")
    axis = figure.subplots()
    axis.barh(places, shares, label="pruning")
    axis.barh(places, [100 - share for share in shares], left=shares, label="bit widths")
    axis.set(xlabel="share of the saving in percent", xlim=(0, 100), ylim=(0, lines.sum()))
    axis.set_yticks(places, labels)
    axis.tick_params(labelsize=7)
    figure.legend(loc="outside upper right", ncols=2, fontsize=7, frameon=False)
    return figure


def plot_curves(histories: dict[str, History]) -> Figure:
    """Loss, held-out accuracy and BOPs over the epochs."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    entries = (
        ("loss", "loss in nats per sample"),
        ("validation_accuracy", "accuracy in percent"),
        ("bops", "BOPs in percent"),
    )
    for axis, (entry, label) in zip(axes, entries, strict=True):
        for name, history in histories.items():
            points = [(r.epoch, getattr(r, entry)) for r in history if getattr(r, entry) is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], label=name)
        axis.set(xlabel="epoch", ylabel=label)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=6, frameon=False)
    return figure


def plot_transitions(history: History) -> Figure:
    """Width of every tensor after every epoch; see :func:`benchmarks.paper.questions.transitions`."""
    bits = np.array([record.bits for record in history]).T
    figure = Figure(figsize=(7, 1 + 0.22 * len(history.tensors)), layout="constrained")
    axis = figure.subplots()
    widths = [0, 2, 4, 8, 16, 32]
    colors = colormaps["viridis"].resampled(len(widths))
    places = np.searchsorted(widths, bits)
    image = axis.imshow(
        places, aspect="auto", interpolation="nearest", cmap=colors, norm=BoundaryNorm(np.arange(-0.5, 6), 6)
    )
    axis.set_yticks(range(len(history.tensors)), history.tensors, fontsize=6)
    axis.set_xlabel("epoch, from 0")
    figure.colorbar(image, ax=axis, ticks=range(6), label="bits").ax.set_yticklabels(map(str, widths))
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="run folders, for curves and transitions")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--format", choices=("png", "svg", "pdf"), default="png")
    arguments = parser.parse_args(argv)
    results, figures = read_results(arguments.results), {}
    for dataset in dict.fromkeys(result.dataset for result in results):
        figures[f"accuracy_{dataset}"] = plot_accuracy(dataset, results)
        figures[f"savings_{dataset}"] = plot_savings(dataset, results)
    histories = {run.name: History.load(run / "history.jsonl") for run in arguments.runs}
    if histories:
        figures["curves"] = plot_curves(histories)
    figures |= {
        f"transitions_{name}": plot_transitions(history) for name, history in histories.items() if history.tensors
    }
    if not figures:
        print("there is nothing to draw: no results yet, and no --runs")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(arguments.output / f"{name}.{arguments.format}", dpi=150)
        print(arguments.output / f"{name}.{arguments.format}")


if __name__ == "__main__":
    main()
