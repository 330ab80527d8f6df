"""The final report of a run on the console."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pyro_bbits.analysis.posterior import GatePosterior
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.gates import DecisionRule

__all__ = ["layer_table", "print_report"]


def layer_table(posterior: GatePosterior, rule: DecisionRule = "map") -> Table:
    """Bits and kept channels per layer as a table for the console.

    Arguments:
        posterior: The posterior.
        rule: How gates are decided.

    Returns:
        A table; behind every width stands its posterior probability, and a star where a layer has no channel gates.
    """
    table = Table(title=f"Bit configuration ({rule} rule)", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for name in ("weight bits (p)", "input bits (p)", "channels kept", "MACs", "BOPs %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in posterior.table(rule).reset_index().to_dict("records"):
        table.add_row(*_cells(row))
    return table


def _cells(row: Mapping[Hashable, Any]) -> list[str]:
    sure = row["input_probability"]
    return [
        str(row["layer"]),
        f"{row['weight_bits']} ({row['weight_probability']:.2f})",
        f"{row['input_bits']}  input" if math.isnan(sure) else f"{row['input_bits']} ({sure:.2f})",
        f"{row['kept']}/{row['channels']}{'*' if row['note'] else ' '}",
        EngFormatter(places=2, sep=" ")(row["macs"]),
        f"{row['relative_bops']:.4f}",
    ]


def _notes(posterior: GatePosterior) -> list[str]:
    return [
        f"* {layer.name} has no channel gates of its own: {layer.refused}"
        for layer in posterior.structure.layers
        if layer.refused
    ]


def print_report(folder: RunFolder, rule: DecisionRule) -> None:
    """Print table, figures and files of a run."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    posterior, results = folder.posterior(), folder.results()
    table = layer_table(posterior, rule)
    # no name or figure is cut, however narrow the terminal; a pipe has no width of its own
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=4096)).maximum)
    console.print(table)
    for note in _notes(posterior):
        console.print(note)
    configuration, (low, high) = posterior.configuration(rule), posterior.bops_interval()
    console.print(
        f"relative BOPs {configuration.relative_bops:.3f} %  "
        f"(expected {posterior.expected_bops():.3f} %, 94 % of drawn configurations {low:.3f} to {high:.3f} %)"
    )
    for line in _accuracy_lines(results):
        console.print(line)
    theirs = folder.bits() in (None, configuration)
    if not theirs:
        console.print(f"{folder.bits_file} holds another rule's bits; `bbits export --rule {rule}` writes these")
    for path in (folder.bits_file, folder.weights_file, *sorted(folder.plots.glob("*"))):
        if path.exists() and (theirs or path != folder.bits_file):
            console.print(f"  {path}")


def _accuracy_lines(results: dict[str, object]) -> list[str]:
    if not results:
        return ["this run did not come to its end: there is no test accuracy"]
    samples, lines = f"{results.get('test_samples')} samples", []
    for key, title, note in (
        ("test_accuracy_float", "full precision", samples),
        ("test_accuracy", "quantized", f"{samples}, {results.get('rule')} rule"),
    ):
        if results.get(key) is not None:
            lines.append(f"test accuracy {title:<14} {results[key]:6.2f} %  ({note})")
    return lines
