"""What an export found when it ran its file: printed, and written beside the file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_bbits.files import write_text_atomically

__all__ = ["ENDING", "ExportReport"]

ENDING = ".verification.json"
"""What the name of a report adds to that of its file."""


@dataclass(frozen=True)
class ExportReport:
    """Size of an exported file and what running it gave.

    Attributes:
        path: The file.
        figures: What is written to the JSON file: `format`, `size_bytes`, `runtime`, and per mode of running it
            (`exact`, `fused`, `fast`) the agreement with the frozen network and the score on the held-out rows.
    """

    path: Path
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Where the figures are written."""
        return self.path.with_name(self.path.name + ENDING)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return int(self.figures["size_bytes"])

    def save(self) -> Path:
        """Write the figures beside the file."""
        write_text_atomically(self.file, json.dumps(self.figures, indent=1) + "\n")
        return self.file

    def lines(self) -> list[str]:
        """The figures in a few lines for the console."""
        lines = [f"{self.path}  {self.size:,} bytes".replace(",", " ")]
        return lines + [
            f"  {name}: {_sentence(part)}" for name, part in self.figures.items() if isinstance(part, Mapping)
        ]


def _sentence(part: Mapping[str, Any]) -> str:
    said = []
    if "top1" in part:
        said.append(f"agrees on {100 * part['top1']:.2f} % of {part['rows']} rows")
    if "max_code_difference" in part:
        said.append(f"codes differ by at most {part['max_code_difference']}")
    if "accuracy" in part:
        said.append(f"accuracy {part['accuracy']:.2f} %")
    if "rmse" in part:
        said.append(f"RMSE {part['rmse']:.5g}")
    return ", ".join(said) or ", ".join(f"{key} {value}" for key, value in part.items())
