"""The record of the paper's experiments: a JSON line for each run that came to its end."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.records import append_lines, read_lines

__all__ = ["RESULTS", "Result", "append_results", "latest", "read_results"]

RESULTS = Path(__file__).with_name("results.jsonl")


TINY_MU = 1e-6
"""The strength of recipes whose BOPs have a price of their own: it only keeps the prior one, and is not named."""


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        dataset: `mnist`, `cifar10`, ...
        network: Name of the network.
        method: `bayesian-bits`, `float32`, `lsq`, ...
        recipe: Name of the recipe.
        seed: Its seed.
        test_accuracy: In percent, on the test split, which was used this once.
        relative_bops: BOPs in percent of the same network at 32 x 32 bits without pruning.
        epochs: Passes over the training data, without those of a float network before and of fine-tuning.
        seconds: Of the whole run.
        hardware: Processor.
        command: What reproduces it.
        date: Day, ISO 8601.
        mu: Strength of the prior; None where there is none.
        settings: What differs from the recipe, by name.
        share: Share of the recipe's epochs.
        all_rows: Whether the validation rows were trained on as well.
        validation_accuracy: In percent, of the same network; None if there were no such rows.
        test_nll: In nats per sample.
        test_samples: Rows of the test split.
        bits: Width of each tensor.
        kept: Kept output channels of each layer.
        widths_only: Relative BOPs of the same widths without pruning.
        pruning_only: Relative BOPs of the same channels at 32 x 32 bits.
        curve: Pairs of relative BOPs and validation accuracy, where a method has more than one point.
        versions: Of Python and the packages that matter.
    """

    dataset: str
    network: str
    method: str
    recipe: str
    seed: int
    test_accuracy: float
    relative_bops: float
    epochs: int
    seconds: float
    hardware: str
    command: str
    date: str
    mu: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    all_rows: bool = False
    validation_accuracy: float | None = None
    test_nll: float | None = None
    test_samples: int | None = None
    bits: dict[str, float] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    widths_only: float | None = None
    pruning_only: float | None = None
    curve: list[list[float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> tuple[Any, ...]:
        """What runs have in common that differ by their seed alone."""
        settings = tuple(sorted((name, str(value)) for name, value in self.settings.items()))
        where = self.dataset, self.network, self.method, self.recipe
        return *where, self.mu, settings, self.epochs, self.share, self.all_rows

    @property
    def label(self) -> str:
        """The recipe with what sets this run apart."""
        named = self.mu is not None and (self.mu != TINY_MU or "mu" in self.settings)
        parts = [f"mu {self.mu:g}"] if named else []
        parts += [f"{name} {value}" for name, value in self.settings.items() if name != "mu"]
        return f"{self.recipe} ({', '.join(parts)})" if parts else self.recipe

    @property
    def title(self) -> str:
        """The label, with the network."""
        return f"{self.label}, {self.network}"


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Append results to a file of JSON lines."""
    append_lines(path, results)


def read_results(path: Path) -> list[Result]:
    """Read a file of JSON lines; none if there is no such file.

    Raises:
        ValueError: If a line is no result; it says which.
    """
    return read_lines(path, Result, "a result")


def latest(results: Iterable[Result]) -> list[Result]:
    """The last result of each group and seed, in the order in which these first came."""
    return list({(*result.group, result.seed): result for result in results}.values())
