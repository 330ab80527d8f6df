"""The tables of `benchmarks/paper/README.md`, made of `results.jsonl`.

python -m benchmarks.paper.tables            # write the tables anew
python -m benchmarks.paper.tables --check    # only say whether they are up to date
"""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.pages import markdown_table, page_command
from benchmarks.paper.metrics import Saving
from benchmarks.paper.published import PUBLISHED
from benchmarks.paper.results import RESULTS, Result, latest, read_results

__all__ = [
    "EXPECTED",
    "PAGE",
    "accuracy_table",
    "fill_tables",
    "grouped",
    "lambda_table",
    "savings_table",
    "spread",
    "trials_table",
]

PAGE = Path(__file__).with_name("README.md")
PENDING = "not run yet"

EXPECTED = (
    "float32",
    "bfloat16",
    "parity",
    "fine-tuned",
    "own",
    "best",
    "best-w8a8",
    "best-w4a8",
    "best-a8",
    "quantization-only",
    "pruning-only-fp32",
    "pruning-only-w8a8",
    "pruning-only-w4a8",
    "post-training-gates",
    "post-training-gates-ranges",
    "sensitivity",
    "uniform-w8a8",
    "uniform-w4a4",
    "uniform-w2a2",
    "lsq-w4a4",
    "lsq-w2a2",
    "pact-w4a4",
    "l0",
    "dq",
    "ternary",
    "binary",
    "straight-through",
    "expected-bops",
)
"""Recipes that the tables have a row for, run or not."""


def grouped(dataset: str, results: Sequence[Result]) -> list[list[Result]]:
    """Results on a data set that differ by their seed alone, together; full runs only, in the order of `EXPECTED`."""
    groups: dict[object, list[Result]] = {}
    for result in latest(results):
        if result.share == 1 and result.dataset == dataset:
            groups.setdefault(result.group, []).append(result)
    order = {name: place for place, name in enumerate(EXPECTED)}
    return sorted(groups.values(), key=lambda group: order.get(group[0].recipe, len(order)))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, with the standard deviation over seeds if there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under the names of their columns."""
    return markdown_table(dict(zip(names, zip(*rows, strict=True), strict=True))) if rows else f"*{PENDING}*"


def accuracy_table(dataset: str, results: Sequence[Result]) -> str:
    """Accuracy and BOPs of all recipes on a data set, and of the published rows."""
    rows: list[tuple[str, ...]] = [
        (row.method, f"{row.accuracy:.2f}", f"{row.bops:.2f}", "", "", "published" if row.confirmed else "published*")
        for row in PUBLISHED
        if row.dataset == dataset
    ]
    groups = grouped(dataset, results)
    missing = [name for name in EXPECTED if name not in {group[0].recipe for group in groups}]
    rows += [_cells(group) for group in groups] + [(name, PENDING, "", "", "", "") for name in missing]
    names = "run", "test accuracy %", "relative BOPs %", "seeds", "epochs", "where"
    return _table(names, rows)


def _cells(group: Sequence[Result]) -> tuple[str, ...]:
    first = group[0]
    accuracy = spread([result.test_accuracy for result in group], 2)
    bops = spread([result.relative_bops for result in group], 3)
    seeds = ", ".join(str(result.seed) for result in group)
    name = f"{first.title}{', all rows' * first.all_rows}"
    return name, accuracy, bops, seeds, str(first.epochs), f"{first.hardware}, {first.date}"


def savings_table(dataset: str, results: Sequence[Result]) -> str:
    """Share of the saving by pruning and by bit widths, mean over seeds; see :class:`Saving`."""
    rows = []
    for group in grouped(dataset, results):
        found = [
            Saving(result.relative_bops, result.widths_only, result.pruning_only)
            for result in group
            if result.widths_only is not None and result.pruning_only is not None
        ]
        if found:
            pruning = 100 * statistics.fmean(saving.pruning_share for saving in found)
            figures = (statistics.fmean(column) for column in zip(*found, strict=True))
            shares = str(round(pruning)), str(round(100 - pruning))
            rows.append((group[0].title, *(f"{value:.3f}" for value in figures), *shares))
    names = "run", "BOPs %", "widths only %", "pruning only %", "share of pruning %", "share of widths %"
    return _table(names, rows)


def lambda_table(dataset: str, results: Sequence[Result]) -> str:
    """Accuracy and BOPs by the strength of the prior, for recipes that were run with several."""
    groups = [group for group in grouped(dataset, results) if group[0].mu is not None]
    recipes = {g[0].recipe: [h for h in groups if h[0].recipe == g[0].recipe] for g in groups}
    rows = [
        (
            recipe,
            f"{group[0].mu:g}",
            *_cells(group)[1:4],
            ", ".join(f"{k} {v}" for k, v in group[0].settings.items() if k != "mu"),
        )
        for recipe, many in recipes.items()
        if len({group[0].mu for group in many}) > 1
        for group in sorted(many, key=lambda group: group[0].mu or 0)
    ]
    names = "recipe", "mu", "test accuracy %", "relative BOPs %", "seeds", "settings"
    return _table(names, rows)


def trials_table(dataset: str, results: Sequence[Result]) -> str:
    """Runs on a share of the epochs, by which settings are chosen: validation accuracy, and no test rows."""
    rows = [
        (
            result.label,
            f"{result.share:g}",
            "" if result.validation_accuracy is None else f"{result.validation_accuracy:.2f}",
            f"{result.relative_bops:.3f}",
            str(result.seed),
        )
        for result in latest(results)
        if result.dataset == dataset and result.share != 1
    ]
    names = "run", "share of the epochs", "validation accuracy %", "relative BOPs %", "seed"
    return _table(names, rows)


TABLES: dict[str, Callable[[str, Sequence[Result]], str]] = {
    "accuracy": accuracy_table,
    "savings": savings_table,
    "lambda": lambda_table,
    "trials": trials_table,
}


def fill_tables(page: str, results: Sequence[Result]) -> str:
    """Replace what stands between `<!-- table: KIND, DATA -->` and `<!-- end -->`, for each such pair."""

    def fill(match: re.Match[str]) -> str:
        return f"{match['start']}\n{TABLES[match['kind']](match['data'], results)}\n{match['end']}"

    pattern = r"(?P<start><!-- table: (?P<kind>\w+), (?P<data>\w+) -->).*?(?P<end><!-- end -->)"
    return re.sub(pattern, fill, page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables of the page, or check them."""
    return page_command(argv, __doc__, RESULTS, PAGE, lambda page, file: fill_tables(page, read_results(file)))


if __name__ == "__main__":
    raise SystemExit(main())
