"""Figures of the experiments, made of `results.jsonl` and of run folders.

python -m benchmarks.paper.figures                                   # accuracy and savings, of all results
python -m benchmarks.paper.figures --runs runs/paper/mnist/parity-seed0 runs/paper/mnist/own-seed0
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from benchmarks.paper.metrics import Saving
from benchmarks.paper.published import PUBLISHED
from benchmarks.paper.results import RESULTS, Result, read_results
from benchmarks.paper.tables import grouped
from pyro_bbits.inference import History

__all__ = ["plot_accuracy", "plot_curves", "plot_savings", "plot_transitions"]

FOLDER = Path(__file__).with_name("figures")
GREY = "0.55"


def plot_accuracy(dataset: str, results: Sequence[Result]) -> Figure:
    """Test accuracy against relative BOPs, with the published points in grey; bars are the deviation over seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for row in (row for row in PUBLISHED if row.dataset == dataset):
        axis.plot(row.bops, row.accuracy, "x" if row.confirmed else "+", color=GREY)
        axis.annotate(
            row.method, (row.bops, row.accuracy), fontsize=6, color=GREY, xytext=(3, 3), textcoords="offset points"
        )
    for group in (group for group in grouped(results) if group[0].dataset == dataset):
        bops, accuracy = ([getattr(r, name) for r in group] for name in ("relative_bops", "test_accuracy"))
        across, along = (statistics.stdev(v) if len(v) > 1 else 0.0 for v in (bops, accuracy))
        centre = statistics.fmean(bops), statistics.fmean(accuracy)
        axis.errorbar(*centre, xerr=across, yerr=along, fmt="o", markersize=4, label=group[0].label)
    axis.set(xscale="log", xlabel="relative BOPs in percent", ylabel="test accuracy in percent")
    axis.set_title(f"{dataset}: grey are published figures", fontsize=9)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=6, frameon=False)
    return figure


def plot_savings(dataset: str, results: Sequence[Result]) -> Figure:
    """Share of the BOP saving that is due to pruning and to bit widths."""
    figure, labels, shares = Figure(figsize=(6, 3), layout="constrained"), [], []
    for group in (group for group in grouped(results) if group[0].dataset == dataset):
        found = [
            Saving(r.relative_bops, r.widths_only, r.pruning_only).pruning_share
            for r in group
            if r.widths_only is not None and r.pruning_only is not None
        ]
        if found:
            labels.append(group[0].label)
            shares.append(100 * statistics.fmean(found))
    axis = figure.subplots()
    axis.barh(labels, shares, label="pruning")
    axis.barh(labels, [100 - share for share in shares], left=shares, label="bit widths")
    axis.set(xlabel="share of the saving in percent", xlim=(0, 100))
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
