"""The final report of a run on the console."""

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pyro_bbits.analysis.posterior import GatePosterior
from pyro_bbits.analysis.run import RunFolder
from pyro_bbits.cost import FLOAT_BITS
from pyro_bbits.gates import DecisionRule
from pyro_bbits.insertion import MATMUL

__all__ = ["layer_table", "print_configuration", "print_report"]

BLOCKS = 2
"""Layers that may say the same of different blocks one by one."""

NAMES_SHOWN = 6
"""Layers that one note names."""


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
    return [
        str(row["layer"]) or "the network",
        _width(row["weight_bits"], row["weight_probability"]),
        "indices" if row["kind"] == "Embedding" else _width(row["input_bits"], row["input_probability"]),
        "" if row["kind"] == MATMUL else f"{row['kept']}/{row['channels']}{'*' if row['note'] else ' '}",
        EngFormatter(places=2, sep=" ")(row["macs"]),
        f"{row['relative_bops']:.4f}",
    ]


def _width(bits: int, probability: float) -> str:
    """The network's own input has a width that nobody chose."""
    return f"{bits}  input" if math.isnan(probability) else f"{bits} ({probability:.2f})"


def _notes(posterior: GatePosterior) -> list[str]:
    """Why layers keep their channels, a line per reason, and what is not quantized."""
    reasons: dict[str, list[str]] = {}
    refused = [layer for layer in posterior.structure.layers if layer.refused and not layer.is_product]
    alike = Counter(_numberless(f"{layer.refused}") for layer in refused)
    for layer in refused:  # what is said of many blocks is said once
        together = alike[_numberless(f"{layer.refused}")] > BLOCKS
        reason, name = (_numberless(text) if together else text for text in (f"{layer.refused}", layer.name))
        names = reasons.setdefault(reason, [])
        names += [name or "the network"] * (name not in names)
    notes = [f"* no channel gates of its own: {_some(names)}: {reason}" for reason, names in reasons.items()]
    left = [layer for layer in posterior.structure.float_layers if layer.macs]
    if left:
        share = 100 * posterior.cost.float_macs * FLOAT_BITS**2 / posterior.cost.float_bops
        notes.append(f"{share:.3g} % of the multiplications stay in float, counted at 32 x 32 bit:")
        notes += [f"  {layer.name or 'the network'} ({layer.kind}): {layer.reason}" for layer in left]
    return notes


def _numberless(text: str) -> str:
    """The same for the blocks of a list: `blocks.0.attention` as `blocks.*.attention`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def print_configuration(posterior: GatePosterior, rule: DecisionRule = "map", console: Console | None = None) -> None:
    """Print bits and kept channels per layer, why channels are kept, and what the whole costs.

    Arguments:
        posterior: The posterior.
        rule: How gates are decided.
        console: Where to; the standard output by default.
    """
    console = console or _console()
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


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def print_report(folder: RunFolder, rule: DecisionRule) -> None:
    """Print table, figures and files of a run."""
    console = _console()
    posterior = folder.posterior()
    print_configuration(posterior, rule, console)
    for line in _score_lines(folder.results()):
        console.print(line)
    theirs = folder.bits() in (None, posterior.configuration(rule))
    if not theirs:
        console.print(f"{folder.bits_file} holds another rule's bits; `bbits export --rule {rule}` writes these")
    for path in (folder.bits_file, folder.weights_file, *sorted(folder.plots.glob("*"))):
        if path.exists() and (theirs or path != folder.bits_file):
            console.print(f"  {path}")


def _score_lines(results: dict[str, object]) -> list[str]:
    """Accuracy, or the error of a regression in the units of its targets."""
    if not results:
        return ["this run did not come to its end: there are no test figures"]
    samples, lines = f"{results.get('test_samples')} samples", []
    for ending, title, note in (
        ("_float", "full precision", samples),
        ("", "quantized", f"{samples}, {results.get('rule')} rule"),
    ):
        if (accuracy := results.get(f"test_accuracy{ending}")) is not None:
            lines.append(f"test accuracy {title:<14} {accuracy:6.2f} %  ({note})")
        if (rmse := results.get(f"test_rmse{ending}")) is not None:
            lines.append(f"test RMSE {title:<14} {rmse:.5g}  ({note})")
    return lines
