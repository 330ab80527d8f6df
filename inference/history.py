"""The record of a training run, epoch by epoch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_bbits.files import write_text_atomically

__all__ = ["EpochRecord", "History"]


@dataclass(frozen=True)
class EpochRecord:
    """What is known after an epoch. Entries that do not apply (no validation data, no gates) are None.

    Attributes:
        epoch: Number of the epoch, from 1.
        loss: Mean training loss, the negative ELBO in nats per sample.
        kl: KL of the gates in nats per sample, at the end of the epoch.
        validation_nll: Mean negative log-likelihood on held-out data with hard gates, in nats per sample.
        validation_accuracy: Share of right classes on held-out data with hard gates, in percent.
        expected_bops: Relative BOPs expected under the posterior, in percent.
        bops: Relative BOPs of the hard gates, in percent.
        bits: Width of each tensor with hard gates, in bits; 0 where no channel is left.
        kept: Kept channels of each prunable layer with hard gates.
        seconds: Time since the start of the run.
    """

    epoch: int
    loss: float
    kl: float | None = None
    validation_nll: float | None = None
    validation_accuracy: float | None = None
    expected_bops: float | None = None
    bops: float | None = None
    bits: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    seconds: float = 0.0


@dataclass
class History:
    """All epochs of a run.

    Attributes:
        tensors: Names of the quantized tensors, in the order of :attr:`EpochRecord.bits`.
        layers: Names of the prunable layers, in the order of :attr:`EpochRecord.kept`.
        epochs: The records.
    """

    tensors: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    epochs: list[EpochRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self.epochs)

    def __getitem__(self, index: int) -> EpochRecord:
        return self.epochs[index]

    def frame(self) -> pd.DataFrame:
        """A table with a row per epoch: the scalars, `bits.<tensor>` and `kept.<layer>`."""
        rows = []
        for record in self.epochs:
            row = {k: v for k, v in asdict(record).items() if k not in ("bits", "kept")}
            row |= {f"bits.{name}": bits for name, bits in zip(self.tensors, record.bits, strict=True)}
            row |= {f"kept.{name}": kept for name, kept in zip(self.layers, record.kept, strict=True)}
            rows.append(row)
        return pd.DataFrame(rows)

    def to_text(self) -> str:
        """JSON lines: first the names, then a line per epoch."""
        lines = [{"tensors": self.tensors, "layers": self.layers}, *map(asdict, self.epochs)]
        return "".join(json.dumps(line) + "\n" for line in lines)

    @classmethod
    def from_text(cls, text: str) -> "History":
        """Read what :meth:`to_text` gave.

        Raises:
            ValueError: If it is something else.
        """
        try:
            head, *records = [json.loads(line) for line in text.splitlines()]
            epochs = [EpochRecord(**_tuples(record)) for record in records]
            return cls(tuple(head["tensors"]), tuple(head["layers"]), epochs)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error

    def save(self, path: str | Path) -> None:
        """Write the JSON lines of :meth:`to_text` atomically."""
        write_text_atomically(path, self.to_text())

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is missing or not such a file.
        """
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a training history: {error}.") from error


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in record.items()
    }
